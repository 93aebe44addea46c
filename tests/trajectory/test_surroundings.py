"""The surroundings in which the backward pass runs steps again, and which parameters move: as in the plain loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory import GSAM, Adam, FlatModule
from pydistill.trajectory.surroundings import Surroundings


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 4)

    def forward(self, x):
        t = x.transpose(1, 2).flatten(2)
        return self.head(self.attend(t, t, t, need_weights=False)[0].mean(1))


class Watching(nn.Module):
    """Records what is set whenever it runs."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(12, 4), []

    def forward(self, x):
        now = (torch.get_default_dtype(), torch.get_default_device(), torch.get_deterministic_debug_mode())
        now += (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.benchmark)
        now += (torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision())
        now += (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
        self.seen.append(now)
        return self.head(x.flatten(1)).square()


def problem(net, shape=(3, 2, 2)):
    torch.manual_seed(1)
    return FlatModule(net).parameters(), torch.randn(5, *shape, requires_grad=True), torch.arange(5) % 4


def test_attention_keeps_its_backend_in_backward():
    net = Attending()
    theta, x, y = problem(net, (3, 4, 4))
    found = {}
    for mode in ("exact", "full"):
        with sdpa_kernel(SDPBackend.MATH):
            loss = pydistill.unroll(net, theta, x, y, 0.1, steps=3, mode=mode).square().sum()
        (found[mode],) = torch.autograd.grad(loss, x)
    assert (found["exact"] - found["full"]).norm() < 1e-5 * found["full"].norm()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def other_settings():
    before = Surroundings(torch.device("cpu"))
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mkldnn.enabled = False
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    yield
    with before.restored():
        values = Surroundings(torch.device("cpu"))
    assert values._switches == before._switches
    torch.set_default_dtype(torch.float32)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mkldnn.enabled = True
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("store_every", [1, 2])
def test_a_replay_finds_what_the_forward_pass_found(other_settings, store_every):
    net = Watching()
    theta, x, y = problem(net)
    with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False), torch.device("meta"):
        options = {"steps": 3, "store_every": store_every, "memory": 3 * theta.nbytes}  # of which no graph is kept
        loss = pydistill.unroll(net, theta, x, y, 0.1, **options).sum()
    forward = set(net.seen)
    assert len(forward) == 1
    assert len(net.seen) == 3
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mkldnn.enabled = True
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    before = Surroundings(x.device)._switches
    loss.backward()
    assert len(net.seen) > 3
    assert set(net.seen) == forward
    assert Surroundings(x.device)._switches == before
    assert torch.get_default_device() == torch.device("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_float32_by_name_is_not_computed_under_autocast():
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 4, 4))
    for precision in ("ieee", "fp32"):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match=f"precision: expected 'auto' or 'bf16' under autocast, got '{precision}'"),
        ):
            pydistill.unroll(net, theta, x, y, 0.1, steps=1, precision=precision)


# ---- changes in place


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_index_vectors_may_be_filled_anew(engine):
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 4, 4))
    options = {"steps": 2, "engine": engine}
    found = []
    for fill in (False, True):
        index = torch.tensor([0, 1, 2])
        out = pydistill.unroll(net, theta, x, y, 0.1, batches=[index, index], **options)
        if fill:
            index.copy_(torch.tensor([3, 4, 0]))
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*found)


class Reusing:
    """An augmentation that draws into the same memory each time."""

    def __init__(self):
        self.record = torch.zeros(1)

    def draw(self, shape, generator):
        return self.record.uniform_(generator=generator)

    def __call__(self, images, record):
        return images * record


