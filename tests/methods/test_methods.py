"""Each method does what its equations say, and an interrupted run ends with the bits of an uninterrupted one."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from pydistill.methods import (
    AST,
    ATOM,
    DATM,
    DC,
    DM,
    DSA,
    FTD,
    FYI,
    FYIDM,
    FYIDSA,
    METHODS,
    MTT,
    TESLA,
    Config,
    DataDAM,
    FedLGD,
    RaTBPTT,
    State,
    distill,
)
from pydistill.methods.outer import fresh_parameters
from pydistill.nn import ConvNet
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import GSAM, Adam, ExpertStore, FlatModule, Smoothing, unroll
from pydistill.trajectory.flat import perturb_towards
from tests.bars import make_net

DISTILLING = {name: method for name, method in METHODS.items() if issubclass(method, Config)}
SMALL = {"ipc": 2, "iterations": 4, "syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2, "batch_syn": 4}
SMALL |= {"lr_img": 10.0, "lr_lr": 1e-4, "lr_teacher": 0.05, "seed": 5}
CONFIGS = {
    "mtt": MTT(**SMALL),
    "mtt, augmented": MTT(**SMALL, augment="color_crop_scale"),
    "tesla": TESLA(**SMALL, soft_labels=True),
    "ftd": FTD(**SMALL, ema_decay=0.5),
    "ast": AST(**SMALL | {"expert_epochs": 2, "lr_teacher": 0.01}),
    "datm": DATM(**SMALL, threshold=5.0, first_max_start_epoch=1, expansion=3),
    "fyi": FYI(**SMALL),
    "rat_bptt": RaTBPTT(ipc=2, iterations=4, window=2, total=4, batch_real=20, lr_img=0.1, learn_labels=True, seed=5),
    "dc": DC(ipc=2, iterations=4, outer_loop=2, inner_loop=2, batch_real=5, lr_img=1.0, seed=5),
    "dsa": DSA(ipc=2, iterations=4, outer_loop=2, batch_real=5, lr_img=1.0, augment="color_crop_cutout", seed=5),
    "dm": DM(ipc=2, iterations=4, batch_real=5, augment="color_crop_cutout", seed=5),
    "datadam": DataDAM(ipc=2, iterations=4, batch_real=5, last_layer=True, seed=5),
    "atom": ATOM(ipc=2, iterations=4, batch_real=5, last_layer=True, seed=5),
    "fyi_dm": FYIDM(ipc=2, iterations=4, batch_real=5, seed=5),
    "fyi_dsa": FYIDSA(ipc=2, iterations=4, outer_loop=2, batch_real=5, lr_img=1.0, augment="scale", seed=5),
}
# a new one is tried as its defaults are
CONFIGS |= {
    method.name: method(**{f.name: SMALL[f.name] for f in fields(method) if f.name in SMALL})
    for method in DISTILLING.values()
    if method not in map(type, CONFIGS.values()) and method is not FedLGD  # whose own test this is, too
}


def run(config, dataset, experts, **options):
    return distill(config, dataset, make_net(), experts, **options)


def logits(theta, images):
    return FlatModule(make_net())(theta, images)


# ---- what all have


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_run_resumed_from_its_file_is_bitwise_the_unbroken_one(dataset, experts, tmp_path, config):
    class CutOffError(Exception):
        pass

    def cut_off(state, record):
        if state.iteration == 2:
            state.save(tmp_path / "state.safetensors", config)
            raise CutOffError

    unbroken = config.initial(dataset, make_net(), config.check(dataset, make_net(), experts))
    before = unbroken["images"].clone()
    whole = run(config, dataset, experts, state=unbroken)
    with pytest.raises(CutOffError):
        run(config, dataset, experts, on_step=cut_off)
    torch.randn(7)  # the global random state has no effect
    resumed = State.load(tmp_path / "state.safetensors", config)
    assert resumed.iteration == 2
    continued = run(config, dataset, experts, state=resumed)
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken.tensors)
    assert torch.equal(continued.images, whole.images)
    assert torch.equal(continued.labels, whole.labels)
    assert continued.lr == whole.lr
    assert not torch.equal(unbroken["images"], before)
    assert not torch.equal(run(replace(config, seed=6), dataset, experts).images, whole.images)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_result_says_what_made_it(dataset, experts, config):
    found = run(config, dataset, experts)
    assert json.loads(json.dumps(found.config)) == found.config
    assert (found.config["method"], found.config["dataset"], found.config["ipc"]) == (config.name, "bars", 2)
    assert found.config["class_names"] == ["top", "middle", "bottom"]
    assert found.config["flip_batch"] == config.name.startswith("fyi")
    assert found.label_kind == {"datm": "logits", "rat_bptt": "probs"}.get(config.name, "hard")
    assert found.images.shape == (6, 1, 6, 6)


def test_a_state_of_another_run_is_refused(dataset, experts, tmp_path):
    path, config = tmp_path / "state.safetensors", CONFIGS["mtt"]
    config.initial(dataset, make_net(), experts).save(path, config)
    assert State.load(path, replace(config, iterations=9)).iteration == 0
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a run with syn_steps=7, got 3"):
        State.load(path, replace(config, syn_steps=7))
    with pytest.raises(ValueError, match="expected a pydistill file of kind 'tesla_state', version 1; got 'mtt_state'"):
        State.load(path, CONFIGS["tesla"])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors: expected .* 'mtt_state', version 1; it is truncated"):
        State.load(path, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 0}, "ipc: expected a finite number of at least 1, got 0"),
        ({"batch_syn": 0}, "batch_syn: expected a finite number of at least 1, got 0"),
        ({"lr_img": -1.0}, r"lr_img: expected a finite number of at least 0, got -1\.0"),
        ({"lr_lr": float("nan")}, "lr_lr: expected a finite number of at least 0, got nan"),
        ({"min_start_epoch": 2}, "min_start_epoch: expected less than 2, got 2"),
        ({"augment": "flip_melt"}, "augment: expected names out of color, .*, got 'melt' in 'flip_melt'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MTT(**SMALL | options)
    with pytest.raises(ValueError, match="first_max_start_epoch: expected more than 0 and at most 2, got 3"):
        DATM(**SMALL, first_max_start_epoch=3)
    with pytest.raises(ValueError, match="total: expected at least the window of 9, got 3"):
        RaTBPTT(window=9, total=3)


@pytest.mark.parametrize("method", DISTILLING.values(), ids=DISTILLING)
def test_presets(method):
    for name in ("digits", "fashion-mnist", "cifar10"):
        assert name in method.presets
    for dataset, rows in method.presets.items():
        for ipc in rows:
            assert method.preset(dataset, ipc).ipc == ipc
    with pytest.raises(ValueError, match=rf"preset: expected {method.name}'s for one of .*digits.*, got 'svhn'"):
        method.preset("svhn", 1)
    with pytest.raises(ValueError, match=f"preset: expected {method.name}'s for digits with ipc 1, 10, got 7"):
        method.preset("digits", 7)
    assert method.nearest_preset("digits", 7) == replace(method.preset("digits", 10), ipc=7)
    assert method.nearest_preset("svhn", 3) == method(ipc=3)


def test_experts_that_do_not_fit_are_refused(dataset, experts, store):
    config = CONFIGS["mtt"]
    other = ConvNet(1, 3, width=5, depth=1, image_size=6)
    with pytest.raises(
        ValueError, match=r"parameter features.0.weight is \[5, 1, 3, 3\]; got features.0.weight \[4, 1"
    ):
        distill(config, dataset, other, store)
    with pytest.raises(ValueError, match=r"expected at least 2 epochs of each, got 1.*max_start_epoch=2"):
        run(config, dataset, experts[:, :2])
    with pytest.raises(ValueError, match="experts: expected trajectories, which mtt matches, got None"):
        run(config, dataset, None)


def test_a_store_gives_what_its_tensor_gives(dataset, experts, store):
    found, expected = (run(CONFIGS["mtt"], dataset, each) for each in (store, experts))
    assert torch.equal(found.images, expected.images)
    assert found.lr == expected.lr


def test_segments_are_averaged(dataset, experts):
    """Two segments at once move the images by the mean of what each alone moves them by."""
    config = replace(CONFIGS["mtt, augmented"], iterations=1, segments=2)
    start = config.initial(dataset, make_net(), config.check(dataset, make_net(), experts))
    records, moves = [], []

    class One(MTT):
        """Only the segment of one number."""

        def segment(self, number, *rest):
            return super().segment(self.seed_of_segment, *rest)

    for number in (0, 1):
        One.seed_of_segment = number
        alone = One(**asdict(replace(config, segments=1)))
        moves.append(run(alone, dataset, experts, on_step=lambda s, r: records.append(r)).images - start["images"])
    both = run(config, dataset, experts).images - start["images"]
    assert records[0]["grad_norm"] != records[1]["grad_norm"]
    torch.testing.assert_close(both, (moves[0] + moves[1]) / 2, rtol=1e-4, atol=1e-5)


RANKS = """
import sys, torch
from pydistill.methods import DATM, DSA, RaTBPTT, distill
from tests.bars import make_dataset, make_net
torch.distributed.init_process_group("gloo")
experts = torch.load(sys.argv[1])
found = {}
for config in (DATM(**%(datm)r), RaTBPTT(**%(rat)r), DSA(**%(dsa)r)):
    records = []
    result = distill(config, make_dataset(), make_net(), experts, on_step=lambda s, r: records.append(r["loss"]))
    found[config.name] = [result.images, result.labels, torch.tensor(records)]
