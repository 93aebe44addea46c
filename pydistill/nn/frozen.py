"""Frozen evaluation networks: synthetic images are recovered from them, and their weights never change."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pydistill.nn import _what_runs as what_runs
from pydistill.ops import FrozenFilters, frozen_conv2d, frozen_filters, max_pool2d
from pydistill.ops.max_pool2d import MAX_KERNEL

_log = logging.getLogger("pydistill")
MIN_CHANNELS = 32  # in and out: with fewer, transforming tiles costs more than the products that it saves
# in times out, with stride 2: for more, reading the filters, 32 times the size of the weight, takes too long
MAX_STRIDED = 128 * 256


class _KeepingConv2d(nn.Conv2d):
    """A convolution that caches what is computed from its weight until the weight is written to."""

    _made: tuple[Any, Tensor, Any] | None = None  # the key, the weight, and the cached result

    def _made_of_weight(self, dtype: torch.dtype, make: Callable[[Tensor], Any]) -> Any:
        """``make(weight)`` for inputs of ``dtype``, computed if not cached."""
        weight = self.weight
        made_of = (weight.data_ptr(), weight._version, weight.dtype, dtype)
        if self._made is None or self._made[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():
                # holding on to the weight's memory means that no later weight can have the same address
                self._made = (made_of, weight.detach(), make(weight.detach()))
        return self._made[2]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_made"}  # large, and quickly recomputed


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on and rounds this tensor for a convolution: float64 stays as it is."""
    return torch.is_autocast_enabled("cpu") and tensor.is_floating_point() and tensor.dtype != torch.float64


class FrozenConv2d(_KeepingConv2d):
    """An ``nn.Conv2d`` of constant weights on `pydistill.ops.frozen_conv2d`.

    It has 3x3 filters with stride 1 or 2 and padding 1, or 7x7 with stride 2 and padding 3, and no groups or dilation.
    On the CPU the filters are transformed on first use, and again after the weight was written to (except through
    ``.data``, which torch does not track) or for inputs of another dtype; they take eight times the
    memory of the weight, 32 times for 3x3 with stride 2 (half as much for bfloat16 inputs), and are neither parameters
    nor in the ``state_dict``. On other devices it is torch's own convolution (cuDNN on CUDA). The output is in
    channels-last memory. Under autocast the input is cast as by ``nn.Conv2d``; the weight is not rounded.

    Raises:
        ValueError: in forward, if the weight requires a gradient (there is none), or the input does not fit.
    """

    def filters(self, dtype: torch.dtype | None = None) -> FrozenFilters:
        """The transformed filters for inputs of ``dtype`` (the weight's by default), computed if not cached."""
        weight = self.weight
        if weight.requires_grad:
            raise ValueError(
                "weight: expected frozen filters, got a parameter that requires a gradient; there is none, "
                "so freeze it (requires_grad_(False)) or use nn.Conv2d"
            )
        wanted = dtype or weight.dtype
        return self._made_of_weight(wanted, partial(frozen_filters, dtype=wanted, stride=self.stride[0]))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        weight, halved = self.weight.dtype, _is_cast(x) and _is_cast(self.weight)
        if not halved and x.dtype != weight:
            raise ValueError(f"x: expected {weight} as the weight, got {x.dtype}")
        if halved:
            x = x.to(torch.get_autocast_dtype("cpu"))
        y = frozen_conv2d(x, self.filters(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class _OtherConv2d(_KeepingConv2d):
    """torch's convolution, also under autocast, where it caches its rounded weight. On a processor without convolutions
    in half precision, torch's takes many times as long as in float32, which is then used between the two roundings."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not (_is_cast(x) and _is_cast(self.weight)):
            return super().forward(x)
        half = torch.get_autocast_dtype("cpu")
        if not _has_convolution(half):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(half).to(self.weight.dtype)).to(half)
        if self.weight.requires_grad:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            weight = self._made_of_weight(half, lambda weight: weight.to(half))
            return self._conv_forward(x.to(half), weight, None if self.bias is None else self.bias.to(half))


class _MaxPool2d(nn.MaxPool2d):
    """torch's max pooling of batches of images, on `pydistill.ops.max_pool2d` on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dim() != 4 or not x.is_floating_point():
            return super().forward(x)
        sizes = tuple(_side(value) for value in (self.kernel_size, self.stride, self.padding))
        return max_pool2d(x, *cast(tuple[int, int, int], sizes))


POOLINGS = (nn.MaxPool2d, _MaxPool2d)
# modules whose output is a new tensor that depends only on their input
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, FrozenConv2d, _OtherConv2d)


def pooling_of(module: nn.Module) -> tuple[int, int, int] | None:
    """Kernel, stride and padding of a max pooling that `pydistill.ops.max_pool2d` supports; None for other modules."""
    if what_runs.why_not_plain(module, *POOLINGS) is not None or module.ceil_mode or module.return_indices:
        return None
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel, stride, padding, dilation = (_side(value) for value in sizes)
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    fits = 1 <= kernel <= MAX_KERNEL and stride >= 1 and 0 <= 2 * padding <= kernel and dilation == 1
    return (kernel, stride, padding) if fits else None


def _side(value: Any) -> int | None:
    """The side of a square, given as torch's modules take it; None if it is not a square."""
    sides = set(value) if isinstance(value, (tuple, list)) else {value}
    side = sides.pop() if len(sides) == 1 else None
    return side if type(side) is int else None


def _has_convolution(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch have convolutions in a half precision."""
    if not torch.backends.mkldnn.is_available():  # then its operators do not even exist
        return False
    library = torch.ops.mkldnn
    return (library._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else library._is_mkldnn_fp16_supported)()


def freeze(model: nn.Module) -> nn.Module:
    """A frozen copy of an evaluation network, faster on the CPU in its forward pass and its gradient to the images.

    The copy is in eval mode and in channels-last memory, and none of its parameters requires a gradient. Every 3x3
    ``nn.Conv2d`` with stride 1, padding 1, no groups and no dilation, and at least `MIN_CHANNELS` channels in and out,
    becomes a `FrozenConv2d`; so does one with stride 2 whose channels in times out are at most `MAX_STRIDED`, and a
    ResNet's 7x7 stem (stride 2, padding 3) to as many channels; others stay torch's
    (under autocast in float32 if the processor has no convolution in half precision, for which torch's takes many
    times as long). Every ``nn.MaxPool2d`` with square windows of side at most 15, no dilation, ``ceil_mode`` or
    indices pools on `pydistill.ops.max_pool2d`, with equal bits. Hooks stay where they are and are called as before;
    subclasses of these modules, and instances on which something was set, compute what they did before.
    ``state_dict`` keys and values are those of ``model``, which itself is unchanged. Give it channels-last images
    for best speed. `frozen_convolutions` tells which convolutions were replaced and why others were not; the logger
    "pydistill" says how many, as a warning if there are none: depthwise and 1x1 convolutions, which networks like
    MobileNet are made of, gain nothing.

    On other devices convolutions and poolings are torch's own: what `freeze` gives there is the layout, which a GPU's
    matrix units take (under autocast, or with TF32 allowed), and no gradients of weights.

    Equivalent to ``copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)``.

    Args:
        model: the network.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or a `BNStatMatcher` is attached to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False):  # tensors made in it do not track writes
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        # like .to(memory_format=torch.channels_last), which raises for tensors that are not images
        frozen._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    _say(frozen_convolutions(frozen), {p.device.type for p in frozen.parameters()} - {"cpu"})
    for module in frozen.modules():
        if is_replaced(module):
            module.__class__ = FrozenConv2d  # same state; only forward differs
        elif what_runs.why_not_plain(module, nn.Conv2d) is None:
            module.__class__ = _OtherConv2d
        elif pooling_of(module) is not None:
            module.__class__ = _MaxPool2d
    return frozen


