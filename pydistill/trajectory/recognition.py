"""Which modules are ConvNets of the student engine, and why another is none."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pydistill import _library
from pydistill.nn import Conv2d, ConvNet, InstanceNormReLUAvgPool
from pydistill.ops.convnet_step import ConvNetShape, convnet_logits
from pydistill.trajectory.kept_statistics import KeptStatistics

_log = logging.getLogger("pydistill")
_MAX_DEPTH = 8  # of the compiled step
_MAX_AGREED = 64

# foreign modules that gave the engine's logits, as all that their forward can depend on beside their parameters
_agreed: set[tuple] = set()


def trains_at_once(net: nn.Module, images: Tensor) -> bool:
    """Whether students like ``net`` train on ``images`` at once: then they share all but parameters and data."""
    return isinstance(convnet_shape(net, images.shape[-3:], images.dtype, images.device), ConvNetShape)


def convnet_shape(
    net: nn.Module, image: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ConvNetShape | str:
    """The shape of ``net`` as a ConvNet of the student engine on images ``[C, H, W]``, or why it is none.

    The family: ``features``, an ``nn.Sequential`` of blocks 3x3 convolution (padding 1, in the first block any), norm,
    activation, 2x2 pool, possibly run through `pydistill.nn.accelerate`; then ``classifier``, an ``nn.Linear`` of the
    flattened features. All blocks are alike but for their widths. Norms: ``GroupNorm``, ``InstanceNorm2d``,
    ``BatchNorm2d`` and ``LayerNorm([C, H, W])``, with affine parameters, or none; activations: ``ReLU``, ``LeakyReLU``,
    ``Sigmoid``, ``Tanh`` and ``SiLU``; pools: ``AvgPool2d(2)``, ``MaxPool2d(2)`` or none; convolutions with or without
    biases. On CUDA devices: ``GroupNorm(C, C)``, ReLU, average pool and biases.

    A module of another class than `pydistill.nn.ConvNet` also has to give the engine's logits on a few random images;
    one that has done so answers for all of its class with the same layers and the same numbers and strings as
    attributes.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"there is no student engine on {device.type}"
    if device.type == "cuda" and (missing := _library.unavailable("cuda")):
        return f"the student engine's CUDA kernels cannot run: {missing}"
    if dtype not in (torch.float32, torch.float64):
        return f"the student engine computes in float32 and float64, not {dtype}"
    features, classifier = getattr(net, "features", None), getattr(net, "classifier", None)
    if type(features) is not nn.Sequential or type(classifier) is not nn.Linear:
        return "it has no nn.Sequential `features` followed by an nn.Linear `classifier`"
    for module in net.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return f"{type(module).__name__} has hooks"
    blocks = _blocks([layer for layer in features if type(layer) is not nn.Identity])
    if isinstance(blocks, str):
        return blocks
    if not blocks or len(blocks) > _MAX_DEPTH:
        return f"it has {len(blocks)} blocks, not 1 to {_MAX_DEPTH}"
    if classifier.bias is None:
        return "its classifier has no bias"
    for i, block in enumerate(blocks):
        if block.kind != blocks[0].kind:
            return f"block {i} is {dict(block.kind)}, block 0 {dict(blocks[0].kind)}"
    kind = dict(blocks[0].kind)
    parameters = [p for block in blocks for layer in (block.conv, block.norm) for p in _parameters(layer)]
    own = list(net.parameters())
    if [id(p) for p in own] != [id(p) for p in (*parameters, classifier.weight, classifier.bias)]:
        return "it has other parameters, or in another order, than its features and its classifier"
    kept = [b for block in blocks if isinstance(block.norm, nn.BatchNorm2d) for b in block.norm.buffers()]
    if {id(b) for b in net.buffers()} != {id(b) for b in kept}:
        return "it has other buffers than those of BatchNorm"
    try:
        shape = ConvNetShape(
            *image,
            tuple(block.conv.out_channels for block in blocks),
            blocks[0].conv.padding[0],
            classifier.out_features,
            **kind,
        )
    except ValueError as error:
        return str(error)
    if device.type == "cuda" and not (shape.fused and shape.biased):
        return "its CUDA kernels are for GroupNorm(C, C), ReLU, average pool and convolutions with biases"
    channels = [image[0], *shape.widths]
    for i, (block, layer) in enumerate(zip(blocks, shape.layers, strict=True)):
        if block.conv.in_channels != channels[i]:
            return f"its convolution {i} takes {block.conv.in_channels} channels, not {channels[i]}"
        size = (layer.out_channels, layer.height, layer.width)
        if isinstance(block.norm, nn.LayerNorm) and block.norm.normalized_shape != size:
            own = list(block.norm.normalized_shape)
            return f"its norm {i} is one of {own}, where {list(image)} images give {list(size)}"
    if classifier.in_features != shape.features:
        return (
            f"its classifier takes {classifier.in_features} features where {list(image)} images give {shape.features}"
        )
    if type(net) is not ConvNet:
        own = {name: value for name, value in vars(net).items() if not name.startswith("_")}
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in own.values())
        kind = (type(net), type(net).forward, repr(net), tuple(own.items()), shape, dtype, device) if plain else None
        if kind is None or kind not in _agreed:
            if not _same_logits(net, shape):
                return f"{type(net).__name__}.forward computes something else than classifier(flatten(features(x)))"
            if len(_agreed) == _MAX_AGREED:
                _agreed.clear()
            if kind is not None:
                _agreed.add(kind)
    return shape