torch.save(found, f"{sys.argv[2]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_share_the_work(dataset, experts, tmp_path):
    """Two processes reach the same as one, up to rounding: so each holds the sum of both gradients."""
    datm = replace(CONFIGS["datm"], segments=3, iterations=2, threshold=1.0)
    rat = replace(CONFIGS["rat_bptt"], segments=2, iterations=2)
    torch.save(experts, tmp_path / "experts.pt")
    script = tmp_path / "ranks.py"
    dsa = replace(CONFIGS["dsa"], iterations=2)  # three classes for two ranks
    script.write_text(RANKS % {"datm": asdict(datm), "rat": asdict(rat), "dsa": asdict(dsa)})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, str(tmp_path / "experts.pt"), str(tmp_path)],
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for config in (datm, rat, dsa):
        records = []
        alone = run(config, dataset, experts, on_step=lambda s, r, records=records: records.append(r["loss"]))
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt")[config.name]
            for value, truth in zip(found, (alone.images, alone.labels, torch.tensor(records)), strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):  # the start itself would not pass
        torch.testing.assert_close(
            datm.initial(dataset, make_net(), datm.check(dataset, make_net(), experts))["images"],
            run(datm, dataset, experts).images,
            rtol=1e-3,
            atol=1e-4,
        )


# ---- what each says


