"""Which engine runs a net and why; that both agree; many students at once; memory and precision."""

import copy
import logging

import pytest
import torch
from torch import nn

import pydistill
from pydistill.nn import ConvNet, accelerate
from pydistill.ops import ConvNetShape
from pydistill.trajectory import FlatModule, convnet_shape
from pydistill.trajectory.generic import GenericStudents
from pydistill.trajectory.step import Batch


def students(E, kind="logits", own_images=False, own_labels=False, dtype=torch.float64, N=9, width=6):
    """A net, starts, targets, images, labels, rates."""
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    net = ConvNet(3, 4, width=width, depth=2, image_size=10).to(dtype)

    def randn(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    theta0 = FlatModule(net).parameters() + 0.05 * randn(E, FlatModule(net).numel)
    images = randn(*((E,) if own_images else ()), N, 3, 10, 10)
    lead = ((E,) if own_labels else ()) + (N,)
    labels = torch.randint(4, lead, generator=g) if kind == "hard" else randn(*lead, 4)
    labels = labels.softmax(-1) if kind == "probs" else labels
    return (
        net,
        theta0,
        theta0 + 0.1 * randn(*theta0.shape),
        images,
        labels,
        0.05 + 0.01 * torch.rand(E, generator=g).to(dtype),
    )


def gradients(net, theta0, target, images, labels, lr, **options):
    leaves = {"theta0": theta0, "images": images, "labels": labels, "lr": lr}
    leaves = {name: t.detach().clone() for name, t in leaves.items()}
    moving = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
    options.setdefault("generator", torch.Generator().manual_seed(1))
    if labels.is_floating_point():
        options.setdefault("label_kind", "logits")
    loss = pydistill.trajectory_match(net, leaves.pop("theta0"), target, **leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, moving)]


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


class Jitter:
    """An augmentation with a record."""

    def draw(self, shape, generator):
        return torch.rand((shape[0], 1, 1, 1), generator=generator, dtype=torch.float64)

    def __call__(self, images, record):
        return images * (0.5 + record.to(images)) + record.to(images) * images.roll(1, -1)


CASES = [
    ({}, {"momentum": 0.9, "weight_decay": 5e-3}),
    ({"kind": "hard"}, {"batch_size": 4}),
    ({"kind": "probs", "own_labels": True}, {"batch_size": 4, "augment": Jitter()}),
    ({"own_images": True}, {"batch_size": 4, "momentum": 0.5, "store_every": 2, "loss_scale": 0.3}),
    ({"own_images": True, "own_labels": True, "kind": "hard"}, {"augment": Jitter(), "store": "host"}),
    ({"own_labels": True}, {"batches": [torch.tensor([0, 3, 3]), torch.tensor([8]), torch.tensor([1, 2])] * 2}),
]


@pytest.mark.parametrize(("how", "options"), CASES)
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_students_at_once_equal_one_by_one(how, options, mode):
    """Also the generic engine, and with it the plain loop: for each, E students against E calls with one generator."""
    net, theta0, target, images, labels, lr = students(3, **how)
    options = {**options, "steps": 6, "mode": mode, "label_kind": how.get("kind", "logits")}
    together = gradients(net, theta0, target, images, labels, lr, **options)
    generic = gradients(net, theta0, target, images, labels, lr, **options, engine="generic")
    own = {"images": images.dim() == 5, "labels": labels.dim() == (2 if how.get("kind") == "hard" else 3)}
    generator = torch.Generator().manual_seed(1)
    alone = [
        gradients(
            net,
            theta0[e],
            target[e],
            images[e] if own["images"] else images,
            labels[e] if own["labels"] else labels,
            lr[e],
            **{**options, "generator": generator},
        )
        for e in range(3)
    ]
    names = ["loss", "theta0", "images", *(["labels"] if labels.is_floating_point() else []), "lr"]
    for name, a, b, *each in zip(names, together, generic, *alone, strict=True):
        stacked = torch.stack(each)
        expected = stacked if name in ("theta0", "lr") or own.get(name) else stacked.sum(0)
        assert relative(a, expected / 3) < 1e-10, name  # the loss is the mean over students
        assert relative(b, expected / 3) < 1e-10, name