def test_a_record_is_kept_although_the_next_is_drawn_over_it():
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 4, 4))
    draws = torch.rand(2, 1, generator=torch.Generator().manual_seed(2))

    class Fixed(Reusing):
        def draw(self, shape, generator):
            return draws[1 if torch.rand((), generator=generator) == draws[1] else 0]

    found = [
        pydistill.unroll(net, theta, x, y, 0.1, steps=2, augment=each, generator=torch.Generator().manual_seed(2))
        for each in (Reusing(), Fixed())
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("which", ["images", "labels", "lr"])
def test_other_inputs_that_change_are_named(which):
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, _ = problem(net, (3, 4, 4))
    inputs = {"images": x.detach(), "labels": torch.full((5, 4), 0.25), "lr": torch.tensor(0.1)}
    theta.requires_grad_()
    out = pydistill.unroll(net, theta, **inputs, steps=2, label_kind="probs")
    inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="images, labels, lr: one of them was changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("call", ["class_gradients", "features"])
def test_matching_notices_changes_too(call):
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 4, 4))
    if call == "class_gradients":
        out = pydistill.matching.class_gradients(net, theta, x[:4], y[:4]).square().sum()
    else:
        out = pydistill.matching.features(net, theta, x).embedding.square().sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"images.*: one of them was changed in place"):
        out.backward()


# ---- frozen and unused parameters


class Partly(nn.Module):
    def __init__(self, frozen=True):
        super().__init__()
        self.frozen, self.head, self.unused = nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(2, 2)
        self.frozen.requires_grad_(not frozen)
        self.on = True

    def forward(self, x):
        out = self.frozen(x.flatten(1)).tanh()
        return self.head(out) if self.on else self.head(out).detach() + self.frozen(x.flatten(1))[:, :4]


def by_sgd(net, x, y, steps, lr=0.1, **options):
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_without_a_gradient_stay_as_sgd_leaves_them(momentum, frozen):
    net = Partly(frozen).double()
    theta, x, y = problem(net)
    x = x.detach().double()
    options = {"momentum": momentum, "weight_decay": 0.1}
    truth = by_sgd(net, x, y, 3, **options)
    trained = pydistill.train_students(net, theta[None], x, y, epochs=3, lr=0.1, **options).theta[0]
    assert (trained - truth).abs().max() < 1e-12
    for mode in ("exact", "first_order", "full"):
        found = pydistill.unroll(net, theta.clone().requires_grad_(), x, y, 0.1, steps=3, mode=mode, **options)
        assert (found - truth).abs().max() < 1e-12, mode
    assert (truth - theta)[-6:].abs().max() == 0
    assert (truth - theta).abs().max() > 0.01


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": Adam()}])
def test_gradients_through_frozen_parameters(options):
    net = Partly().double()
    theta, x, y = problem(net)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = [theta.requires_grad_(), x.detach().double().requires_grad_(), lr]
    found = {}
    for mode in ("exact", "full"):
        out = pydistill.unroll(net, *leaves[:2], y, lr, steps=3, mode=mode, weight_decay=0.1, **options)
        found[mode] = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(found["exact"], found["full"], strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()
    assert found["exact"][0][:104].norm() > 0  # frozen parameters still affect where the others go


def test_the_student_engine_leaves_frozen_parameters_alone():
    net = ConvNet(3, 4, width=4, depth=1, image_size=4).double()
    net.features.requires_grad_(False)
    theta, x, y = problem(net, (3, 4, 4))
    x = x.detach().double().requires_grad_()
    options = {"momentum": 0.5, "weight_decay": 0.1}
    truth = by_sgd(net, x.detach(), y, 3, **options)
    trained = pydistill.train_students(net, theta[None], x, y, epochs=3, lr=0.1, engine="student", **options)
    assert (trained.theta[0] - truth).abs().max() < 1e-10
    found = {}
    for engine in ("student", "generic"):
        out = pydistill.unroll(net, theta, x, y, 0.1, steps=3, engine=engine, **options)
        assert (out - truth).abs().max() < 1e-10
        rows = pydistill.matching.class_gradients(net, theta, x[:4], y[:4], engine=engine)
        assert rows[:, : theta.numel() - 4 * 17].abs().max() == 0 < rows.abs().max()
        found[engine] = torch.autograd.grad(out.square().sum() + rows.square().sum(), x)[0]
    assert (found["student"] - found["generic"]).norm() < 1e-10 * found["generic"].norm()


def test_a_net_of_which_nothing_is_to_be_trained_is_a_template():
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 4, 4))
    before = pydistill.unroll(net, theta, x, y, 0.1, steps=1)
    assert torch.equal(pydistill.unroll(net.requires_grad_(False), theta, x, y, 0.1, steps=1), before)


