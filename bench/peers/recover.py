"""SRe2L's recover step in plain torch, and the BatchNorm statistics' match that it regularises with.

ResNet-18 in torchvision's layout, frozen; one resized crop, flip and roll for the whole batch of images;
cross entropy + 0.01 (10 r_1 + sum r_l) with r_l = |mean - running mean| + |var - running var| of each BatchNorm's
input; the gradient in the images, Adam (0.25; 0.5, 0.9), and a clip of each channel to the range of pixels. The
repository also computes a total variation and an L2 term, with weights of zero: omitted here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import BasicBlock, ResNet18

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRST, WEIGHT = 10.0, 0.01


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """As the repositories' hook computes it."""
    mean = x.mean([0, 2, 3])
    var = x.permute(1, 0, 2, 3).contiguous().reshape(x.shape[1], -1).var(1, unbiased=False)
    return torch.norm(running_var - var, 2) + torch.norm(running_mean - mean, 2)


def match_over_dimensions(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """The same for a compiler, which would otherwise write the copy to memory."""
    var, mean = torch.var_mean(x.float() if x.dtype == torch.bfloat16 else x, (0, 2, 3), correction=0)
    return (running_var - var).norm() + (running_mean - mean).norm()


class Recovered(NamedTuple):
    loss: Tensor  # []
    d_images: Tensor  # [B, 3, H, W]
    images: Tensor  # after the step


@dataclass(frozen=True)
class Recovery:
    net: ResNet18
    images: Tensor  # [B, 3, H, W], normalised
    labels: Tensor
    crop: tuple[int, int, int, int]  # top, left, height, width
    roll: tuple[int, int]

    def with_steps(self, rows: int) -> Recovery:
        """The first ``rows`` images: what memory is measured over."""
        return replace(self, images=self.images[:rows], labels=self.labels[:rows])

    def view(self, images: Tensor) -> Tensor:
        """The crop, flipped and rolled."""
        top, left, height, width = self.crop
        crop = images[:, :, top : top + height, left : left + width]
        crop = F.interpolate(crop, images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
        return torch.roll(crop.flip(3), self.roll, (2, 3))

    def double(self) -> Recovery:
        return replace(self, net=copy.deepcopy(self.net).double(), images=self.images.double())


def make_recovery(config: dict[str, Any], batch: int | None = None, dtype: torch.dtype = torch.float32) -> Recovery:
    """A frozen network whose running statistics are those of noise other than the images."""
    size, B = config["image_size"], batch or config["batch"]
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNet18(config["classes"], config["width"])
    for bn in batch_norms(net):
        bn.momentum = None  # a plain mean, of one batch
    with torch.no_grad():
        net.train()(0.7 * torch.randn(8, 3, size, size, generator=random) + 0.2)
    net.eval().requires_grad_(False)
    images = torch.randn(B, 3, size, size, generator=random)
    labels = torch.arange(B) % config["classes"]
    problem = Recovery(
        net, images, labels, (size // 8, size // 16, size * 3 // 4, size * 5 // 8), (size // 9, size // 14)
    )
    return problem.double() if dtype == torch.float64 else problem


Loss = Callable[[Tensor], Tensor]  # of the viewed images


def stepping(
    problem: Recovery, loss_of: Loss, fused: bool = True, view: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], Recovered]:
    """The step around a loss. ``fused``: Adam and the clip in one kernel each. ``view``: the problem's by default."""
    view = view or problem.view
    shape = (1, 3, 1, 1)
    like = {"dtype": problem.images.dtype, "device": problem.images.device}
    mean, std = (torch.tensor(values, **like).view(shape) for values in (MEAN, STD))
    low, high = -mean / std, (1 - mean) / std

    def run() -> Recovered:
        images = problem.images.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.9), eps=1e-8, fused=fused)
        loss = loss_of(view(images))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if fused:
                images.clamp_(low, high)
            else:
                for c in range(3):
                    images[:, c] = torch.clamp(images[:, c], low[0, c, 0, 0], high[0, c, 0, 0])
        return Recovered(loss.detach(), images.grad, images.detach())

    return run


