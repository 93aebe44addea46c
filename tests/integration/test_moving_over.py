"""docs/moving_over.md: what a repository's loop leaves in `.grad` and what ours leaves, by the page's own code."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.augment import MultiCrop
from pydistill.ops.multi_crop import COLUMNS
from pydistill.trajectory import convnet_shape
from tests.augment.test_siamese import Parameters, repository_augment
from tests.trajectory.test_recognition import Reparam

PAGE = (Path(__file__).parents[2] / "docs/moving_over.md").read_text()
CLASSES, SIDE = 3, 8
Names = dict[str, Any]


def blocks(section: str) -> list[str]:
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return ["".join(line.removeprefix(indent) for line in code.splitlines(True)) for indent, code in found]


def pair(section: str) -> tuple[str, str]:
    before, after = blocks(section)
    return before, after


def swap(code: str, old: str, new: str) -> str:
    assert old in code, f"{old!r} is no longer on the page"
    return code.replace(old, new)


def run(code: str, make: Callable[[], Names]) -> dict[str, torch.Tensor]:
    """The gradients that ``code`` leaves in fresh names, and the buffers of their network."""
    names = make()
    torch.manual_seed(11)
    exec(compile(code, "<docs/moving_over.md>", "exec"), names)
    found = {name: names[name].grad for name in ("images", "label_logits", "lr") if name in names}
    return found | dict((names.get("student") or names["net"]).named_buffers())


def check(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert [name.removeprefix("module.") for name in before] == [name.removeprefix("module.") for name in after]
    for (name, truth), found in zip(before.items(), after.values(), strict=True):
        if truth.is_floating_point():
            assert truth.norm() > 1e-8, name
            assert (found - truth).norm() <= 1e-10 * truth.norm(), name
        else:
            assert torch.equal(found, truth), name


# ---- what the page's code expects to exist


class ConvNet(nn.Module):
    """As in the repositories."""

    def __init__(self, norm=lambda C: nn.GroupNorm(C, C), act=nn.ReLU, pool=nn.AvgPool2d, widths=(6, 6), both=False):
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm(width), act(), pool(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (SIDE >> len(widths)) ** 2, CLASSES)
        self.both = both

    def embed(self, x):
        return self.features(x).reshape(x.size(0), -1)

    def forward(self, x):
        embedding = self.features(x).reshape(x.size(0), -1)
        logits = self.classifier(embedding)
        return (embedding, logits) if self.both else logits


NETWORKS = {
    "instance": {},
    "batch": {"norm": nn.BatchNorm2d},
    "leaky, max": {"act": nn.LeakyReLU, "pool": nn.MaxPool2d},
    "group": {"norm": lambda C: nn.GroupNorm(2, C)},
    "FRePo": {"norm": nn.BatchNorm2d, "widths": (4, 8)},
}


def network(kind: str = "instance", **options) -> nn.Module:
    torch.manual_seed(1)
    net = ConvNet(**NETWORKS[kind], **options).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diff_augment_of_theirs(x, strategy, seed=-1, param=None):
    return x if strategy == "none" else repository_augment(x, strategy, seed, param)


COMMON = {"F": F, "nn": nn, "torch": torch, "pydistill": pydistill, "math": math}
COMMON |= {"DiffAugment": diff_augment_of_theirs, "param": Parameters()}


# ---- trajectories


def trajectory(net: nn.Module, steps: int, side: int = SIDE, strategy: str = "crop_cutout", **more: Any) -> Names:
    theta0 = nn.utils.parameters_to_vector(net.parameters()).detach()
    return {
        **COMMON,
        **{"student": Reparam(net), "theta0": theta0, "target": theta0 + 0.05 * normal(2, *theta0.shape)},
        **{"images": normal(3, 7, 3, side, side).requires_grad_(), "labels": torch.arange(7) % CLASSES},
        **{"lr": torch.tensor(0.05, dtype=torch.float64, requires_grad=True)},
        **{"T": steps, "batch_syn": 3, "strategy": strategy, **more},
    }


def with_batches(net: nn.Module, steps: int, **more: Any) -> Names:
    """``batches`` as the page draws them, for the sections that do not draw them in the loop."""
    names = trajectory(net, steps, **more)
    torch.manual_seed(4)
    exec(blocks("What holds for all")[0], names)
    assert [len(index) for index in names["batches"]] == [1, 3, 3, 1, 3][:steps]
    return names


def mtt_names(kind: str, steps: int, strategy: str) -> Names:
    return trajectory(network(kind), steps, strategy=strategy)


@pytest.mark.parametrize("kind", NETWORKS)
def test_mtt(kind):
    """Uneven batches: from one permutation with augmentation draws in between, and from several without."""
    assert pydistill.info.engine(network(kind), (3, SIDE, SIDE)).startswith("student")
    before, after = pair("MTT")
    for steps, strategy in ((3, "crop_cutout"), (5, "none")):
        make = functools.partial(mtt_names, kind, steps, strategy)
        found, ours = run(before, make), run(after, make)
        assert (len(found) > 2) == (kind in ("batch", "FRePo")), "running statistics are compared too"
        check(found, ours)


def test_a_batch_size_takes_the_small_batch_last():
    before, after = pair("MTT")
    other = run(swap(after, '"batches": chunks[:T]', '"batch_size": batch_syn'), lambda: trajectory(network(), 3))
    truth = run(before, lambda: trajectory(network(), 3))["images"]
    assert (other["images"] - truth).norm() > 1e-3 * truth.norm()


def test_mtt_on_several_gpus():
    """The rows that DataParallel scatters, and DataParallel itself."""
    before, after = pair("MTT")
    before = swap(before, "flat_param=theta[-1]", "flat_param=theta[-1].unsqueeze(0).expand(1, -1)")
    after = "student = nn.DataParallel(student)\n" + after
    check(*(run(code, lambda: trajectory(network(), 3)) for code in (before, after)))


def test_a_forward_with_two_outputs():
    before, after = pair("MTT")
    before = swap(before, "flat_param=theta[-1])", "flat_param=theta[-1])[1]")
    after = swap(after, '"steps": T', '"steps": T, "output": 1')
    check(*(run(code, lambda: trajectory(network(both=True), 3)) for code in (before, after)))


def test_texture_mode():
    more = {"side": 2 * SIDE, "H": SIDE, "W": SIDE, "pieces": 2}
    before, after = pair("MTT's texture mode")
    after = swap(after, '"steps": T', '"steps": T, "engine": "student"')
    check(*(run(code, lambda: with_batches(network(), 4, **more)) for code in (before, after)))


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_tesla(kind):
    """The published code's gradient, half of the formula's for the images; neither is the exact one."""
    before, after = pair("TESLA")
    found, ours = (run(code, lambda: with_batches(network(kind), 5)) for code in (before, after))
    check(found, ours)
    whole = swap(after, "images.grad /= 2", "pass")
    formula = run(whole, lambda: with_batches(network(kind), 5))
    check({"images": 2 * found["images"], "lr": found["lr"]}, formula)
    exact = run(swap(whole, '"first_order"', '"exact"'), lambda: with_batches(network(kind), 5))
    assert (exact["images"] - formula["images"]).norm() > 1e-3 * exact["images"].norm()


def labelled() -> Names:
    return with_batches(network(), 5, label_logits=normal(5, 7, CLASSES).requires_grad_())


def test_datm():
    check(*(run(code, labelled) for code in pair("DATM")))


def smooth(goals: int = 1) -> Names:
    names = with_batches(network(), 5, momentum=0.9, balance=math.log(11, 5))
    names["between"] = {2: names["theta0"] + 0.05 * normal(6, *names["theta0"].shape)} if goals else {}
    return names


def test_ast():
    check(*(run(code, smooth) for code in pair("FTD and AST")))


def test_ast_without_the_first_steps_graphs():
    """--ignore_graph, here of all but the last two steps."""
    before, after = pair("FTD and AST")
    before = swap(before, "theta[-1], create_graph=True)", "theta[-1], create_graph=step > T - 2)")
    after = swap(after, '"steps": T', '"steps": T, "warmup": T - 2')
    found, ours = (run(code, lambda: smooth(goals=0))["images"] for code in (before, after))
    check({"images": found}, {"images": ours})


# ---- matching of gradients, means and attention


def match_loss(syn, real, args):
    """Row by row for parameters with rows, ignoring those of one dimension; or for all parameters joined."""
    if args.dis_metric != "ours":
        s, r = (torch.cat([g.flatten() for g in side]) for side in (syn, real))
        return (s - r).square().sum() if args.dis_metric == "mse" else 1 - (s @ r) / (s.norm() * r.norm() + 1e-6)
    rows = [(s.flatten(1), r.flatten(1)) for s, r in zip(syn, real, strict=True) if s.dim() > 1]
    return sum((1 - (s * r).sum(1) / (s.norm(dim=1) * r.norm(dim=1) + 1e-6)).sum() for s, r in rows)


def get_attention(f, param, exp, norm):
    assert (param, norm) == (1, "l2")
    maps = f.abs().pow(exp).sum(1).flatten(1)
    return maps / maps.norm(dim=1, keepdim=True)


def classwise(net: nn.Module, metric: str = "ours") -> Names:
    """DC's, DSA's, DM's and DataDAM's; the clock is reset, as seeds come from it."""
    real, ticks = normal(7, CLASSES, 4, 3, SIDE, SIDE), itertools.count(1)
    images = normal(8, 2 * CLASSES, 3, SIDE, SIDE).requires_grad_()
    return {
        **COMMON,
        **{"net": net, "images": images, "labels": torch.arange(CLASSES).repeat_interleave(2)},
        **{"num_classes": CLASSES, "ipc": 2, "batch_real": 4, "strategy": "crop_cutout_flip", "task_balance": 0.01},
        **{
            "get_images": lambda c, n: real[c, :n],
            "match_loss": match_loss,
            "args": SimpleNamespace(dis_metric=metric),
        },
        **{"time": SimpleNamespace(time=lambda: 0.123 * next(ticks)), "get_attention": get_attention},
        **{"real": real.flatten(0, 1), "real_labels": torch.arange(CLASSES).repeat_interleave(4), "syn": images * 1},
    }


def with_frozen_statistics() -> nn.Module:
    net = network("batch")
    net(normal(9, 9, 3, SIDE, SIDE))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@pytest.mark.parametrize("make", [network, with_frozen_statistics])
@pytest.mark.parametrize("method", ["DC", "DSA"])
def test_gradient_matching(method, make):
    codes = pair("DC and DSA")
    if method == "DC":
        codes = [re.sub(r"^( +)(seed = |.* = \(.*iff_?[aA]ugment).*", r"\1pass", code, flags=re.M) for code in codes]
        assert not any("ugment" in code for code in codes)
    check(*(run(code, lambda: classwise(make())) for code in codes))


@pytest.mark.parametrize("metric", ["mse", "cos"])
def test_other_distances_of_gradients(metric):
    before, after = pair("DC and DSA")
    after = swap(after, "shapes=", f'kind="{metric}", shapes=')
    check(*(run(code, lambda: classwise(network(), metric)) for code in (before, after)))


def test_the_seeds_of_augmentations_are_used():
    """Another clock gives another gradient, so the blocks above agree because of their seeds."""
    before, after = pair("DC and DSA")
    later = run("time.time()\n" + after, lambda: classwise(network()))["images"]
    truth = run(before, lambda: classwise(network()))["images"]
    assert (later - truth).norm() > 1e-3 * truth.norm()


def test_dm():
    check(*(run(code, lambda: classwise(network())) for code in pair("DM")))


def test_dm_with_batchnorm():
    """All classes in one batch, and the mean of each; ours leaves the network's buffers unchanged."""
    _, after = pair("DM")
    joined = """
f_real, f_syn = net.embed(real).detach(), net.embed(syn)
means = [f.reshape(num_classes, -1, f.shape[1]).mean(1) for f in (f_real, f_syn)]
(means[0] - means[1]).square().sum().backward()
"""
    found, ours = (run(code, lambda: classwise(network("batch")))["images"] for code in (joined, after))
    check({"images": found}, {"images": ours})


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_datadam(kind):
    def make():
        return classwise(network(kind, both=True))

    assert convnet_shape(make()["net"], (3, SIDE, SIDE), torch.float64, output="any").numel > 0
    found, ours = (run(code, make)["images"] for code in pair("DataDAM"))
    check({"images": found}, {"images": ours})


