"""The CUDA kernels on the host machine of `csrc/kernels/vocabulary/cuda_vocabulary.h`: load and call."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from bench.block_forms import FORMS
from bench.kernels import Launch

SCALARS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
AMPLE = 99 * 1024  # bytes of shared memory a block may ask for: enough to keep the tests' panels


class Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "nchw"))

    @staticmethod
    def of(tensor: torch.Tensor | None) -> Map:
        return Map() if tensor is None else Map(tensor.data_ptr(), *tensor.stride())


class Call(ctypes.Structure):
    """InstanceNormReluAvgPool of csrc/kernels/instance_norm_relu_avg_pool.h."""

    _fields_ = (
        ("form", ctypes.c_int),
        ("scalar", ctypes.c_int),
        *((name, ctypes.c_int64) for name in "NCHW"),
        ("eps", ctypes.c_double),
        ("relu", ctypes.c_bool),
        ("pool", ctypes.c_bool),
        *((name, Map) for name in ("x", "x_t", "grad_y", "grad_y_t")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "weight_t", "bias_t")),
        ("y", Map),
        ("grad_x", Map),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
    )


class Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("column", ctypes.c_int64))

    @staticmethod
    def of(tensor: torch.Tensor | None) -> Rows:
        return Rows() if tensor is None else Rows(tensor.data_ptr(), *tensor.stride())


class SoftCrossEntropy(ctypes.Structure):
    """SoftCrossEntropy of csrc/kernels/soft_cross_entropy.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("form", "scalar", "kind")),
        *((name, ctypes.c_int64) for name in "NK"),
        *((name, Rows) for name in ("logits", "logits_t", "labels", "labels_t", "grad", "grad_t")),
        *((name, ctypes.c_void_p) for name in ("loss", "grad_logits", "grad_labels")),
    )


class Augment(ctypes.Structure):
    """Augment of csrc/kernels/augment.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("form", "scalar")),
        *((name, ctypes.c_int64) for name in (*"NCHW", "copies")),
        *((name, ctypes.c_bool) for name in ("align_corners", "linear")),
        ("record", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("record_row", "record_column")),
        *((name, Map) for name in ("from_", "to")),
    )


class MultiCrop(ctypes.Structure):
    """MultiCrop of csrc/kernels/multi_crop.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("form", "scalar")),
        *((name, ctypes.c_int64) for name in (*"NCHWB", "height_out", "width_out", "parts")),
        *((name, ctypes.c_bool) for name in ("linear", "shared", "in_place")),
        ("record", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("record_row", "record_part", "record_column")),
        *((name, ctypes.c_void_p) for name in ("norm", "first", "parts_of")),
        *((name, Map) for name in ("from_", "base", "to")),
    )


class Planes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "ncp"))

    @staticmethod
    def of(tensor: torch.Tensor | None) -> Planes:
        return Planes() if tensor is None else Planes(tensor.data_ptr(), *tensor.stride())


