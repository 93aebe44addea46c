"""The precision that a method's networks run in: torch's switches for TF32, autocast, and the scale of float16 losses.

What a precision rounds are the factors of a network's convolutions and matrix products, and in "bf16" and "fp16" what
its layers hand on. Images and the steps on them, losses, the statistics of BatchNorms, weights, and what optimisers and
files hold of all that, are float32 in every precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pydistill.methods.method import OptionError

__all__ = ["Precision", "Rounding", "check_precision", "rounded"]

Precision = Literal["ieee", "tf32", "bf16", "fp16"]
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str | None, device: torch.device | None = None) -> None:
    """`OptionError` for a precision that does not exist, or that ``device`` does not have; None is torch's own."""
    if precision is not None and precision not in get_args(Precision):
        raise OptionError("precision", f"expected None or one of {', '.join(get_args(Precision))}, got {precision!r}")
    if device is not None and device.type != "cuda" and precision in ("tf32", "fp16"):
        where = "the CPU" if device.type == "cpu" else device.type
        raise OptionError("precision", f"expected ieee or bf16 on {where}, got {precision}: it takes a CUDA device")


class Rounding:
    """A precision on a device, as `rounded` yields it.

    Attributes:
        fused: for an optimiser whose gradients a `scaler` scales: fused, it does not make the host wait for the answer
            to whether they are finite. None where nothing is scaled: as torch chooses.
    """

    def __init__(self, precision: str | None, device: torch.device):
        check_precision(precision, device)
        self._device, self._half = device, _HALVES.get(precision or "")
        self.fused = True if self._half == torch.float16 else None

    def __call__(self, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``net(x)``; in "bf16" and "fp16" under autocast, and in float32 after that."""
        if self._half is None:
            return net(x)
        with torch.autocast(self._device.type, dtype=self._half):
            return net(x).float()

    def laid_out(self, net: nn.Module) -> nn.Module:
        """The network; on a GPU in half precision its weights are in channels-last memory from here on, and so are the
        activations: what its matrix units convolve in."""
        if self._half is None or self._device.type == "cpu":
            return net
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def scaler(self) -> torch.amp.GradScaler:
        """A new scaler of losses, for "fp16"; in other precisions it does nothing."""
        return torch.amp.GradScaler(self._device.type, enabled=self._half == torch.float16)


@contextlib.contextmanager
def rounded(precision: str | None, device: torch.device) -> Iterator[Rounding]:
    """Inside the block, networks that the `Rounding` runs on ``device`` run in ``precision``.

    Args:
        precision: None: as torch's switches say; "ieee": float32 without TF32; "tf32": float32, with factors of
            products rounded to TF32 (a CUDA device); "bf16": autocast in bfloat16; "fp16": autocast in float16, with
            losses scaled so that small gradients do not vanish (a CUDA device). On the CPU "bf16" needs half the memory
            of activations, and trains more slowly than float32 unless the processor multiplies in bfloat16.
        device: where the networks are. "ieee" and "tf32" set torch's switches for it, which are the process's, until
            the block is left.

    Raises:
        OptionError: an unknown precision, or one that the device does not have.
    """
    rounding = Rounding(precision, device)
    if precision not in ("ieee", "tf32"):
        yield rounding
        return
    backends: Any = torch.backends  # their attributes are made at run time
    switches = {
        "cuda": (backends.cudnn.conv, backends.cuda.matmul),
        "cpu": (backends.mkldnn.conv, backends.mkldnn.matmul),
    }
    own = switches.get(device.type, ())
    before = [switch.fp32_precision for switch in own]
    try:
        for switch in own:
            switch.fp32_precision = precision
        yield rounding
    finally:
        for switch, value in zip(own, before, strict=True):
            switch.fp32_precision = value
