"""Torch's settings while a network runs, so that a backward pass can run parts of it again under the same ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch cannot name it where the precisions below were set one by one
        return None


def _set_matmul_precision(value: str | None) -> None:
    if value is not None:
        torch.set_float32_matmul_precision(value)


_CUDA: Any = torch.backends.cuda  # their attributes are made at run time
_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn

# Pairs of getter and setter of a switch; all are process-wide.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
    (_CUDA.fp16_bf16_reduction_math_sdp_allowed, _CUDA.allow_fp16_bf16_reduction_math_sdp),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
    (_matmul_precision, _set_matmul_precision),  # sets some of those after it
    _attribute(torch.backends, "fp32_precision"),
    _attribute(_CUDA.matmul, "fp32_precision"),
    _attribute(_CUDNN.conv, "fp32_precision"),
    _attribute(_CUDNN.rnn, "fp32_precision"),
    _attribute(_MKLDNN.matmul, "fp32_precision"),
    _attribute(_MKLDNN.conv, "fp32_precision"),
    _attribute(_MKLDNN.rnn, "fp32_precision"),
    *(_attribute(_CUDNN, name) for name in ("enabled", "benchmark", "deterministic")),
    *(_attribute(_MKLDNN, name) for name in ("enabled", "deterministic")),
)


class Surroundings:
    """Autocast (on ``device`` and on the CPU), default device and dtype, the choice of attention backend,
    deterministic algorithms, and the precisions and libraries of ``torch.backends``, as they are now."""

    def __init__(self, device: torch.device):
        self._switches = [read() for read, _ in _SWITCHES]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {device.type, "cpu"}
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._device = torch.get_default_device()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As they were then; afterwards as they were before."""
        before = [read() for read, _ in _SWITCHES]
        with contextlib.ExitStack() as stack:
            stack.callback(_set, before)
            _set(self._switches)
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            yield


def _set(values: list[Any]) -> None:
    for (read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)