def frozen_convolutions(model: nn.Module) -> dict[str, str]:
    """For each ``nn.Conv2d`` of a network, before or after `freeze`, by name: "frozen" or why it is left to torch."""
    return {
        name: _why_not_replaced(module) or "frozen"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def is_replaced(module: nn.Module) -> bool:
    """Whether `freeze` puts a `FrozenConv2d` in this module's place."""
    return isinstance(module, nn.Conv2d) and _why_not_replaced(module) is None


def _why_not_replaced(module: nn.Conv2d) -> str | None:
    if (why := what_runs.why_not_plain(module, nn.Conv2d, FrozenConv2d, _OtherConv2d)) is not None:
        return why
    if module._parameters.get("weight") is None:
        return "its weight is no parameter, but made anew in each call"
    if module.padding_mode != "zeros":
        return f"it pads with padding_mode={module.padding_mode!r}"
    if module.groups != 1:
        return "it has groups"
    if module.dilation != (1, 1):
        return "it is dilated"
    C, K = module.in_channels, module.out_channels
    form = (module.kernel_size, module.stride, module.padding)
    if form == ((7, 7), (2, 2), (3, 3)):
        return None if K >= MIN_CHANNELS else f"it has fewer than {MIN_CHANNELS} channels"
    if form not in (((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1))):
        (H, W), (stride, _), padding = form
        return f"it is {H}x{W} with stride {stride} and padding {padding if isinstance(padding, str) else padding[0]}"
    if min(C, K) < MIN_CHANNELS:
        return f"it has fewer than {MIN_CHANNELS} channels"
    return None if module.stride == (1, 1) or C * K <= MAX_STRIDED else "it has a stride and too many channels"


def _say(convolutions: dict[str, str], elsewhere: set[str]) -> None:
    if elsewhere:
        where = ", ".join(sorted(elsewhere))
        _log.info("freeze: on %s all %d convolutions run as torch's own, channels-last", where, len(convolutions))
        return
    counts = Counter(convolutions.values())
    frozen = counts.pop("frozen", 0)
    reasons = "; ".join(f"{count}: {why}" for why, count in counts.most_common())
    level = logging.INFO if frozen or not convolutions else logging.WARNING
    _log.log(
        level,
        "freeze: %d of %d convolutions run on frozen filters%s",
        frozen,
        len(convolutions),
        reasons and f" ({reasons})",
    )
