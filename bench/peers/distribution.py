"""Distribution matching in plain torch: an outer step's gradient as in DataDAM and DM, and the rows' discrepancy.

The compiled variants were chosen on a busy 2-core AVX2 CPU in fp32 (DataDAM, ConvNet-D3-128, 128 real and 10 synthetic
images per class, 32x32; the seconds are one outer gradient, 5.4 for the eager one):

    2.8-3.3  one graph each for the real and the synthetic side, channels-last, nn.GroupNorm
    3.1-3.6  the same with the norm written out; on a busier machine faster by a tenth              <- both are peers
    4.6-6.6  both sides in one graph, channels-last, norm written out
    4.7-4.9  one graph each, NCHW, norm written out
    5.9-8.6  one graph each, NCHW, nn.GroupNorm
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiled import instance_norm
from .plain_convnet import PlainConvNet

MAPS_WEIGHT, EMBEDDING_WEIGHT = 100.0, 100.0 * 0.01  # of DataDAM's two terms


class Matched(NamedTuple):
    loss: Tensor  # []
    d_images: Tensor  # of the synthetic images


Thunk = Callable[[], Matched]


@dataclass(frozen=True)
class Images:
    """Real and synthetic images, class by class, of equal size; a fresh network with frozen parameters."""

    net: PlainConvNet
    real: Tensor  # [K * R, C, H, W]
    synthetic: Tensor  # [K * S, C, H, W]
    classes: int
    power: float  # of the attention maps

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """The labels of the real and of the synthetic images."""
        numbers = torch.arange(self.classes, device=self.real.device)
        return tuple(numbers.repeat_interleave(len(x) // self.classes) for x in (self.real, self.synthetic))

    def double(self) -> Images:
        wide = {name: getattr(self, name).double() for name in ("real", "synthetic")}
        return replace(self, net=copy.deepcopy(self.net).double(), **wide)

    def blocks(self) -> Iterator[nn.Sequential]:
        """[convolution, norm, ReLU, pool], depth times."""
        layers = list(self.net.features)
        return (nn.Sequential(*layers[i : i + 4]) for i in range(0, len(layers), 4))


def make_images(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Images:
    """Drawn in float64 and rounded; classes differ in their mean, so that the distances are not mere noise."""
    K, C, size = config["classes"], config["channels"], config["image_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PlainConvNet(C, K, config["width"], config["depth"], size, **config.get("kind", {})).to(dtype)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(K, 1, C, size, size, generator=generator, dtype=torch.float64)
    real, synthetic = (
        (centres + torch.randn(K, each, C, size, size, generator=generator, dtype=torch.float64)).flatten(0, 1)
        for each in (config["real"], config["synthetic"])
    )
    return Images(net.requires_grad_(False), real.to(dtype), synthetic.to(dtype), K, config["power"])


# ---- DataDAM


def attention(f: Tensor, power: float) -> Tensor:
    """[B, C, H, W] -> [B, H * W], of length one."""
    return F.normalize((f.abs() ** power).sum(1).flatten(1), dim=1)


def eager_datadam(problem: Images) -> Thunk:
    """As in the repository: hooks that clone every ReLU's output, and class means that go through the host."""
    activations: list[Tensor] = []

    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        activations.clear()
        return problem.net.features(x).flatten(1), list(activations)

    def run() -> Matched:
        hooks = [
            layer.register_forward_hook(lambda module, args, out: activations.append(out.clone()))
            for layer in problem.net.features
            if isinstance(layer, nn.ReLU)
        ]
        try:
            synthetic = problem.synthetic.clone().requires_grad_()
            embedded_real, of_real = forward(problem.real)
            embedded_syn, of_syn = forward(synthetic)
        finally:
            for hook in hooks:
                hook.remove()
        loss = synthetic.new_zeros(())
        for f_real, f_syn in zip(of_real[:-1], of_syn[:-1], strict=True):
            a_real, a_syn = attention(f_real.detach(), problem.power), attention(f_syn, problem.power)
            mean_real = a_real.view(problem.classes, -1, a_real.shape[1]).mean(1).cpu()
            mean_syn = a_syn.view(problem.classes, -1, a_syn.shape[1]).mean(1).cpu()
            loss = loss + MAPS_WEIGHT * ((mean_real - mean_syn) ** 2).sum()
        mean_real = embedded_real.detach().view(problem.classes, -1, embedded_real.shape[1]).mean(1).cpu()
        mean_syn = embedded_syn.view(problem.classes, -1, embedded_syn.shape[1]).mean(1).cpu()
        loss = loss + EMBEDDING_WEIGHT * ((mean_real - mean_syn) ** 2).sum()
        (d_images,) = torch.autograd.grad(loss, synthetic)
        activations.clear()
        return Matched(loss.detach(), d_images)

    return run


