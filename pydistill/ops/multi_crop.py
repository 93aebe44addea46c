"""Crops of a batch from a record of their parameters: resize, flip, roll, mix and normalise in one gather.

Two operators, with A the linear map of images that a record defines (normalisation included), and b what it adds:

    multi_crop            A (images + base) + b, or with ``linear`` A (images + base) alone
    multi_crop_backward   A^T grad, and its sum over the images

They are closed under differentiation to any order: each is the derivative of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._devices import to_device
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._records import MAX_SIZE, check_constant, check_images
from pydistill.reference.multi_crop import COLUMNS  # the order of Column in csrc/kernels/multi_crop.h

BACKENDS = ("reference", "cpu", "cuda", "triton")
MAX_PARTS = 4


def multi_crop(
    images: Tensor,
    record: Tensor,
    out_size: int | tuple[int, int],
    *,
    base: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Crops of ``images``, one per row of ``record``: resized, flipped, rolled, mixed and normalised.

    A record of one part is equivalent, with ``x = (images + base)[source]``, to ::

        crop = x[:, top : top + height, left : left + width]
        y = F.interpolate(crop[None], out_size, mode="bilinear", antialias=True, align_corners=False)[0]
        y = (y.flip(-1) if flip else y).roll((roll_y, roll_x), (1, 2))
        y = (y - mean[:, None, None]) / std[:, None, None]

    that is torchvision's ``RandomResizedCrop`` of a tensor, ``RandomHorizontalFlip``, SRe2L's jitter and
    ``Normalize``. Further parts are painted over the first one before the normalisation, which gives mixup, cutmix and
    the mosaic of RDED and PCA. `pydistill.augment.MultiCrop` draws records. It is the augmentation of "Squeeze, Recover
    and Relabel" (Yin et al., NeurIPS 2023), of CDA's curriculum (Yin and Shen, TMLR 2024), and with ``base`` INFER's
    compensator (Zhang et al., "Breaking Class Barriers", ICLR 2025).

    Affine in images and base, and differentiable in them to any order, in reverse and forward mode, under
    ``torch.func`` and ``torch.compile``; the record is a constant. The gradient of ``base`` alone is summed over the
    batch in the kernel, without the images' gradients in memory. Deterministic: equal bits across runs, thread counts
    and, on the CPU, instruction sets. A crop that is not resized leaves every bit as it is. What is not seen, or has no
    weight in a filter, does not count even if it is NaN.

    A part's columns, all whole numbers except alpha:

    =====  ===============================  ==================================================================
     0      source                           which image
     1-4    top, left, height, width         the box of the crop, in pixels of the image
     5      flip                             mirrored left to right where not zero
     6-7    roll_y, roll_x                   ``torch.roll`` of the resized crop, in its pixels, either sign
     8      fit                              zero: the crop is resized to ``out_size``; else to its place's size
     9-12   to_top, to_left, to_height,      its place: where in the result it is seen
            to_width
     13     alpha                            opacity over what is there: ``(1 - alpha) * y + alpha * crop``
    =====  ===============================  ==================================================================

    Args:
        images: ``[N, C, H, W]`` with C, H, W >= 1; float32, float64, bfloat16 or float16, any strides. All arithmetic
            is in float32 (float64 for float64).
        record: float32 ``[B, P, 14]`` with 1 to 4 parts, on the device of images. B and N are independent. A record
            with an invalid source, box or place (boxes and places must lie inside) makes its result NaN and adds to no
            gradient.
        out_size: height and width of the results, an int for both.
        base: ``[1, C, H, W]``, dtype and device of images, added to each of them first.
        mean, std: one number per channel each, in units of the images; both or neither. Constants.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu", "cuda" or "triton" (of the
            CPU's tensors in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        ``[B, C, *out_size]``, contiguous, in the dtype of images.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape or device does not fit, a std is not above zero, or the record requires a gradient.
        NotImplementedError: the backend cannot run here.
    """
    _check(images, record, base)
    size = _size(out_size)
    norm = _norm(mean, std, images)
    chosen = choose_backend("multi_crop", backend, images.device, BACKENDS)
    if chosen == "reference":
        return reference.multi_crop(images, record, size, base, *((None, None) if norm is None else norm))
    ops = _triton if chosen == "triton" else _native
    return ops.forward(images, base, record, norm, *size, False)


def _check(images: Tensor, record: Tensor, base: Tensor | None) -> None:
    check_images(images, record, "[N, C, H, W]", **({} if base is None else {"base": base}))
    if record.dim() != 3 or not 1 <= record.shape[1] <= MAX_PARTS or record.shape[2] != len(COLUMNS):
        raise ValueError(
            f"record: expected shape [B, P, {len(COLUMNS)}] with P of 1 to {MAX_PARTS}, got {list(record.shape)}"
        )
    check_constant(record, images)
    if base is None:
        return
    if base.dtype != images.dtype:
        raise TypeError(f"base: expected {images.dtype} as images, got {base.dtype}")
    if base.shape != (1, *images.shape[1:]):
        raise ValueError(f"base: expected shape {[1, *images.shape[1:]]}, got {list(base.shape)}")
    if base.device != images.device:
        raise ValueError(f"base: expected device {images.device} as images, got {base.device}")


def _size(out_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (out_size, out_size) if isinstance(out_size, int) else tuple(out_size)
    if len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIZE for side in size):
        raise ValueError(f"out_size: expected one or two sides of 1 to {MAX_SIZE}, got {out_size!r}")
    return size