def test_batches_of_their_own():
    net, theta0, target, images, labels, lr = students(2)
    batches = [torch.tensor([[0, 1], [2, 8]]), torch.tensor([[5, 5], [0, 2]])]
    together = gradients(net, theta0, target, images, labels, lr, steps=2, batches=batches)
    for own_images in (images, images.expand(2, -1, -1, -1, -1)):
        full = gradients(net, theta0, target, own_images, labels, lr, steps=2, batches=batches, mode="full")
        found = gradients(net, theta0, target, own_images, labels, lr, steps=2, batches=batches)
        assert all(relative(a, b) < 1e-10 for a, b in zip(found, full, strict=True))
    assert relative(together[2], full[2].sum(0)) < 1e-10


def test_shared_rate_and_intermediate_targets():
    net, theta0, target, images, labels, _ = students(3)
    lr = torch.tensor([0.05], dtype=torch.float64)
    options = {"steps": 5, "targets": {2: target + 0.1, 3: target - 0.1}}
    exact = gradients(net, theta0, target, images, labels, lr, **options)
    full = gradients(net, theta0, target, images, labels, lr, **options, mode="full")
    assert exact[-1].shape == (1,)
    assert all(relative(a, b) < 1e-10 for a, b in zip(exact, full, strict=True))


@pytest.mark.parametrize("E", [1, 3])
def test_non_finite_students_are_named_by_step(E):
    net, theta0, _, images, labels, _ = students(E)
    with pytest.raises(FloatingPointError, match="non-finite in step 2 of 4"):
        pydistill.unroll(net, theta0, images, labels, 1e308, steps=4, label_kind="logits")


# ---- which nets


class Plain(nn.Module):
    """The ConvNet as a method repository might write it."""

    def __init__(self, norm=lambda C: nn.GroupNorm(C, C), pool=None, bias=True, after=None, size=10):
        super().__init__()
        layers = []
        for i in range(2):
            layers += [nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, bias=bias), norm(6), nn.ReLU(inplace=True)]
            layers.append(pool or nn.AvgPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(6 * (size // 4) ** 2, 4)
        self.after = after

    def forward(self, x):
        out = self.classifier(self.features(x).view(x.shape[0], -1))
        return self.after(out) if self.after else out


def hooked():
    net = Plain()
    net.features[0].register_forward_hook(lambda *_: None)
    return net


def mixed():
    net = Plain()
    net.features[5] = nn.GroupNorm(2, 6)
    return net


GENERIC = [
    (lambda: Plain(norm=lambda C: nn.GroupNorm(C, C, affine=False)), "GroupNorm.*, which has no affine parameters"),
    (lambda: Plain(norm=lambda C: nn.InstanceNorm2d(C, affine=True, track_running_stats=True)), "running statistics"),
    (lambda: Plain(pool=nn.AvgPool2d(2, divisor_override=3)), "not a 2x2 pool"),
    (lambda: Plain(after=lambda out: out * 1.01), r"Plain.forward computes something else than classifier"),
    (lambda: Plain(after=lambda out: (out, out)), r"Plain.forward computes something else.*: it returns a tuple of 2"),
    (hooked, "Conv2d has hooks"),
    (lambda: mixed(), "block 1 is {.*'norm': 'group'.*}, block 0 {.*'norm': 'instance'"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(300, 4)), "no nn.Sequential `features`"),
]


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_repositorys_convnet_runs_on_the_engine(accelerated):
    net = accelerate(Plain()) if accelerated else Plain()
    shape = convnet_shape(net, (3, 10, 10))
    assert shape == ConvNetShape(3, 10, 10, (6, 6), 1, 4)
    assert shape.numel == sum(p.numel() for p in net.parameters())
    assert convnet_shape(pydistill.compat.ReparamModule(net), (3, 10, 10)) == shape


@pytest.mark.parametrize(("make", "reason"), GENERIC)
def test_what_differs_runs_generic_and_says_why(make, reason, caplog):
    torch.manual_seed(0)
    net = make().double()
    theta0, images, labels = FlatModule(net).parameters(), torch.randn(5, 3, 10, 10).double(), torch.arange(5) % 4
    with pytest.raises(ValueError, match=f"engine: expected a net that the student engine can run, but .*{reason}"):
        pydistill.unroll(net, theta0, images, labels, 0.1, steps=2, engine="student")
    if "forward" in reason and net.after and isinstance(net.after(torch.zeros(1)), tuple):
        return  # such a net needs output=
    with caplog.at_level(logging.DEBUG, "pydistill"):
        found = pydistill.unroll(net, theta0, images, labels, 0.1, steps=2)
    assert "generic engine: " in caplog.text
    assert torch.equal(found, pydistill.unroll(net, theta0, images, labels, 0.1, steps=2, engine="generic"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "full"}, "mode='full' is autograd through the module"),
        ({"output": 0}, "output=0 takes an element of a tuple"),  # the net's own forward gives only its logits
    ],
)
def test_options_that_need_the_generic_engine(options, reason):
    net, theta0, _, images, labels, _ = students(1)
    with pytest.raises(ValueError, match=f"student engine can run, but {reason}"):
        pydistill.unroll(net, theta0, images, labels, 0.1, steps=1, label_kind="logits", engine="student", **options)