def test_gsam_measures_its_steps_without_frozen_parameters():
    net = Partly().double()
    theta, x, y = problem(net)
    x = x.detach().double()
    options = {"epochs": 2, "lr": 0.1, "sharpness": GSAM(rho=0.5, alpha=0.0, adaptive=False)}
    found = pydistill.train_students(net, theta[None], x, y, **options).theta[0]
    assert torch.equal(found[:104], theta[:104])
    rest = nn.Sequential(nn.Flatten(), nn.Linear(8, 4)).double()  # the head alone, on what the frozen layer gives
    inner = net.frozen(x.flatten(1)).tanh().detach()[:, :, None, None]
    alone = pydistill.train_students(rest, theta[None, 104:140], inner, y, **options).theta[0]
    assert (found[104:140] - alone).abs().max() < 1e-12


def test_parameters_of_some_steps_losses_are_refused_with_moments():
    net = Partly(frozen=False)

    def toggling(images):
        net.on = not net.on
        return images

    theta, x, y = problem(net)
    with pytest.raises(RuntimeError, match=r"net: its loss in step 2 does not use the same parameters.*'head.bias'"):
        pydistill.unroll(net, theta, x, y, 0.1, steps=2, momentum=0.9, augment=toggling, engine="generic")
    pydistill.unroll(net, theta, x, y, 0.1, steps=2, augment=toggling, engine="generic")


# ---- the engine is chosen by the augmentation's output


def test_an_augmentation_that_crops_a_canvas_runs_on_the_engine():
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 8, 8))

    def crop(images):  # as in the repositories: at a new place each time
        top, left = torch.randint(5, (2,)).tolist()
        return images[:, :, top : top + 4, left : left + 4]

    found = {}
    for engine in ("student", "generic"):
        torch.manual_seed(5)
        out = pydistill.unroll(net, theta, x, y, 0.1, steps=4, augment=crop, engine=engine, batch_size=3)
        torch.rand(3)  # the backward pass replays the draws and leaves the generator alone
        state = torch.get_rng_state()
        found[engine] = torch.autograd.grad(out.square().sum(), x)[0], state
        assert torch.equal(torch.get_rng_state(), state)
    (a, state_a), (b, state_b) = found.values()
    assert torch.equal(state_a, state_b)
    assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("kind", ["crop", "function"])
def test_students_train_on_crops_of_a_canvas_and_are_tested_on_images(kind):
    net = ConvNet(3, 4, width=4, depth=1, image_size=4)
    theta, x, y = problem(net, (3, 8, 8))
    crops = pydistill.augment.MultiCrop(4)
    augment = crops if kind == "crop" else lambda images: images[:, :, 2:6, 2:6] * torch.rand(())
    options = {"epochs": 2, "lr": 0.1, "augment": augment, "eval_data": (torch.randn(6, 3, 4, 4), torch.arange(6) % 4)}
    found = []
    for engine in ("student", "generic"):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(3)
        found.append(pydistill.train_students(net, theta[None], x, y, engine=engine, generator=generator, **options))
    assert (found[0].theta - found[1].theta).norm() < 1e-5 * found[1].theta.norm()
    wrong = options | {"eval_data": (torch.randn(6, 3, 8, 8), torch.arange(6) % 4)}
    with pytest.raises(ValueError, match=r"eval_data: expected images \[M, 3, 4, 4\]"):
        pydistill.train_students(net, theta[None], x, y, **wrong)


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2))
        self.classifier, self.odd_mode = nn.Linear(16, 4), True

    def forward(self, x):
        x = self.classifier(self.features(x).flatten(1))
        return -3 * x if self.training == self.odd_mode else x


@pytest.mark.parametrize("odd_mode", [True, False])
def test_a_forward_that_differs_by_mode_is_followed_in_those_it_runs_in(odd_mode):
    net = Moody().train(not odd_mode)
    net.odd_mode = odd_mode
    theta, x, y = problem(net, (3, 4, 4))
    found = []
    for engine in ("auto", "generic"):
        torch.manual_seed(0)
        options = {"epochs": 3, "lr": 0.1, "engine": engine, "eval_data": (x.detach(), y)}
        found.append(pydistill.train_students(net, theta[None], x, y, **options))
    assert torch.equal(found[0].theta, found[1].theta)
    assert torch.equal(found[0].accuracy, found[1].accuracy)
    assert net.training is not odd_mode