def literal_student(theta, images, labels, lr, steps, momentum=0.0, loss=F.cross_entropy):
    """SGD step by step, as one differentiable graph; yields the parameters after each."""
    net, velocity = make_net(), 0
    sizes = [p.numel() for p in net.parameters()]
    for _ in range(steps):
        named = zip(net.named_parameters(), theta.split(sizes), strict=True)
        found = functional_call(net, {name: part.view_as(p) for (name, p), part in named}, (images,))
        (gradient,) = torch.autograd.grad(loss(found, labels), theta, create_graph=True)
        velocity = momentum * velocity + gradient
        theta = theta - lr * velocity
        yield theta


def distance(theta, target, theta0):
    return (theta - target).square().sum() / (theta0 - target).square().sum()


def test_mtt_is_the_papers_updates(dataset, experts):
    """Three iterations written out: plain SGD inside, backpropagation through it, SGD with momentum outside."""
    options = {"syn_steps": 4, "expert_epochs": 2, "max_start_epoch": 2, "lr_img": 3.0, "lr_lr": 1e-3, "momentum": 0.7}
    config, records = MTT(ipc=1, iterations=3, seed=2, **options), []
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    start = config.initial(dataset, make_net(), experts)
    images, lr = start["images"].requires_grad_(), start["lr"].requires_grad_()
    outer_images = torch.optim.SGD([images], lr=3.0, momentum=0.7)
    outer_lr = torch.optim.SGD([lr], lr=1e-3, momentum=0.7)
    for record in records:
        trajectory = experts[record["expert"], record["start_epoch"] :]
        *_, theta = literal_student(trajectory[0].clone().requires_grad_(), images, start["labels"], lr, 4)
        loss = distance(theta, trajectory[2], trajectory[0])
        outer_images.zero_grad()
        outer_lr.zero_grad()
        loss.backward()
        assert images.grad.norm() > 1e-5
        assert record["grad_norm"] == pytest.approx(images.grad.norm().item(), rel=1e-4)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        outer_images.step()
        outer_lr.step()
        assert record["lr"] == pytest.approx(lr.item(), rel=1e-5)
    torch.testing.assert_close(found.images, images.detach(), rtol=1e-4, atol=1e-6)
    assert [record["iteration"] for record in records] == [1, 2, 3]