@pytest.mark.parametrize(
    ("make", "image", "options", "reason"),
    [
        (Plain, (3, 12, 12), {}, r"classifier takes 24 features where \[3, 12, 12\] images give 54"),
        (Plain, (1, 10, 10), {}, "convolution 0 takes 3 channels, not 1"),
        (
            *(lambda: Plain(norm=lambda C: nn.LayerNorm([C, 9, 9])), (3, 10, 10), {}),
            r"^its norm 0 is one of \[6, 9, 9\], where \[3, 10, 10\] images give \[6, 10, 10\]$",
        ),
        (lambda: Plain(pool=nn.MaxPool2d(3)), (3, 10, 10), {}, "not a 2x2 pool"),
        (Plain, (3, 2, 2), {}, "leave nothing of 2x2 images"),
        (Plain, (3, 10, 10), {"dtype": torch.float16}, "float32 and float64, not torch.float16"),
        (Plain, (3, 10, 10), {"device": "meta"}, "no student engine on meta"),
    ],
)
def test_other_sizes_than_the_nets(make, image, options, reason):
    with pytest.raises(ValueError, match=reason):
        convnet_shape(make(), image, **options)


def test_probing_leaves_the_net_and_the_generators_alone():
    net = Plain()
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    convnet_shape(net, (3, 10, 10))
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), net.state_dict().values(), strict=True))
    assert torch.equal(before[1], torch.get_rng_state())


# ---- memory and precision


def test_memory_changes_no_bit():
    net, theta0, target, images, labels, lr = students(2, dtype=torch.float32)
    auto = gradients(net, theta0, target, images, labels, lr, steps=9, batch_size=4)
    for memory in (1 << 30, 3 << 20):
        found = gradients(net, theta0, target, images, labels, lr, steps=9, batch_size=4, memory=memory)
        assert all(torch.equal(a, b) for a, b in zip(auto, found, strict=True))


