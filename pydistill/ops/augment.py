"""The siamese augmentation of a batch from a record of its parameters, one pass over each image.

Two operators, with A the linear map of images that a record defines, and b the brightness that it adds:

    augment            A images + b, or with ``linear`` A images alone
    augment_backward   A^T grad

They are closed under differentiation to any order: each is the derivative of the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._records import check_constant, check_images

BACKENDS = ("reference", "cpu", "cuda", "triton")
# a record's columns and the value at which each leaves an image as it is; the order of Column in csrc/kernels/augment.h
IDENTITY = {
    **{"brightness": 0.0, "saturation": 1.0, "contrast": 1.0, "crop_y": 0.0, "crop_x": 0.0},
    **{"cutout_top": 0.0, "cutout_left": 0.0, "cutout_height": 0.0, "cutout_width": 0.0, "flip": 0.0},
    **{"scale_x": 1.0, "scale_y": 1.0, "angle": 0.0},
}
COLUMNS = tuple(IDENTITY)


def augment_images(
    images: Tensor,
    record: Tensor,
    *,
    flip_batch: bool = False,
    align_corners: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Colour, crop, cutout, flip, scale and rotate each image as specified by its row of ``record``.

    Equivalent to the six operators of `pydistill.reference.augment_images`, one after the other:
    ``rotate(scale(flip(cutout(crop(color(x))))))``, where scale and rotate are one bilinear resampling each
    (``F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=True), align_corners=True)``). It is the
    augmentation of "Dataset Condensation with Differentiable Siamese Augmentation" (Zhao and Bilen, ICML 2021), which
    trajectory matching and its successors share; `pydistill.augment.DiffAugment` draws the records.

    Affine in the images, and differentiable in them to any order, in reverse and forward mode, under ``torch.func`` and
    ``torch.compile``; the record is a constant. Deterministic: equal bits across runs, thread counts and, on the CPU,
    instruction sets. An operation at its identity value leaves every bit as it is. NaN and Inf propagate as in torch,
    except for those that crop and cutout drop and for taps of weight zero in an identity.

    A row of the record, 52 bytes, with identity values in brackets:

    ==  ==================  ==============================================================================
     0  brightness (0)      added to every value
     1  saturation (1)      factor of a value's distance from the mean of its pixel's channels
     2  contrast (1)        factor of a value's distance from the mean of the image
     3  crop_y (0)          rows: ``y[i, j] = x[i + crop_y, j + crop_x]``, zero from outside; a whole number
     4  crop_x (0)          columns
     5  cutout_top (0)      zero in ``y[top : top + height, left : left + width]``; whole numbers, which may
     6  cutout_left (0)     extend beyond the image
     7  cutout_height (0)
     8  cutout_width (0)
     9  flip (0)            mirrored left to right where not zero
    10  scale_x (1)         the result's column u, from the centre, is the source's ``scale_x * u``: below 1
    11  scale_y (1)         enlarges; rows likewise
    12  angle (0)           in radians, anticlockwise
    ==  ==================  ==============================================================================

    Args:
        images: ``[B, C, H, W]`` with C, H, W >= 1; float32, float64, bfloat16 or float16, any strides. All arithmetic
            is in float32 (float64 for float64).
        record: float32 ``[B, 13]``, ``[2 * B, 13]`` for ``flip_batch``, on the device of images. One row for all:
            ``row.expand(B, 13)``. A scale or angle that is not finite makes its image NaN.
        flip_batch: augment ``cat([images, images.flip(3)])`` instead, without building it, as "FYI: Flip Your Images
            for Dataset Distillation" (Son et al., ECCV 2024) does.
        align_corners: the grid that scale and rotate refer to. For square images both are the same; MTT and its
            descendants use True, DC, DSA and DM torch's default False.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu", "cuda" or "triton" (of the
            CPU's tensors in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        ``[B, C, H, W]``, ``[2 * B, C, H, W]`` for ``flip_batch``, contiguous, in the dtype of images.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape or device does not fit, or the record requires a gradient.
        NotImplementedError: the backend cannot run here.
    """
    _check(images, record, flip_batch)
    chosen = choose_backend("augment", backend, images.device, BACKENDS)
    if chosen == "reference":
        return reference.augment_images(images, record, flip_batch, align_corners)
    ops = _triton if chosen == "triton" else _native
    return ops.forward(images, record, flip_batch, align_corners, False)