@pytest.mark.parametrize("soft", [False, True])
def test_tesla_is_its_formula(dataset, experts, soft):
    """dX_k = -2 lr / D (d g_k / dX_k)^T (theta_T - target), every theta_k a constant; the code gives half of it."""
    config = TESLA(ipc=1, iterations=1, syn_steps=3, lr_img=1.0, lr_lr=0.0, lr_teacher=0.05, soft_labels=soft)
    records = []
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    start = config.initial(dataset, make_net(), experts)
    trajectory = experts[records[0]["expert"], records[0]["start_epoch"] :]
    theta0, target = trajectory[0], trajectory[2]
    labels = logits(target, start["images"]).softmax(1).detach() if soft else start["labels"]
    thetas = [theta0, *literal_student(theta0.clone().requires_grad_(), start["images"], labels, 0.05, 3)]
    images = start["images"].clone().requires_grad_()
    total, error = 0, (thetas[-1] - target).detach()
    for theta in thetas[:-1]:
        theta = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(theta, images), labels), theta, create_graph=True)
        total = total + gradient @ error
    (grad,) = torch.autograd.grad(total * -2 * 0.05 / (theta0 - target).square().sum(), images)
    torch.testing.assert_close(found.images, start["images"] - grad, rtol=1e-4, atol=1e-6)
    halved = run(replace(config, bug_compatible=True), dataset, experts)
    torch.testing.assert_close(halved.images, start["images"] - grad / 2, rtol=1e-4, atol=1e-6)


def test_ftd_averages_its_images_and_flattens_its_experts(dataset, experts):
    config, seen = FTD(**SMALL, ema_decay=0.8), []
    start = config.initial(dataset, make_net(), experts)["images"]
    found = run(config, dataset, experts, on_step=lambda state, record: seen.append(state["images"].clone()))
    for images in seen:
        start = 0.8 * start + 0.2 * images
    torch.testing.assert_close(found.images, start)
    assert config.expert_options(5) == {"sharpness": GSAM(0.01, 0.4, adaptive=True)}
    plain = run(MTT(**SMALL), dataset, experts)
    assert torch.equal(plain.images, seen[-1])


