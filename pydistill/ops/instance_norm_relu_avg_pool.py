"""The ConvNet block after its convolution: instance norm, ReLU and 2x2 average pool in one pass.

Four operators, each a pure function of its arguments, with f the block and L = <grad_y, f(x, weight, bias)>:

    forward        y                    = f
    backward       grad                 = dL                            with respect to (x, weight, bias)
    jvp            y_t                  = f's derivative along (x_t, weight_t, bias_t)
    backward_jvp   y_t and grad_t       = the derivatives of f and of backward along them (and along grad_y_t)

They are closed under differentiation up to second order: dL's Hessian is symmetric, so the vector-Jacobian products of
``backward`` and ``jvp`` are ``backward_jvp`` along the incoming gradient.

They exist twice: natively (``torch.ops.pydistill``: C++ and CUDA) and in Triton (``torch.ops.pydistill_triton``), under
one set of formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend, register_filled

BACKENDS = ("reference", "cpu", "cuda", "triton")


def instance_norm_relu_avg_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    pool: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Instance norm with affine parameters, then ReLU, then a 2x2 average pool with stride 2.

    Equivalent to ``F.avg_pool2d(F.relu(F.group_norm(x, x.shape[1], weight, bias, eps)), 2)``: the "instancenorm" block
    of the ConvNet that dataset-distillation methods train (Gidaris & Komodakis, CVPR 2018; Zhao et al., ICLR 2021).
    Differentiable twice, in reverse and forward mode, under ``torch.func`` and ``torch.compile``; a third derivative
    raises ``NotImplementedError``. Deterministic: equal bits across runs, thread counts and, on the CPU, instruction
    sets. NaN and Inf propagate as in torch.

    Args:
        x: ``[N, C, H, W]``; float32, float64, bfloat16 or float16, any strides. Statistics are per sample and channel
            and, like all arithmetic, in float32 (float64 for float64).
        weight: ``[C]`` scale. Any floating dtype; used in float32 (float64 where x is float64), as is
        bias: ``[C]`` shift.
        eps: added to the variance.
        relu: apply the ReLU.
        pool: apply the average pool; odd last rows and columns are dropped.
        backend: "auto" (the device's kernel; Triton's on AMD GPUs), "reference" (plain torch, any device), "cpu",
            "cuda", or "triton" (NVIDIA and AMD GPUs; the CPU in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        ``[N, C, H // 2, W // 2]`` (``[N, C, H, W]`` without pool), dtype of x, channels-last where x is.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape or device does not fit.
        NotImplementedError: the backend cannot run here.
    """
    _check(x, weight, bias, pool)
    chosen = choose_backend("instance_norm_relu_avg_pool", backend, x.device, BACKENDS)
    if chosen == "reference":
        return reference.instance_norm_relu_avg_pool(x, weight, bias, eps, relu, pool)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    operators = _triton if chosen == "triton" else _native
    return operators.forward(x, weight.to(compute).contiguous(), bias.to(compute).contiguous(), eps, relu, pool)


def _check(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != x.shape[1]:
            raise ValueError(f"{name}: expected shape [{x.shape[1]}] for x {list(x.shape)}, got {list(tensor.shape)}")
    least = 2 if pool else 1
    if x.shape[2] < least or x.shape[3] < least:
        raise ValueError(f"x: expected planes of at least {least}x{least} with pool={pool}, got shape {list(x.shape)}")


def _empty_image(x: Tensor, pool: bool) -> Tensor:
    """[N, C, H, W] or its pooled shape, in the kernels' output layout."""
    N, C, H, W = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (N, C, H // 2, W // 2) if pool else (N, C, H, W),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _batch_into_channels(op: Any, tensors: int, pattern: str) -> Any:
    """The vmap rule: planes are independent, so a batch dimension becomes more channels.

    ``pattern`` has a letter per output: "i" for an image, "c" for a per-channel vector.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        B = info.batch_size
        folded: list[Tensor | None] = []
        for arg, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
            if arg is None:
                folded.append(None)
                continue
            arg = arg.unsqueeze(0).expand(B, *arg.shape) if dim is None else arg.movedim(dim, 0)
            if arg.dim() == 5:  # [B, N, C, H, W] -> [N, B * C, H, W]
                folded.append(arg.transpose(0, 1).flatten(1, 2))
            else:  # [B, C] -> [B * C]
                folded.append(arg.reshape(-1).contiguous())
        out = op(*folded, *args[tensors:])
        outs = out if isinstance(out, tuple) else (out,)
        unfolded = tuple(
            o.unflatten(1, (B, -1)).transpose(0, 1) if kind == "i" else o.unflatten(0, (B, -1))
            for o, kind in zip(outs, pattern, strict=True)
        )
        return (unfolded, tuple(0 for _ in unfolded)) if isinstance(out, tuple) else (unfolded[0], 0)

    return rule


def _dense(x_t: Tensor, weight_t: Tensor, bias_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions may come with any strides (a sum's gradient is expanded); kernels want per-channel vectors dense."""
    return x_t, weight_t.contiguous(), bias_t.contiguous()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, pool: bool) -> Tensor:
    return _empty_image(x, pool)


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return _empty_image(x, False), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _jvp_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor,
    eps: float,
    relu: bool,
    pool: bool,
) -> Tensor:
    return _empty_image(x, pool)