# ---- recovery


class BNFeatureHook:
    def __init__(self, module, r_var=1.0):
        self.r_var = r_var
        module.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        x = inputs[0]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.r_feature = (module.running_mean - mean).norm() + self.r_var * (module.running_var - var).norm()


def crop_flip_roll(images, low):
    """For the whole batch, with the numbers that the page's MultiCrop draws from a generator with the same seed."""
    crops = MultiCrop(SIDE, scale=(low, 1.0), roll=2, shared=True)
    drawn = dict(zip(COLUMNS, crops.draw(images.shape, torch.Generator().manual_seed(12))[0, 0].tolist(), strict=True))
    top, left, height, width, down, across = (
        int(drawn[name]) for name in ("top", "left", "height", "width", "roll_y", "roll_x")
    )
    x = images[:, :, top : top + height, left : left + width]
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return (x.flip(3) if drawn["flip"] else x).roll((down, across), (2, 3))


def ascend(net, length):
    parameters = [p for p in net.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.data += length / (norm + 1e-12) * p.grad
        p.grad = None


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def clip(images):
    bounds = [(-m / s, (1 - m) / s) for m, s in zip(MEAN, STD, strict=True)]
    return torch.stack([images[:, c].clamp(*bound) for c, bound in enumerate(bounds)], 1)


def recovery(iteration: int | None = None) -> Names:
    return {
        **COMMON,
        **{"net": with_frozen_statistics().eval(), "labels": torch.arange(6) % CLASSES, "low": 0.3, "side": SIDE},
        **{"images": normal(10, 6, 3, SIDE, SIDE).requires_grad_(), "generator": torch.Generator().manual_seed(12)},
        **{"first_bn_multiplier": 10.0, "r_bn": 0.1, "r_var": 11.0, "rho": 0.5, "ascent_steps": 3, "jitter": 2},
        **{"BNFeatureHook": BNFeatureHook, "crop_flip_roll": crop_flip_roll, "ascend": ascend, "clip": clip},
        **{"mean": MEAN, "std": STD, "i": iteration, "iterations": 100, "milestone": 0.8},
    }


def test_sre2l():
    """The gradient, and the images after they are clipped."""
    both = "images = SimpleNamespace(grad=torch.cat([images.grad, images.detach()]))\n"
    codes = [f"from types import SimpleNamespace\n{code}{both}" for code in pair("SRe2L")]
    check(*(run(code, recovery) for code in codes))
    assert not torch.equal(clip(recovery()["images"]), recovery()["images"])


@pytest.mark.parametrize("iteration", [0, 30, 79, 80, 99])
def test_cda(iteration):
    """The least crop, and SRe2L's step with it."""
    lowest = []
    for code in pair("CDA"):
        names = recovery(iteration)
        exec(code, names)
        lowest.append(names["low"])
    assert lowest[0] == pytest.approx(lowest[1], rel=1e-15)
    codes = [crop + step for crop, step in zip(pair("CDA"), pair("SRe2L"), strict=True)]
    check(*(run(code, lambda: recovery(iteration)) for code in codes))


def test_dwa():
    check(*(run(code, recovery) for code in pair("DWA")))


def test_links():
    """Every link to the page, and every section has its two blocks of at most fifteen lines."""
    root = Path(__file__).parents[2]
    assert "(docs/moving_over.md)" in (root / "README.md").read_text()
    assert "(moving_over.md)" in (root / "docs/methods.md").read_text()
    sections = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    for section in sections[1:-1]:
        assert len(pair(section)) == 2
        assert max(len(code.splitlines()) for code in pair(section)) <= 15, section