def test_ast_is_its_equations(dataset, experts):
    """Momentum, a perturbed start, an intermediate target, and the loss weighted by where the student starts."""
    config = AST(ipc=2, iterations=1, syn_steps=4, expert_epochs=2, max_start_epoch=2, lr_img=1.0, lr_teacher=0.01)
    records = []
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    start = config.initial(dataset, make_net(), config.check(dataset, make_net(), experts))
    # the draws, in their order
    generator = seeded_generator(0, Stream.OUTER_STEP, 0, 0)
    expert, epoch = int(torch.randint(2, (), generator=generator)), int(torch.randint(0, 2, (), generator=generator))
    assert (expert, epoch) == (records[0]["expert"], records[0]["start_epoch"])
    noise = torch.randn(experts.shape[2], generator=generator)
    theta0 = perturb_towards(experts[expert, epoch], noise, 1.0, FlatModule(make_net()))
    assert not torch.equal(theta0, experts[expert, epoch])
    late = epoch - 1
    scale = math.log(late + 8, 5) if late >= 0 else 1 / math.log(8 - late, 5)
    images = start["images"].clone().requires_grad_()

    def loss(found, labels):
        return scale * F.cross_entropy(found, labels)

    thetas = list(
        literal_student(theta0.clone().requires_grad_(), images, start["labels"], 0.01, 4, momentum=0.9, loss=loss)
    )
    total = distance(thetas[3], experts[expert, epoch + 2], theta0)
    total = total + distance(thetas[1], experts[expert, epoch + 1], theta0)
    assert records[0]["loss"] == pytest.approx(total.item(), rel=1e-4)
    (grad,) = torch.autograd.grad(total, images)
    torch.testing.assert_close(found.images, start["images"] - grad, rtol=1e-3, atol=1e-5)
    options = config.expert_options(3)
    assert options["smoothing"] == Smoothing(2.0, (0.5, 0.55, 0.6))
    assert (options["momentum"], options["weight_decay"]) == (0.9, 1e-3)


def test_ast_starts_from_the_images_nearest_to_the_centres(dataset, experts):
    config = AST(**SMALL)
    images, labels = config.initial_images(dataset, make_net(), config.check(dataset, make_net(), experts))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    real = {image.numpy().tobytes() for image in dataset.train_images}
    assert {image.numpy().tobytes() for image in images} <= real
    one = replace(config, ipc=1).initial_images(dataset, make_net(), config.check(dataset, make_net(), experts))[0]
    found = logits(experts[0, 2], dataset.train_images)
    for label in range(3):
        members = found[dataset.train_labels == label]
        nearest = (members - members.mean(0)).norm(dim=1).argmin()
        assert torch.equal(one[label], dataset.train_images[dataset.train_labels == label][nearest])


def test_datm_learns_its_labels(dataset, experts):
    config = DATM(ipc=2, iterations=1, syn_steps=3, max_start_epoch=2, expert_epochs=1, lr_img=1.0, lr_label=2.0)
    config, records = replace(config, lr_teacher=0.05, threshold=10.0), []
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    start = config.initial(dataset, make_net(), config.check(dataset, make_net(), experts))
    # images that the first expert gets right come first; labels are the mean logits of the experts that get them right
    assert (logits(experts[0, 2], start["images"]).argmax(1) == torch.tensor([0, 0, 1, 1, 2, 2])).all()
    each = torch.stack([logits(experts[e, 2], start["images"]) for e in (0, 1)])
    right = (each.argmax(2) == torch.tensor([0, 0, 1, 1, 2, 2])).float()[..., None]
    torch.testing.assert_close(start["labels"], ((each * right).sum(0) / right.sum(0)).detach())
    assert start.label_kind == "logits"
    images, labels = (start[name].clone().requires_grad_() for name in ("images", "labels"))
    trajectory = experts[records[0]["expert"], records[0]["start_epoch"] :]

    def soft(found, logits):
        return -(logits.softmax(1) * found.log_softmax(1)).sum() / len(found)

    *_, theta = literal_student(trajectory[0].clone().requires_grad_(), images, labels, 0.05, 3, loss=soft)
    d_images, d_labels = torch.autograd.grad(distance(theta, trajectory[1], trajectory[0]), (images, labels))
    torch.testing.assert_close(found.images, images - d_images, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.labels, labels - 2.0 * d_labels, rtol=1e-4, atol=1e-6)


def test_datm_skips_what_is_too_far_and_widens_its_range(dataset, experts):
    config, records = replace(CONFIGS["datm"], threshold=0.0), []
    start = config.initial(dataset, make_net(), config.check(dataset, make_net(), experts))
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    assert torch.equal(found.images, start["images"])
    assert torch.equal(found.labels, start["labels"])
    assert [record["counted"] for record in records] == [0] * 4
    config = DATM(max_start_epoch=20, first_max_start_epoch=10, expansion=1000)
    assert [config.last_start(it) for it in (0, 99, 100, 500, 1000, 5000)] == [10, 10, 11, 15, 20, 20]
    assert DATM(max_start_epoch=4).last_start(0) == 4