def _backward_jvp_fake(
    grad_y: Tensor,
    grad_y_t: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor,
    eps: float,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, ...]:
    return _empty_image(x, pool), *_backward_fake(grad_y, x, weight, bias)


class _Operators:
    """The four operators of one library.

    In every formula, `saved` are the operator's tensors and `options` are (eps, relu, pool).
    """

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "instance_norm_relu_avg_pool",
            library=library,
            tensors=3,
            fake=_forward_fake,
            vjp=self._forward_vjp,
            jvp=self._forward_jvp,
            vmap=_batch_into_channels(lambda *args: self.forward.raw(*args), 3, "i"),
        )
        self.backward: Operator = Operator(
            "instance_norm_relu_avg_pool_backward",
            library=library,
            tensors=4,
            fake=_backward_fake,
            vjp=self._backward_vjp,
            jvp=self._backward_forward_jvp,
            vmap=_batch_into_channels(lambda *args: self.backward.raw(*args), 4, "icc"),
        )
        self.jvp: Operator = Operator(
            "instance_norm_relu_avg_pool_jvp",
            library=library,
            tensors=6,
            fake=_jvp_fake,
            vjp=self._jvp_vjp,
            jvp=None,
            vmap=_batch_into_channels(lambda *args: self.jvp.raw(*args), 6, "i"),
        )
        self.backward_jvp: Operator = Operator(
            "instance_norm_relu_avg_pool_backward_jvp",
            library=library,
            tensors=8,
            fake=_backward_jvp_fake,
            vjp=None,
            jvp=None,
            vmap=_batch_into_channels(lambda *args: self.backward_jvp.raw(*args), 8, "iicc"),
        )

    def _forward_vjp(self, saved: tuple, options: tuple, grad_y: Tensor) -> tuple:
        return self.backward(grad_y, *saved, *options)

    def _forward_jvp(self, saved: tuple, options: tuple, *direction: Tensor) -> Tensor:
        return self.jvp(*saved, *_dense(*direction), *options)

    def _backward_vjp(self, saved: tuple, options: tuple, *direction: Tensor) -> tuple:
        grad_y, *inputs = saved
        return self.backward_jvp(grad_y, None, *inputs, *_dense(*direction), *options)

    def _backward_forward_jvp(self, saved: tuple, options: tuple, grad_y_t: Tensor, *direction: Tensor) -> tuple:
        grad_y, *inputs = saved
        return self.backward_jvp(grad_y, grad_y_t, *inputs, *_dense(*direction), *options)[1:]

    def _jvp_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        inputs, direction = saved[:3], saved[3:]
        to_inputs = self.backward_jvp(grad, None, *inputs, *direction, *options)[1:]
        return *to_inputs, *self.backward(grad, *inputs, *options)  # jvp is linear in the direction


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import instance_norm_relu_avg_pool as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "DEF")
for _form, _fake in (
    ("forward", _forward_fake),
    ("backward", _backward_fake),
    ("jvp", _jvp_fake),
    ("backward_jvp", _backward_jvp_fake),
):
    _suffix = "" if _form == "forward" else f"_{_form}"
    register_filled(_triton_library, f"instance_norm_relu_avg_pool{_suffix}", _fake, _triton_fill(_form))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
FORMS = (_native.forward, _native.backward, _native.jvp, _native.backward_jvp)