class BnStatMatch(ctypes.Structure):
    """BnStatMatch of csrc/kernels/bn_stat_match.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("pass_", "scalar")),
        ("relu", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in (*"NCPM", "tile")),
        *((name, Planes) for name in ("x", "residual", "y", "grad_y", "grad_x", "grad_residual")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "mean", "grad_statistics")),
        *((name, ctypes.c_void_p) for name in ("partial", "statistics", "kept_mean")),
    )


class HostMachine:
    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in (
            "run_small_kernel",
            "run_instance_norm_relu_avg_pool",
            "run_sum_over_batch",
            "run_soft_cross_entropy",
            "run_augment",
            "run_multi_crop",
            "run_bn_stat_match",
        ):
            getattr(self.library, name).restype = ctypes.c_char_p
        assert self.library.size_of_call() == ctypes.sizeof(Call)
        assert self.library.size_of_launch() == ctypes.sizeof(Launch)
        assert self.library.size_of_soft_cross_entropy() == ctypes.sizeof(SoftCrossEntropy)
        assert self.library.size_of_augment() == ctypes.sizeof(Augment)
        assert self.library.size_of_multi_crop() == ctypes.sizeof(MultiCrop)
        assert self.library.size_of_bn_stat_match() == ctypes.sizeof(BnStatMatch)

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error:
            raise RuntimeError(error.decode())

    def small_kernel(
        self, name: str, block: int = 64, grid: int = 1, shared_floats: int | None = None, seed: int = 0
    ) -> torch.Tensor:
        """Runs a kernel of host_launch.cpp; returns one float per thread and one more."""
        out = torch.zeros(grid * block + 1)
        shared = 4 * (block if shared_floats is None else shared_floats)
        self._check(
            self.library.run_small_kernel(
                name.encode(),
                ctypes.c_uint64(seed),
                grid,
                block,
                ctypes.c_int64(shared),
                ctypes.c_void_p(out.data_ptr()),
            )
        )
        return out

    def instance_norm_relu_avg_pool(
        self,
        form: str,
        *,
        x: torch.Tensor,
        eps: float,
        relu: bool,
        pool: bool,
        seed: int = 0,
        shared_limit: int = AMPLE,
        **tensors: torch.Tensor | None,
    ) -> Launch:
        """Runs one form on tensors named as in Call, outputs included."""
        call = Call(FORMS.index(form), SCALARS.index(x.dtype), *x.shape, eps, relu, pool, Map.of(x))
        for name, tensor in tensors.items():
            is_map = isinstance(getattr(call, name), Map)
            setattr(call, name, Map.of(tensor) if is_map else tensor.data_ptr())
        launch = Launch(seed=seed, shared_limit=shared_limit)
        self._check(self.library.run_instance_norm_relu_avg_pool(ctypes.byref(call), ctypes.byref(launch)))
        return launch

    def sum_over_batch(self, shares: torch.Tensor, seed: int = 0) -> torch.Tensor:
        total = shares.new_full(shares.shape[1:], float("nan"))
        self._check(
            self.library.run_sum_over_batch(
                SCALARS.index(shares.dtype),
                ctypes.c_void_p(shares.data_ptr()),
                ctypes.c_void_p(total.data_ptr()),
                *(ctypes.c_int64(size) for size in shares.shape),
                ctypes.c_uint64(seed),
            )
        )
        return total

    def soft_cross_entropy(
        self, form: str, kind: int, *, logits: torch.Tensor, seed: int = 0, **tensors: torch.Tensor | None
    ) -> None:
        """Runs one form on tensors named as in SoftCrossEntropy, outputs included."""
        call = SoftCrossEntropy(FORMS.index(form), SCALARS.index(logits.dtype), kind, *logits.shape, Rows.of(logits))
        for name, tensor in tensors.items():
            is_rows = isinstance(getattr(call, name), Rows)
            setattr(call, name, Rows.of(tensor) if is_rows else tensor.data_ptr())
        self._check(self.library.run_soft_cross_entropy(ctypes.byref(call), ctypes.c_uint64(seed)))

    def augment(
        self,
        form: str,
        *,
        source: torch.Tensor,
        result: torch.Tensor,
        record: torch.Tensor,
        flip_batch: bool = False,
        align_corners: bool = True,
        linear: bool = False,
        seed: int = 0,
    ) -> None:
        """Writes ``result`` [n, C, H, W]; ``source`` are images, or for the backward gradients."""
        copies = 2 if flip_batch else 1
        rows = len(source) if form == "forward" else len(source) // copies
        sizes = (rows, *source.shape[1:], copies)
        places = (record.data_ptr(), *record.stride(), Map.of(source), Map.of(result))
        call = Augment(FORMS.index(form), SCALARS.index(source.dtype), *sizes, align_corners, linear, *places)
        self._check(self.library.run_augment(ctypes.byref(call), ctypes.c_uint64(seed)))

    def multi_crop(
        self,
        form: str,
        *,
        source: torch.Tensor,
        result: torch.Tensor,
        record: torch.Tensor,
        sizes: tuple[int, ...],
        base: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        linear: bool = False,
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        """Writes ``result``; ``sizes`` are N, C, H, W of the images and B, height and width of the crops."""
        call = MultiCrop(FORMS.index(form), SCALARS.index(source.dtype), *sizes, record.shape[1], linear, shared)
        call.record = record.data_ptr()
        call.record_row, call.record_part, call.record_column = record.stride()
        call.norm = None if norm is None else norm.data_ptr()
        call.from_, call.base, call.to = Map.of(source), Map.of(base), Map.of(result)
        self._check(self.library.run_multi_crop(ctypes.byref(call), ctypes.c_uint64(seed)))

    def bn_stat_match(
        self, name: str, tile: int, *, x: torch.Tensor, relu: bool, seed: int = 0, **tensors: torch.Tensor | None
    ) -> None:
        """Runs the pass "tiles", "merge" or "backward" on tensors named as in BnStatMatch, outputs included."""
        number = ("tiles", "merge", "backward").index(name)
        call = BnStatMatch(number, SCALARS.index(x.dtype), relu, *x.shape, x.shape[0] * x.shape[2], tile, Planes.of(x))
        for field, tensor in tensors.items():
            is_planes = isinstance(getattr(call, field), Planes)
            setattr(call, field, Planes.of(tensor) if is_planes else None if tensor is None else tensor.data_ptr())
        self._check(self.library.run_bn_stat_match(ctypes.byref(call), ctypes.c_uint64(seed)))