def test_fyi_sees_each_batch_twice(dataset, experts):
    config, records = FYI(ipc=1, iterations=1, syn_steps=3, lr_img=1.0, lr_teacher=0.05), []
    found = run(config, dataset, experts, on_step=lambda state, record: records.append(record))
    start = config.initial(dataset, make_net(), experts)
    images = start["images"].clone().requires_grad_()
    trajectory = experts[records[0]["expert"], records[0]["start_epoch"] :]
    both, labels = torch.cat([images, images.flip(3)]), torch.cat([start["labels"]] * 2)
    *_, theta = literal_student(trajectory[0].clone().requires_grad_(), both, labels, 0.05, 3)
    (grad,) = torch.autograd.grad(distance(theta, trajectory[2], trajectory[0]), images)
    torch.testing.assert_close(found.images, start["images"] - grad, rtol=1e-4, atol=1e-6)


def test_rat_bptt_differentiates_its_window(dataset):
    config = RaTBPTT(ipc=2, iterations=1, window=2, total=5, lr_inner=0.01, batch_real=45, lr_img=0.1, start="real")
    config, found = replace(config, batch_per_class=2), []
    run(config, dataset, None, on_step=lambda state, record: found.append((state, record)))
    (state, record), start = found[0], config.initial(dataset, make_net(), None)
    warmup = int(torch.randint(4, (), generator=seeded_generator(0, Stream.OUTER_STEP, 0, 0)))
    theta0 = fresh_parameters(make_net(), 0, Stream.OUTER_STEP_NET, 0, 0)
    assert theta0.std() > 0
    images = start["images"].clone().requires_grad_()
    options = {"steps": warmup + 2, "warmup": warmup, "optimizer": Adam()}
    theta = unroll(make_net(), theta0, images, start["labels"], 0.01, **options, mode="full")
    loss = F.cross_entropy(logits(theta, dataset.train_images), dataset.train_labels)
    (grad,) = torch.autograd.grad(loss, images)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-3)
    images = start["images"].clone().requires_grad_()
    images.grad = grad
    torch.optim.Adam([images], lr=0.1).step()
    moved = (state["images"] - start["images"]).flatten()
    assert F.cosine_similarity(moved, (images.detach() - start["images"]).flatten(), 0) > 0.99
    assert torch.equal(fresh_parameters(make_net(), 1), fresh_parameters(make_net(), 1))
    assert not torch.equal(fresh_parameters(make_net(), 1), fresh_parameters(make_net(), 2))


@pytest.mark.parametrize("whitened", [False, True])
def test_imported_experts_are_matched_on_images_like_those_that_they_saw(dataset, experts, tmp_path, whitened):
    """Replay buffers do not say whether their experts saw whitened images; the importer may say so."""
    shapes = [p.shape for p in make_net().parameters()]
    sizes = [shape.numel() for shape in shapes]
    split = [
        [[p.view(s).clone() for p, s in zip(row.split(sizes), shapes, strict=True)] for row in expert]
        for expert in experts
    ]
    source = tmp_path / "replay_buffer_0.pt"
    torch.save(split, source)
    data, config = dataset.whitened() if whitened else dataset, MTT(**SMALL, zca=whitened)

    def check(zca):
        with ExpertStore.import_replay_buffers([source], make_net(), tmp_path / "e", zca=zca, overwrite=True) as store:
            assert store.options == {"replay_buffers": ["replay_buffer_0.pt"]} | ({} if zca is None else {"zca": zca})
            config.check(data, make_net(), store)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(whitened)
    are = "ZCA-whitened" if whitened else "not whitened"
    with pytest.warns(UserWarning, match=rf"e: expected experts that saw images as these are, {are}; their import did"):
        check(None)
    with pytest.raises(ValueError, match=rf"images as these are, {are} \(zca={whitened}\), got .* zca={not whitened}"):
        check(not whitened)


def test_switches_and_choices_are_checked():
    with pytest.raises(ValueError, match="zca: expected True or False, got 'no'"):
        DC(zca="no")
