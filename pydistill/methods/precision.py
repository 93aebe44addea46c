"""The precision of a run: decided when it begins; and in the decoupled methods autocast, and a scale of float16 losses.

What a precision rounds are the factors of a network's convolutions and matrix products, and in "bf16" and "fp16" what
its layers hand on. Images and the steps on them, losses, the statistics of BatchNorms, weights, and what optimisers and
files hold of all that, are float32 in every precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pydistill.ops import _precision

__all__ = ["Precision", "Rounding", "agree", "check_precision", "decided", "rounded", "switches"]

Precision = Literal["auto", "ieee", "bf16", "fp16", "tf32", "tf32-conv", "tf32-matmul", "fp32"]
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device | None = None) -> None:
    """ValueError for a precision that does not exist, or that ``device`` does not have."""
    _precision.check_name(precision, "fp16")
    if device is not None:
        _precision.check_device(precision, device)


def decided(device: torch.device, kept: str | None = None) -> str:
    """What the precision "auto" is in a run on ``device``, from its beginning on.

    Args:
        device: of the run. On a GPU torch's switches say it; elsewhere there is nothing to decide, and "auto" remains.
        kept: what the run that is resumed has; None: a version without precisions began it, as torch's switches said.
            One that began where nothing was to be decided is "ieee" on a GPU.
    """
    if device.type != "cuda":
        return kept or "auto"
    if kept is None:
        return _precision.resolved("auto", device)
    return "ieee" if kept == "auto" else kept


def agree(kept: str, precision: str) -> bool:
    """Whether a file with the precision ``kept`` is of a run in ``precision``. "auto" is of all that it may become: it
    is in files of runs that had nothing to decide, and stands for the lack of one in those of older versions."""
    return kept == precision or (kept == "auto" and precision not in _HALVES)


def switches(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside the block a CUDA device's switches, which are the process's, are as ``precision`` says; what is not
    rounded to a half precision is float32 without TF32."""
    plain = "ieee" if precision in _HALVES else precision
    return _precision.rounded(_precision.resolved(plain, device), device)


class Rounding:
    """A precision on a device, as `rounded` yields it.

    Attributes:
        fused: for an optimiser whose gradients a `scaler` scales: fused, it does not make the host wait for the answer
            to whether they are finite. None where nothing is scaled: as torch chooses.
    """

    def __init__(self, precision: str, device: torch.device):
        check_precision(precision, device)
        self._device, self._half = device, _HALVES.get(precision)
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
def rounded(precision: str, device: torch.device) -> Iterator[Rounding]:
    """Inside the block, networks that the `Rounding` runs on ``device`` run in ``precision``.

    Args:
        precision: "ieee" (also called "fp32"): float32 without TF32; "tf32": float32, with factors of products rounded
            to TF32 (a CUDA device), "tf32-conv" and "tf32-matmul": of convolutions or of matrix products alone; "auto":
            that of these which torch's switches say, or on the CPU as they say; "bf16": autocast in bfloat16; "fp16":
            autocast in float16, with losses scaled so that small gradients do not vanish (a CUDA device). On the CPU
            "bf16" needs half the memory of activations, and trains more slowly than float32 unless the processor
            multiplies in bfloat16.
        device: where the networks are. Torch's switches for it, which are the process's, are set until the block is
            left.

    Raises:
        ValueError: an unknown precision, or one that the device does not have.
    """
    rounding = Rounding(precision, device)
    own: list[tuple[Any, str]] = []
    if device.type == "cpu" and precision in ("ieee", "fp32"):
        mkldnn: Any = torch.backends.mkldnn  # whose attributes are made at run time
        own = [(mkldnn.conv, "ieee"), (mkldnn.matmul, "ieee")]
    with switches(precision, device), _precision.switched(own):
        yield rounding