def _norm(mean: Any, std: Any, images: Tensor) -> Tensor | None:
    """``[2, C]``, float64 on the device of images: mean and std."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"mean, std: expected both or neither, got {'std' if mean is None else 'mean'} alone")
    rows = []
    for name, values in (("mean", mean), ("std", std)):
        row = torch.as_tensor(values, dtype=torch.float64, device=getattr(values, "device", "cpu"))
        row = to_device(row, images.device)
        if row.requires_grad:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient; there is none")
        if row.shape != (images.shape[1],):
            raise ValueError(
                f"{name}: expected {images.shape[1]} numbers, one for each channel, got shape {list(row.shape)}"
            )
        rows.append(row)
    if not isinstance(std, Tensor) and not all(value > 0 for value in std):  # a tensor may be on a device
        raise ValueError(f"std: expected numbers above zero, got {list(std)}")
    return torch.stack(rows)


def _moved(record: Tensor, images: int) -> Tensor:
    """``[V, B, P, 14]`` as ``[V * B, P, 14]``, each batch's sources numbered after those of the batches before."""
    offsets = torch.zeros(len(record), 1, 1, record.shape[-1], dtype=record.dtype, device=record.device)
    offsets[:, 0, 0, 0] = images * torch.arange(len(record), dtype=record.dtype, device=record.device)
    # an invalid source stays invalid
    named = (record[..., :1] >= 0) & (record[..., :1] < images)
    return torch.where(named, record + offsets, torch.where(record == record, record * 0 - 1, record)).flatten(0, 1)


def _to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fake_forward(
    images: Tensor, base: Tensor | None, record: Tensor, norm: Tensor | None, height: int, width: int, linear: bool
) -> Tensor:
    return images.new_empty((record.shape[0], images.shape[1], height, width))


def _fake_backward(
    grad: Tensor,
    record: Tensor,
    norm: Tensor | None,
    images: int,
    height: int,
    width: int,
    with_images: bool,
    with_base: bool,
) -> tuple[Tensor, Tensor]:
    def shape(rows: int, wanted: bool) -> tuple[int, ...]:
        return (rows, grad.shape[1], height, width) if wanted else (0,)

    return grad.new_empty(shape(images, with_images)), grad.new_empty(shape(1, with_base))


# In every formula below: `saved` are the operator's tensors, `options` its other arguments.


class _Operators:
    """The two operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "multi_crop",
            tensors=4,
            fake=_fake_forward,
            vjp=self._forward_vjp,
            jvp=self._forward_jvp,
            vmap=self._batch_forward,
            selective=True,
            library=library,
        )
        self.backward: Operator = Operator(
            "multi_crop_backward",
            tensors=3,
            fake=_fake_backward,
            vjp=self._backward_vjp,
            jvp=self._backward_jvp,
            vmap=self._batch_backward,
            library=library,
        )

    def _forward_vjp(self, saved: tuple, options: tuple, ctx: Any, grad: Tensor) -> tuple:
        images, _, record, norm = saved
        with_images, with_base = ctx.needs_input_grad[:2]
        sizes = (images.shape[0], *images.shape[2:])
        to_images, to_base = self.backward(grad, record, norm, *sizes, with_images, with_base)
        return to_images if with_images else None, to_base if with_base else None, None, None

    def _forward_jvp(self, saved: tuple, options: tuple, images_t: Tensor, base_t: Tensor | None, *_: Any) -> Tensor:
        return self.forward(images_t, base_t, saved[2], saved[3], *options[:2], True)

    def _backward_vjp(self, saved: tuple, options: tuple, to_images: Tensor | None, to_base: Tensor | None) -> tuple:
        grad, record, norm = saved
        images, _, _, with_images, with_base = options
        size = grad.shape[2:]
        if with_images:
            return self.forward(to_images, to_base if with_base else None, record, norm, *size, True), None, None
        if with_base:
            assert to_base is not None
            each = to_base.expand(images, *to_base.shape[1:])
            return self.forward(each, None, record, norm, *size, True), None, None
        return torch.zeros_like(grad), None, None

    def _backward_jvp(self, saved: tuple, options: tuple, grad_t: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self.backward(grad_t, *saved[1:], *options)

    def _batch_forward(
        self, info: Any, in_dims: tuple, images: Tensor, base: Any, record: Tensor, norm: Any, *options: Any
    ):
        """The vmap rule: more images and more records; images that all batches share stay as they are."""
        V = info.batch_size
        if base is not None and in_dims[1] is not None:  # a base for each batch is no longer one for all images
            images = _to_front(images, in_dims[0], V) + base.movedim(in_dims[1], 0)
            base, image_dim = None, 0
        else:
            image_dim = in_dims[0]
        rows = _to_front(record, in_dims[2], V)
        if image_dim is None:
            rows = rows.flatten(0, 1)
        else:
            images = images.movedim(image_dim, 0)
            rows, images = _moved(rows, images.shape[1]), images.flatten(0, 1)
        out = self.forward.raw(images, base, rows, norm, *options)
        return out.unflatten(0, (V, record.shape[1 if in_dims[2] == 0 else 0])), 0

    def _batch_backward(
        self, info: Any, in_dims: tuple, grad: Tensor, record: Tensor, norm: Any, images: int, *options: Any
    ) -> tuple:
        V = info.batch_size
        *size, with_images, with_base = options
        rows = _moved(_to_front(record, in_dims[1], V), images)
        grad = _to_front(grad, in_dims[0], V).flatten(0, 1)
        found, _ = self.backward.raw(grad, rows, norm, V * images, *size, True, False)
        found = found.unflatten(0, (V, images))
        shared = found.sum(1, keepdim=True) if with_base else found.new_empty(V, 0)
        return (found if with_images else found.new_empty(V, 0), shared), (0, 0)


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import multi_crop as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "multi_crop", _fake_forward, _triton_fill("forward"))
register_filled(_triton_library, "multi_crop_backward", _fake_backward, _triton_fill("backward"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