class _Block(NamedTuple):
    conv: nn.Conv2d
    norm: nn.Module | None
    kind: tuple[tuple[str, Any], ...]  # fields of `ConvNetShape`


_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.SiLU: "swish"}
_POOLS = {nn.AvgPool2d: "avg", nn.MaxPool2d: "max"}
_NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm2d, nn.LayerNorm, InstanceNormReLUAvgPool)


def _blocks(layers: list[nn.Module]) -> list[_Block] | str:
    blocks: list[_Block] = []
    rest = collections.deque(layers)

    def take(*types: type) -> nn.Module | None:
        return rest.popleft() if rest and type(rest[0]) in types else None

    while rest:
        i, conv = len(blocks), rest.popleft()
        if type(conv) not in (nn.Conv2d, Conv2d):
            return f"block {i} begins with {type(conv).__name__}, not Conv2d"
        settings = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        padding = conv.padding if i == 0 else (1, 1)
        if settings != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding != padding or padding[0] != padding[-1]:
            return f"block {i} has {conv}, not a plain 3x3 convolution with padding 1"
        kind: dict[str, Any] = {"biased": conv.bias is not None}
        norm = take(*_NORMS)
        of_norm = _norm_kind(norm, conv.out_channels)
        if isinstance(of_norm, str):
            return f"block {i} has {norm}, {of_norm}"
        kind |= of_norm
        fused = isinstance(norm, InstanceNormReLUAvgPool)
        with_relu, with_pool = fused and norm.relu, fused and norm.pool
        if with_pool and not with_relu:
            return f"block {i} has {norm}, which pools before there is an activation"
        activation = None if with_relu else take(*_ACTIVATIONS)
        if activation is None and not with_relu:
            found = type(rest[0]).__name__ if rest else "nothing"
            return f"block {i} has {found} where a norm or an activation was expected"
        kind["activation"] = "relu" if with_relu else _ACTIVATIONS[type(activation)]
        if isinstance(activation, nn.LeakyReLU):
            kind["slope"] = activation.negative_slope
        pool = None if with_pool else take(*_POOLS)
        if pool is not None:
            sizes = [getattr(pool, name) for name in ("kernel_size", "stride", "padding")]
            sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in sizes]
            others = (pool.ceil_mode, getattr(pool, "divisor_override", None), getattr(pool, "return_indices", False))
            if sizes != [(2, 2), (2, 2), (0, 0)] or others != (False, None, False) or getattr(pool, "dilation", 1) != 1:
                return f"block {i} has {pool}, not a 2x2 pool"
        kind["pool"] = "avg" if with_pool else "none" if pool is None else _POOLS[type(pool)]
        blocks.append(_Block(conv, norm, tuple(sorted(kind.items()))))
    return blocks


def _norm_kind(norm: nn.Module | None, channels: int) -> dict[str, Any] | str:
    """The fields of `ConvNetShape`, or what is wrong with it."""
    if norm is None:
        return {"norm": "none"}
    if any(getattr(norm, name, None) is None for name in ("weight", "bias")):
        return "which has no affine parameters"
    kind: dict[str, Any] = {"eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        return kind | {"norm": "layer"}
    if isinstance(norm, InstanceNormReLUAvgPool):
        sizes, kind["norm"] = len(norm.weight), "instance"
    elif isinstance(norm, nn.GroupNorm):
        sizes, kind["norm"] = norm.num_channels, "instance"
        if norm.num_groups != norm.num_channels:
            kind |= {"norm": "group", "groups": norm.num_groups}
    elif isinstance(norm, nn.BatchNorm2d):
        sizes = norm.num_features
        kind["norm"] = "batch" if norm.training or norm.running_mean is None else "running"
    else:
        sizes = norm.num_features
        if norm.track_running_stats:
            return "which keeps running statistics"
        kind["norm"] = "instance"
    return kind if sizes == channels else f"not one of {channels} channels"


def _parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    return [] if layer is None else list(layer.parameters(recurse=False))


def _same_logits(net: nn.Module, shape: ConvNetShape) -> bool:
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, shape.channels, shape.height, shape.width_px, generator=generator).to(parameter)
    with torch.no_grad(), torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        theta = torch.cat([p.flatten() for p in net.parameters()])[None]
        if theta.dtype not in (torch.float32, torch.float64):
            return False
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        running = KeptStatistics(net).running() if shape.norm == "running" else None
        try:
            theirs = functional_call(net, buffers, (images,))
        except Exception as error:
            _log.debug("net: its forward raised %r on random images", error)
            return False
        ours = convnet_logits(shape, theta, images, running=running)[0]
    tolerance = 1e-3 if theta.dtype == torch.float32 else 1e-8
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and bool((theirs - ours).norm() <= tolerance * (1 + ours.norm()))
    )