def test_memory_is_spent_from_the_end():
    from pydistill.ops.convnet_step import tape_bytes
    from pydistill.trajectory.students import ConvNetStudents

    shape = ConvNetShape(3, 10, 10, (6, 6), 1, 4)
    runner = ConvNetStudents(shape, "hard", 3, "ieee", None)
    theta = torch.zeros(2, shape.numel)
    size = tape_bytes(shape, 2, 5, torch.float32)
    with pytest.raises(ValueError, match=r"memory: expected at least (\d+) bytes for this unroll, got 0") as error:
        runner.plan(0, 10, 2, 5, theta, stored=1000)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for tapes in (0, 3, 12):
        runner.plan(least + tapes * size, 10, 2, 5, theta, stored=1000)
        for k in range(10):
            batch = (torch.zeros(5, 3, 10, 10), torch.zeros(5, dtype=torch.int64), False)
            runner.gradient(theta, Batch(*batch), None, k)
        assert sorted(runner.tapes) == list(range(10 - min(tapes, 10), 10))
        runner.tapes.clear()


def test_too_little_memory_names_the_least():
    net, theta0, _, images, labels, lr = students(2)
    options = {"steps": 3, "label_kind": "logits"}
    with pytest.raises(ValueError, match="memory: expected at least") as error:
        pydistill.unroll(net, theta0.requires_grad_(), images, labels, lr, memory=1000, **options)
    least = int(str(error.value).split("at least ")[1].split()[0])
    pydistill.unroll(net, theta0, images, labels, lr, memory=least, **options).sum().backward()
    with pytest.raises(ValueError, match="memory: expected at least"):
        pydistill.unroll(net, theta0, images, labels, lr, memory=least - 1, **options)


def test_numbers_of_kept_steps_that_no_unroll_has():
    with pytest.raises(ValueError, match="number: expected at least 0, got -1"):
        pydistill.trajectory.KeptSteps(-1)
    with pytest.raises(TypeError, match=r"number: expected a whole number, got 1\.5"):
        pydistill.trajectory.KeptSteps(1.5)


def test_second_backward_gives_the_same():
    net, theta0, _, images, labels, lr = students(2)
    images.requires_grad_()
    loss = pydistill.unroll(net, theta0, images, labels, lr, steps=3, label_kind="logits").square().sum()
    (first,) = torch.autograd.grad(loss, images, retain_graph=True)
    (second,) = torch.autograd.grad(loss, images)
    assert torch.equal(first, second)


def test_bf16_follows_fp32():
    options = {"steps": 1, "label_kind": "logits"}
    for engine in ("student", "generic"):
        net, *given = students(2, dtype=torch.float32, width=32, N=20)
        full = gradients(net, *given, **options, engine=engine)
        half = gradients(net, *given, **options, engine=engine, precision="bf16")
        for a, b in zip(half[1:], full[1:], strict=True):
            assert not torch.equal(a, b)
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99