def repository(problem: Recovery, half: bool = False) -> Callable[[], Recovered]:
    """Eager, NCHW, a forward hook on every BatchNorm."""
    net, terms = copy.deepcopy(problem.net), []
    for bn in batch_norms(net):
        bn.register_forward_hook(
            lambda module, inputs, _: terms.append(match(inputs[0], module.running_mean, module.running_var))
        )

    def loss_of(x: Tensor) -> Tensor:
        terms.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(net(x), problem.labels)
        return loss + WEIGHT * (FIRST * terms[0] + sum(terms[1:]))

    return stepping(problem, loss_of, fused=False)


def compiled(problem: Recovery, half: bool = False, channels_last: bool = True) -> Callable[[], Recovered]:
    """Network, statistics and loss in one graph for inductor."""
    torch._dynamo.config.recompile_limit = 64
    net = copy.deepcopy(problem.net)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)

    def normed(bn: nn.BatchNorm2d, x: Tensor, terms: list[Tensor]) -> Tensor:
        terms.append(match_over_dimensions(x, bn.running_mean, bn.running_var))
        return bn(x)

    def block(of: BasicBlock, x: Tensor, terms: list[Tensor]) -> Tensor:
        out = F.relu(normed(of.bn1, of.conv1(x), terms))
        out = normed(of.bn2, of.conv2(out), terms)
        if of.downsample is not None:
            x = normed(of.downsample[1], of.downsample[0](x), terms)
        return F.relu(out + x)

    @torch.compile(dynamic=False)
    def graph(x: Tensor, labels: Tensor) -> Tensor:
        terms: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            x = net.maxpool(F.relu(normed(net.bn1, net.conv1(x), terms)))
            for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
                for each in layer:
                    x = block(each, x, terms)
            loss = F.cross_entropy(net.fc(net.avgpool(x).flatten(1)), labels)
        return loss + WEIGHT * (FIRST * terms[0] + sum(terms[1:]))

    return stepping(problem, lambda x: graph(x.contiguous(memory_format=layout), problem.labels))


class Matched(NamedTuple):
    loss: Tensor  # []
    gradients: Sequence[Tensor]  # in each input


@dataclass(frozen=True)
class Inputs:
    """The inputs of a ResNet-18's BatchNorms, and their statistics."""

    x: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    def with_steps(self, rows: int) -> Inputs:
        return replace(self, x=tuple(t[:rows].detach().requires_grad_() for t in self.x))


def make_inputs(config: dict[str, Any], batch: int | None = None, dtype: torch.dtype = torch.float32) -> Inputs:
    """All inputs have the memory layout that convolutions leave: ``config["layout"]``."""
    size, B = config["image_size"], batch or config["batch"]
    random = torch.Generator().manual_seed(0)
    shapes = [(config["width"], size // 2)]
    for i in range(4):
        shapes += [(config["width"] * 2**i, size // 2 ** (i + 2))] * (4 if i == 0 else 5)
    format = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[config["layout"]]
    x = [torch.randn(B, C, s, s, generator=random).to(dtype).contiguous(memory_format=format) for C, s in shapes]
    means, variances = (
        tuple(0.5 * torch.rand(C, generator=random).to(dtype) + shift for C, _ in shapes) for shift in (0, 0.5)
    )
    return Inputs(tuple(t.requires_grad_() for t in x), means, variances)


def matching(inputs: Inputs, op: Callable[..., Tensor] = match, compile: bool = False) -> Callable[[], Matched]:
    """Forward of all inputs, then backward into all, as within a network."""

    def total(*x: Tensor) -> Tensor:
        return sum(map(op, x, inputs.means, inputs.variances))

    if compile:
        torch._dynamo.config.recompile_limit = 64
        total = torch.compile(total, dynamic=False)

    def run() -> Matched:
        loss = total(*inputs.x)
        return Matched(loss.detach(), torch.autograd.grad(loss, inputs.x))

    return run