def class_features(problem: Images, x: Tensor, *, maps: bool, classes: int, written_out: bool = False) -> list[Tensor]:
    """The class means of the attention maps of all blocks but the last (with ``maps``), and of the embedding."""
    found = []
    blocks = list(problem.blocks())
    for i, (convolution, norm, _, pool) in enumerate(blocks):
        x = convolution(x)
        over = (0, 2, 3) if isinstance(norm, nn.BatchNorm2d) else (2, 3)
        x = instance_norm(x, norm.weight, norm.bias, norm.eps, over) if written_out else norm(x)
        x = F.relu(x)
        if maps and i < len(blocks) - 1:
            found.append(attention(x.float() if x.dtype == torch.bfloat16 else x, problem.power))
        x = pool(x)
    found.append(x.flatten(1).to(problem.synthetic.dtype))
    return [f.view(classes, -1, f.shape[1]).mean(1) for f in found]


def distance(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
    weights = [MAPS_WEIGHT] * (len(real) - 1) + [EMBEDDING_WEIGHT]
    if len(real) == 1:  # distribution matching without attention
        weights = [1.0]
    terms = zip(weights, real, synthetic, strict=True)
    return torch.stack([weight * (a - b).square().sum() for weight, a, b in terms]).sum()


def truth(problem: Images, *, maps: bool) -> Matched:
    """In float64 by definition, the real images class by class if no norm couples them, to save memory."""
    problem = problem.double()
    joined = any(isinstance(layer, nn.BatchNorm2d) for layer in problem.net.features)
    with torch.no_grad():
        parts = [
            class_features(problem, x, maps=maps, classes=problem.classes if joined else 1)
            for x in ([problem.real] if joined else problem.real.chunk(problem.classes))
        ]
    real = [torch.cat(means) for means in zip(*parts, strict=True)]
    synthetic = problem.synthetic.clone().requires_grad_()
    loss = distance(real, class_features(problem, synthetic, maps=maps, classes=problem.classes))
    return Matched(loss.detach(), torch.autograd.grad(loss, synthetic)[0])


def compiled_matching(
    problem: Images,
    *,
    maps: bool,
    channels_last: bool = True,
    written_out: bool = True,
    one_graph: bool = False,
    half: bool = False,
) -> Thunk:
    """All classes at once, the class means by reshape.

    ``half``: the real images' forward pass under bf16 autocast, used as torch intends.
    """
    torch._dynamo.config.recompile_limit = 64
    layout = torch.channels_last if channels_last else torch.contiguous_format
    problem = replace(
        problem,
        real=problem.real.contiguous(memory_format=layout),
        net=problem.double().net.to(problem.real.dtype).to(memory_format=layout),
    )
    options = {"maps": maps, "classes": problem.classes, "written_out": written_out}

    def means_of_real(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return class_features(problem, x, **options)

    def loss_to(synthetic: Tensor, real: list[Tensor]) -> Tensor:
        return distance(real, class_features(problem, synthetic, **options))

    if one_graph:
        whole = torch.compile(lambda s, x: loss_to(s, means_of_real(x)), fullgraph=True, dynamic=False)
    else:
        of_real, of_synthetic = (torch.compile(f, fullgraph=True, dynamic=False) for f in (means_of_real, loss_to))

        def whole(s: Tensor, x: Tensor) -> Tensor:
            return of_synthetic(s, of_real(x))

    def run() -> Matched:
        synthetic = problem.synthetic.contiguous(memory_format=layout).clone().requires_grad_()
        loss = whole(synthetic, problem.real)
        return Matched(loss.detach(), torch.autograd.grad(loss, synthetic)[0])

    return run


# ---- DM


def eager_dm(problem: Images) -> Thunk:
    """As in the repository: class by class, one backward pass."""

    def run() -> Matched:
        synthetic = problem.synthetic.clone().requires_grad_()
        loss = synthetic.new_zeros(())
        for real, own in zip(problem.real.chunk(problem.classes), synthetic.chunk(problem.classes), strict=True):
            f_real = problem.net.features(real).flatten(1).detach()
            f_syn = problem.net.features(own).flatten(1)
            loss = loss + ((f_real.mean(0) - f_syn.mean(0)) ** 2).sum()
        return Matched(loss.detach(), torch.autograd.grad(loss, synthetic)[0])

    return run


# ---- MMD


class Discrepancy(NamedTuple):
    loss: Tensor  # []
    d_x: Tensor
    d_y: Tensor


@dataclass(frozen=True)
class Rows:
    x: Tensor  # [n, d]
    y: Tensor  # [n, d]

    def with_steps(self, rows: int) -> Rows:
        """The first rows of each side."""
        return Rows(self.x[:rows], self.y[:rows])

    def double(self) -> Rows:
        return Rows(self.x.double(), self.y.double())


def make_rows(config: dict[str, Any], rows: int | None = None, dtype: torch.dtype = torch.float32) -> Rows:
    """Features after a ReLU, of two domains."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, rows or config["rows"], config["features"])
    x, y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Rows(x.relu().to(dtype), (y + 0.1).relu().to(dtype))


def _sum_of_kernels(distances: Tensor, n: int) -> Tensor:
    """Five kernels, each with its own exponential, and the mean over the four blocks."""
    N = len(distances)
    bandwidth = distances.detach().sum() / (N**2 - N) / 2.0**2
    kernels = sum(torch.exp(-distances / (bandwidth * 2.0**i)) for i in range(5))
    return (kernels[:n, :n] + kernels[n:, n:] - kernels[:n, n:] - kernels[n:, :n]).mean()


def cube(x: Tensor, y: Tensor) -> Tensor:
    """As in FedLGD's repository: rows repeated into two cubes, their difference a third."""
    total = torch.cat([x, y])
    shape = (len(total), *total.shape)
    return _sum_of_kernels(((total.unsqueeze(0).expand(shape) - total.unsqueeze(1).expand(shape)) ** 2).sum(2), len(x))


def by_cdist(x: Tensor, y: Tensor, *, by_product: bool = True) -> Tensor:
    total = torch.cat([x, y])
    mode = "use_mm_for_euclid_dist" if by_product else "donot_use_mm_for_euclid_dist"
    return _sum_of_kernels(torch.cdist(total, total, compute_mode=mode).square(), len(x))


def autograd_mmd(problem: Rows, op: Callable[[Tensor, Tensor], Tensor], *, compiled: bool = False) -> Callable:
    """`op` and its gradients."""
    op = torch.compile(op, fullgraph=True, dynamic=False) if compiled else op

    def run() -> Discrepancy:
        x, y = (t.detach().requires_grad_() for t in (problem.x, problem.y))
        loss = op(x, y)
        return Discrepancy(loss.detach(), *torch.autograd.grad(loss, (x, y)))

    return run