BAD = [
    ({"theta0": lambda t: t[None]}, r"theta0: expected shape \[\d+\] or \[E, \d+\] for this net, got \[1, 2, \d+\]"),
    ({"images": lambda x: x.expand(3, *x.shape)}, r"images: expected \[N, C, H, W\] or \[2, N, C, H, W\], got"),
    ({"labels": lambda y: y.expand(3, *y.shape)}, r"labels: expected shape \[9, K\] or \[2, 9, K\], got \[3, 9, 4\]"),
    ({"lr": lambda _: torch.ones(3)}, r"lr: expected one element or \[2\], got shape \[3\]"),
    ({"batches": lambda _: [torch.zeros(3, 2, dtype=torch.int64)]}, r"batches\[0\]: expected a row for each of 2"),
    ({"engine": lambda _: "fast"}, "engine: expected 'auto', 'student', 'compiled' or 'generic', got 'fast'"),
    ({"precision": lambda _: "fp8"}, "precision: expected 'auto', 'ieee', .* or 'tf32-matmul', got 'fp8'"),
    ({"memory": lambda _: -1}, "memory: expected 'auto', a number of bytes or KeptSteps, got -1"),
    ({"memory": lambda _: 1 << 30, "mode": lambda _: "full"}, "memory: expected 'auto', mode='full' keeps every step"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    net, theta0, _, images, labels, lr = students(2)
    given = {"theta0": theta0, "images": images, "labels": labels, "lr": lr}
    for name, value in change.items():
        given[name] = value(given.get(name))
    with pytest.raises(ValueError, match=message):
        pydistill.unroll(
            net, *(given.pop(n) for n in ("theta0", "images", "labels", "lr")), steps=1, label_kind="logits", **given
        )


def test_tf32_is_of_gpus():
    net, theta0, _, images, labels, lr = students(1, dtype=torch.float32)
    for name in ("tf32", "tf32-conv", "tf32-matmul"):
        with pytest.raises(ValueError, match=f"precision: expected 'ieee' or 'bf16' on cpu, got '{name}'"):
            pydistill.unroll(net, theta0, images, labels, lr, steps=1, label_kind="logits", precision=name)


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_on_the_cpu_all_names_of_float32_are_the_same(engine):
    given = students(1, dtype=torch.float32)
    auto, *others = (
        gradients(*given, steps=2, label_kind="logits", engine=engine, **options)
        for options in ({}, {"precision": "auto"}, {"precision": "ieee"}, {"precision": "fp32"})
    )
    for found in others:
        assert all(map(torch.equal, auto, found))


def test_bf16_of_float64_is_refused():
    net, theta0, _, images, labels, lr = students(1)
    with pytest.raises(TypeError, match=r"precision: expected float32 images .* got torch\.float64"):
        pydistill.unroll(net, theta0, images, labels, lr, steps=1, label_kind="logits", precision="bf16")


# ---- the generic engine's memory


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"kind": "hard", "mode": "first_order"}])
def test_graphs_that_are_kept_change_no_bit(options):
    """Whatever fits, of steps of two sizes and two students."""
    kind, options = options.get("kind", "logits"), {k: v for k, v in options.items() if k != "kind"}
    net, theta0, target, images, labels, lr = students(2, kind)
    options = {"engine": "generic", "steps": 6, "batch_size": 4, "label_kind": kind, **options}
    stored = 6 * theta0.nbytes
    found = [
        gradients(net, theta0, target, images, labels, lr, memory=memory, **options)
        for memory in (stored, stored + (1 << 20), 1 << 30, "auto")
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    with pytest.raises(ValueError, match=f"memory: expected at least {stored} bytes for this unroll, got {stored - 1}"):
        gradients(net, theta0, target, images, labels, lr, memory=stored - 1, **options)


def test_graphs_are_kept_from_the_end():
    net, theta, _, images, labels, _ = students(1)
    runner = GenericStudents(FlatModule(net), "logits", None, 3, "ieee")
    batch = Batch(images, labels, False)

    def run(memory):
        runner.plan(memory, 8, 0, theta.device, images=True, labels=True)
        runner.graphs.clear()
        for k in range(8):
            runner.gradient(theta, batch, None, k)
        return sorted(runner.graphs)

    assert run(1 << 40) == list(range(8))
    assert run(0) == []
    memory = 1 << 10
    while len(run(memory)) < 3:  # a graph's size is up to autograd
        memory = memory * 5 // 4
    assert run(memory) == [5, 6, 7]


@pytest.mark.parametrize("images", [1, 3])
def test_tapes_of_any_length_follow_one_another(images):
    """In bfloat16 a tape of an odd number of images may end within a cache line."""
    torch.manual_seed(0)
    net = ConvNet(3, 10, width=16, image_size=20)
    theta0, lr = FlatModule(net).parameters(), torch.tensor(0.02)
    x, y = torch.randn(images, 3, 20, 20), torch.arange(images)
    grads = []
    for precision in ("fp32", "bf16"):
        leaf = x.clone().requires_grad_()
        theta = pydistill.unroll(net, theta0, leaf, y, lr, steps=3, precision=precision)
        grads += torch.autograd.grad(theta.square().sum(), leaf)
    assert grads[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in grads), 0) > 0.99
