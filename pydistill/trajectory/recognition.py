"""Which modules are ConvNets of the student engine, and why another is none."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pydistill import _library
from pydistill.nn import Conv2d, ConvNet, InstanceNormReLUAvgPool
from pydistill.ops.convnet_step import ConvNetShape, convnet_logits

_log = logging.getLogger("pydistill")
_EPS = 1e-5
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

    The family: ``features``, an ``nn.Sequential`` of blocks 3x3 convolution with bias (padding 1, in the first block
    any), ``GroupNorm(C, C)`` (eps 1e-5, affine), ReLU, 2x2 average pool, possibly run through
    `pydistill.nn.accelerate`; then ``classifier``, an ``nn.Linear`` of the flattened features. A module of another
    class than `pydistill.nn.ConvNet` also has to give the engine's logits on a few random images; one that has done so
    answers for all of its class with the same layers and the same numbers and strings as attributes.
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
    parameters = [p for conv, norm in blocks for p in (conv.weight, conv.bias, norm.weight, norm.bias)]
    parameters += [classifier.weight, classifier.bias]
    own = list(net.parameters())
    if len(own) != len(parameters) or any(a is not b for a, b in zip(own, parameters, strict=True)):
        return "it has other parameters, or in another order, than its features and its classifier"
    if next(net.buffers(), None) is not None:
        return "it has buffers"
    try:
        shape = ConvNetShape(
            *image,
            tuple(conv.out_channels for conv, _ in blocks),
            blocks[0][0].padding[0],
            classifier.out_features,
            _EPS,
        )
    except ValueError as error:
        return str(error)
    channels = [image[0], *shape.widths]
    for i, (conv, _) in enumerate(blocks):
        if conv.in_channels != channels[i]:
            return f"its convolution {i} takes {conv.in_channels} channels, not {channels[i]}"
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


def _blocks(layers: list[nn.Module]) -> list[tuple[nn.Conv2d, nn.Module]] | str:
    blocks = []
    while layers:
        conv, norm, *layers = layers if len(layers) > 1 else (*layers, None)
        i = len(blocks)
        if type(conv) not in (nn.Conv2d, Conv2d):
            return f"block {i} begins with {type(conv).__name__}, not Conv2d"
        kinds = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        padding = conv.padding if i == 0 else (1, 1)
        if kinds != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding != padding or padding[0] != padding[-1]:
            return f"block {i} has {conv}, not a plain 3x3 convolution with padding 1"
        if conv.bias is None:
            return f"block {i}'s convolution has no bias"
        if isinstance(norm, InstanceNormReLUAvgPool):
            if not (norm.relu and norm.pool and norm.eps == _EPS):
                return f"block {i} has {norm}, not one with ReLU, pool and eps={_EPS}"
        else:
            plain = type(norm) is nn.GroupNorm and norm.num_groups == norm.num_channels and norm.affine
            if not plain or norm.eps != _EPS:
                return f"block {i} has {norm}, not GroupNorm(C, C) with eps={_EPS}"
            relu, pool, *layers = layers if len(layers) > 1 else (*layers, None, None)
            if type(relu) is not nn.ReLU:
                return f"block {i} has {relu}, not ReLU"
            settings = [getattr(pool, name, None) for name in ("kernel_size", "stride", "padding")]
            settings = [(v, v) if isinstance(v, int) else v for v in settings]
            plain = type(pool) is nn.AvgPool2d and not pool.ceil_mode and pool.divisor_override is None
            if not plain or settings != [(2, 2), (2, 2), (0, 0)]:
                return f"block {i} has {pool}, not AvgPool2d(2)"
        blocks.append((conv, norm))
    return blocks


def _same_logits(net: nn.Module, shape: ConvNetShape) -> bool:
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, shape.channels, shape.height, shape.width_px, generator=generator).to(parameter)
    with torch.no_grad(), torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        theta = torch.cat([p.flatten() for p in net.parameters()])[None]
        if theta.dtype not in (torch.float32, torch.float64):
            return False
        try:
            theirs = net(images)
        except Exception as error:
            _log.debug("net: its forward raised %r on random images", error)
            return False
        ours = convnet_logits(shape, theta, images)[0]
    tolerance = 1e-3 if theta.dtype == torch.float32 else 1e-8
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and bool((theirs - ours).norm() <= tolerance * (1 + ours.norm()))
    )