def _check(images: Tensor, record: Tensor, flip_batch: bool) -> None:
    check_images(images, record, "[B, C, H, W]")
    expected = [len(images) * (2 if flip_batch else 1), len(COLUMNS)]
    if list(record.shape) != expected:
        raise ValueError(
            f"record: expected shape {expected} for images {list(images.shape)} and flip_batch={flip_batch}, "
            f"got {list(record.shape)}"
        )
    check_constant(record, images)


def _batch_into_rows(op: Any, doubled_before: bool, doubled_after: bool) -> Any:
    """The vmap rule: images are independent, so a batch dimension becomes more images.

    With ``flip_batch`` a tensor's rows are two halves, which stay the slowest dimension. ``doubled_before`` and
    ``doubled_after`` say whether the first argument and the result have these halves.
    """

    def rule(info: Any, in_dims: tuple, tensor: Tensor, record: Tensor, flip_batch: bool, *options: Any) -> Any:
        V = info.batch_size

        def folded(arg: Tensor, dim: int | None, doubled: bool) -> Tensor:
            arg = arg.unsqueeze(0).expand(V, *arg.shape) if dim is None else arg.movedim(dim, 0)
            halves = 2 if doubled else 1
            arg = arg.unflatten(1, (halves, arg.shape[1] // halves)).movedim(1, 0)
            return arg.flatten(0, 2)

        out = op(
            folded(tensor, in_dims[0], flip_batch and doubled_before),
            folded(record, in_dims[1], flip_batch),
            flip_batch,
            *options,
        )
        halves = 2 if flip_batch and doubled_after else 1
        out = out.unflatten(0, (halves, V, out.shape[0] // (halves * V))).movedim(1, 0)
        return out.flatten(1, 2), 0

    return rule


def _fake_forward(images: Tensor, record: Tensor, flip_batch: bool, align_corners: bool, linear: bool) -> Tensor:
    return images.new_empty((images.shape[0] * (2 if flip_batch else 1), *images.shape[1:]))


def _fake_backward(grad: Tensor, record: Tensor, flip_batch: bool, align_corners: bool) -> Tensor:
    return grad.new_empty((grad.shape[0] // (2 if flip_batch else 1), *grad.shape[1:]))


# In every formula below: `saved` are the operator's tensors, `options` is (flip_batch, align_corners[, linear]).


class _Operators:
    """The two operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "augment",
            tensors=2,
            fake=_fake_forward,
            vjp=self._forward_vjp,
            jvp=self._forward_jvp,
            vmap=_batch_into_rows(lambda *args: self.forward.raw(*args), doubled_before=False, doubled_after=True),
            library=library,
        )
        self.backward: Operator = Operator(
            "augment_backward",
            tensors=2,
            fake=_fake_backward,
            vjp=self._backward_vjp,
            jvp=self._backward_jvp,
            vmap=_batch_into_rows(lambda *args: self.backward.raw(*args), doubled_before=True, doubled_after=False),
            library=library,
        )

    def _forward_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        return self.backward(grad, saved[1], *options[:2]), None

    def _forward_jvp(self, saved: tuple, options: tuple, images_t: Tensor, record_t: Tensor) -> Tensor:
        return self.forward(images_t, saved[1], *options[:2], True)

    def _backward_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        return self.forward(grad, saved[1], *options, True), None

    def _backward_jvp(self, saved: tuple, options: tuple, grad_t: Tensor, record_t: Tensor) -> Tensor:
        return self.backward(grad_t, saved[1], *options)


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import augment as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "augment", _fake_forward, _triton_fill("forward"))
register_filled(_triton_library, "augment_backward", _fake_backward, _triton_fill("backward"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
