r"""The loss of kernel ridge regression from synthetic to real features, with an analytic gradient.

With the linear kernel of features F_s ``[m, d]`` and F_r ``[B, d]``, M = F_s F_s^T + r I and r = lam tr(F_s F_s^T),

    A = M^-1 Y_s,    P = F_r F_s^T A,    loss = mean (P - Y_r)^2

Let R = d loss / d P. Every gradient is linear in R, so one pass over slices of the real rows does for the loss and for
the sums over them, and nothing of B rows is kept. M is factored once (Cholesky). Three forms, of which the cheapest is
taken; each has W = F_s^T A ``[d, q]``, the weights of the linear model, written out or not:

    kernel   slices of K_rs = F_r F_s^T;   dA = K_rs^T R,   S = M^-1 dA,
             dF_s = A (R^T F_r) - (S A^T + A S^T) F_s, its first product as (R A^T)^T F_r;  m d (2 B + 1.5 m)
    weights  P = F_r W,   dW = F_r^T R,   S = M^-1 F_s dW,
             dF_s = A (dW - F_s^T S)^T - S W^T;                                        d (q (5 m + 2 B) + m^2 / 2)
    primal   W = C^-1 F_s^T Y_s with C = F_s^T F_s + r I ``[d, d]``,   U = C^-1 dW,
             dF_s = (Y_s - F_s W) U^T - (F_s U) W^T,   dY_s = F_s U

and dY_s = S, dY_r = -R, dF_r = R W^T. If the trace is not a constant, dr = -<S, A> = -<U, W> adds 2 lam dr F_s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill._devices import read
from pydistill.ops._operator import check_plain_backend

__all__ = ["KRRInfo", "krr_loss"]

Form = Literal["auto", "kernel", "weights", "primal"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_JITTERS = (1e-12, 1e-10, 1e-8, 1e-6)  # in units of the trace, tried after none
_REAL_ROWS = 512  # at a time: enough for a matrix product at full speed
_BLOCK = 256  # columns of a symmetric product computed at a time, of which the part above the diagonal is wasted


@dataclass(frozen=True)
class KRRInfo:
    """How `krr_loss` solved its system."""

    form: str
    """"kernel", "weights" or "primal"."""
    dtype: torch.dtype
    """Of the computation: float64 where that of the features did not do."""
    ridge: float
    """What was added to the diagonal, (lam + jitter) times the trace; NaN where the features are not finite."""
    jitter: float
    """In units of the trace; 0 unless the system was singular without."""


@overload
def krr_loss(
    f_real: Tensor,
    f_syn: Tensor,
    *,
    y_real: Tensor,
    y_syn: Tensor,
    lam: float = ...,
    trace_detach: bool = ...,
    bias: bool = ...,
    reduction: Literal["mean", "sum"] = ...,
    chunk: int | None = ...,
    form: Form = ...,
    return_info: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def krr_loss(
    f_real: Tensor,
    f_syn: Tensor,
    *,
    y_real: Tensor,
    y_syn: Tensor,
    lam: float = ...,
    trace_detach: bool = ...,
    bias: bool = ...,
    reduction: Literal["mean", "sum"] = ...,
    chunk: int | None = ...,
    form: Form = ...,
    return_info: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, KRRInfo]: ...
def krr_loss(
    f_real: Tensor,
    f_syn: Tensor,
    *,
    y_real: Tensor,
    y_syn: Tensor,
    lam: float = 1e-6,
    trace_detach: bool = True,
    bias: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
    form: Form = "auto",
    return_info: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KRRInfo]:
    """Squared error of kernel ridge regression fitted on synthetic features and read at real ones.

    KRR-ST (Lee et al., ICLR 2024) distils by it, and FRePo (Zhou et al., NeurIPS 2022), whose lam is 1e-6 / m.
    Equivalent to `pydistill.reference.krr_loss`::

        K_ss, K_rs = f_syn @ f_syn.T, f_real @ f_syn.T
        ridge = lam * K_ss.trace().detach()
        F.mse_loss(K_rs @ torch.linalg.solve(K_ss + ridge * torch.eye(m), y_syn), y_real)

    The gradients of those inputs that need one are computed along with the loss, slice by slice of the real rows:
    neither K_rs nor the predictions are ever whole. First derivatives only: ``create_graph=True`` and ``torch.func``
    raise. Under ``torch.compile`` it stays outside the graph, so ``fullgraph=True`` raises.

    The system is factored in the dtype of the features (bfloat16, float16: in float32). Where that fails, or a squared
    pivot comes below ``n eps`` times the largest diagonal element (n rows, eps of the dtype), all is computed in
    float64, and there, where the system is singular still, with a jitter of 1e-12, 1e-10, 1e-8 and 1e-6 times the trace
    in turn; ``return_info`` tells. NaN or infinite features give a NaN loss and gradients. The test of the pivots makes
    the host wait for a GPU. Equal bits from run to run, but not over thread counts: torch's matrix product, on which it
    rests, splits its sums by them.

    Args:
        f_real: ``[B, d]`` features of real images; float32, float64, bfloat16 or float16.
        f_syn: ``[m, d]`` features of synthetic images; these and the others have the dtype and device of f_real.
        y_real: ``[B, q]`` targets of the real images.
        y_syn: ``[m, q]`` targets of the synthetic images.
        lam: ridge in units of the trace of the synthetic kernel, at least 0.
        trace_detach: the trace is a constant in the derivative, as in KRR-ST's code.
        bias: a column of ones behind both features, which is not written.
        reduction: "mean" over the B q errors, or their "sum".
        chunk: real rows at a time; 512 by default.
        form: how it is computed; "auto" takes "primal" where there are fewer features than synthetic rows, and else
            what needs fewer multiplications.
        return_info: also return a `KRRInfo`.
        backend: "auto" or "reference": it is plain torch on every device.

    Returns:
        A scalar, float32 or float64; with ``return_info`` the pair of it and the `KRRInfo`.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: a shape, dtype, device or option does not fit; a kernel that is singular with the largest jitter.
        NotImplementedError: a second derivative is asked for.
    """
    inputs = {"f_real": f_real, "f_syn": f_syn, "y_syn": y_syn, "y_real": y_real}
    _check(inputs, lam, reduction, chunk, form)
    check_plain_backend("krr_loss", backend)
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in inputs.values())
    B, m, d, q = *map(len, (f_real, f_syn)), *(t.shape[1] for t in (f_syn, y_syn))
    if form == "auto":
        form = "primal" if d + bias < m else "weights" if q * (5 * m + 2 * B) < m * (2 * B + m) else "kernel"
    scale = 1 / (B * q) if reduction == "mean" else 1.0
    plan = _Plan(form, float(lam), trace_detach, bias, scale, chunk or _REAL_ROWS, needs)
    found: list[KRRInfo] = []
    # not as a decorator, which would import the whole compiler with this module
    apply = _apply
    if torch.compiler.is_dynamo_compiling():  # whose fullgraph=True raises with these words
        torch._dynamo.graph_break("krr_loss: expected to stay outside the graph, got fullgraph=True")
        apply = torch.compiler.disable(_apply)
    loss = apply(*inputs.values(), plan, found)
    return (loss, found[0]) if return_info else loss


def _apply(*args: Any) -> Tensor:
    with torch.autocast(args[0].device.type, enabled=False):
        return _KRR.apply(*args)[0]


class _Plan(NamedTuple):
    form: str
    lam: float
    trace_detach: bool
    bias: bool
    scale: float
    chunk: int
    needs: tuple[bool, ...]  # f_real, f_syn, y_syn, y_real


class _KRR(torch.autograd.Function):
    """Computes the gradients with the loss, and scales them when they are asked for."""

    @staticmethod
    def forward(
        f_real: Tensor, f_syn: Tensor, y_syn: Tensor, y_real: Tensor, plan: _Plan, found: list[KRRInfo]
    ) -> tuple[Tensor | None, ...]:
        inputs = (f_real, f_syn, y_syn, y_real)
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in inputs]
        loss, gradients, info = _loss_and_gradients(plan, *wide)
        found.append(info)
        return loss.to(wide[0].dtype), *(
            None if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        gradients = output[1:]
        ctx.mark_non_differentiable(*(g for g in gradients if g is not None))
        ctx.save_for_backward(*gradients)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "krr_loss has first derivatives only; pydistill.reference.krr_loss can be differentiated further"
            )
        # the usual loss.backward() hands in a one; to look costs nothing where no GPU has to be waited for
        if grad.device.type == "cpu" and grad == 1:
            return *ctx.saved_tensors, None, None
        return *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors), None, None


def _loss_and_gradients(
    plan: _Plan, f_real: Tensor, f_syn: Tensor, y_syn: Tensor, y_real: Tensor
) -> tuple[Tensor, list[Tensor | None], KRRInfo]:
    inputs = (f_real, f_syn, y_syn, y_real)
    factor, info = _factor(f_syn, _trace(f_syn) + len(f_syn) * plan.bias, plan)
    if factor is None:
        gradients = [torch.full_like(t, math.nan) if need else None for t, need in zip(inputs, plan.needs, strict=True)]
        return f_syn.new_full((), math.nan), gradients, info
    f_real, f_syn, y_syn, y_real = (t.to(factor.dtype) for t in inputs)
    d_real, d_syn, _, d_target = (
        torch.zeros(t.shape, dtype=factor.dtype, device=t.device) if need else None
        for t, need in zip(inputs, plan.needs, strict=True)
    )
    inner = any(plan.needs[1:3])  # whether what lies behind the solve is needed
    sides = _Sides(f_real, f_syn, y_syn, y_real, d_real, d_syn, d_target, factor, plan, inner)
    loss, d_label, d_ridge = {"kernel": _kernel, "weights": _weights, "primal": _primal}[plan.form](sides)
    if d_syn is not None and d_ridge is not None and not plan.trace_detach:
        d_syn.addcmul_(f_syn, d_ridge, value=2 * (plan.lam + info.jitter))
    return loss, [d_real, d_syn, d_label if plan.needs[2] else None, d_target], info


class _Sides(NamedTuple):
    f_real: Tensor
    f_syn: Tensor
    y_syn: Tensor
    y_real: Tensor
    d_real: Tensor | None
    d_syn: Tensor | None
    d_target: Tensor | None
    factor: Tensor
    plan: _Plan
    inner: bool

    def slices(self) -> zip:
        """Real features and targets, and where their gradients go."""
        parts = (self.f_real, self.y_real, self.d_real, self.d_target)
        B, chunk = len(self.f_real), self.plan.chunk
        return zip(*(t.split(chunk) if t is not None else [None] * -(-B // chunk) for t in parts), strict=True)

    def solve(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows, self.factor)

    def errors(self, predicted: Tensor, y: Tensor, d_target: Tensor | None) -> Tensor:
        """The loss's part of a slice; turns predictions into the derivative by them."""
        part = torch.linalg.vector_norm(predicted.sub_(y)).square()
        predicted.mul_(2 * self.plan.scale)
        if d_target is not None:
            torch.neg(predicted, out=d_target)
        return part

    def total(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum() * self.plan.scale


def _kernel(sides: _Sides) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the derivatives by the labels and the ridge."""
    f_syn, A = sides.f_syn, sides.solve(sides.y_syn)  # [m, q]
    dA = torch.zeros(A.shape, dtype=A.dtype, device=A.device)
    kernel = f_syn.new_empty(min(sides.plan.chunk, len(sides.f_real)), len(f_syn))
    parts = []
    for f, y, d_f, d_y in sides.slices():
        k = torch.mm(f, f_syn.T, out=kernel[: len(f)])  # [c, m]
        if sides.plan.bias:
            k.add_(1)
        errors = k @ A  # [c, q]
        parts.append(sides.errors(errors, y, d_y))
        if sides.inner:
            dA.addmm_(k.T, errors)
        if sides.d_syn is not None or d_f is not None:
            torch.mm(errors, A.T, out=k)
        if sides.d_syn is not None:
            sides.d_syn.addmm_(k.T, f)
        if d_f is not None:
            torch.mm(k, f_syn, out=d_f)
    if not sides.inner:
        return sides.total(parts), None, None
    S = sides.solve(dA)
    if sides.d_syn is not None:
        half = S @ A.T
        sides.d_syn.addmm_(half + half.T, f_syn, alpha=-1)
    return sides.total(parts), S, -(S * A).sum()


def _weights(sides: _Sides) -> tuple[Tensor, Tensor | None, Tensor | None]:
    f_syn, A = sides.f_syn, sides.solve(sides.y_syn)
    W = f_syn.T @ A  # [d, q]
    loss, dW, db = _by_weights(sides, W, A.sum(0))
    if not sides.inner:
        return loss, None, None
    S = sides.solve(f_syn @ dW + db)
    if sides.d_syn is not None:
        sides.d_syn.addmm_(A, dW.addmm_(f_syn.T, S, alpha=-1).T).addmm_(S, W.T, alpha=-1)
    return loss, S, -(S * A).sum()


def _primal(sides: _Sides) -> tuple[Tensor, Tensor | None, Tensor | None]:
    f_syn, y, d = sides.f_syn, sides.y_syn, sides.f_syn.shape[1]
    right = f_syn.T @ y
    whole = sides.solve(torch.cat([right, y.sum(0, keepdim=True)]) if sides.plan.bias else right)
    W, b = whole[:d], whole[d:].sum(0)  # of no bias: 0
    loss, dW, db = _by_weights(sides, W, b)
    if not sides.inner:
        return loss, None, None
    d_whole = sides.solve(torch.cat([dW, db[None]]) if sides.plan.bias else dW)
    U = d_whole[:d]
    d_label = torch.addmm(d_whole[d:].sum(0), f_syn, U)  # [m, q]
    if sides.d_syn is not None:
        errors = torch.addmm(y - b, f_syn, W, alpha=-1)
        sides.d_syn.addmm_(errors, U.T).addmm_(d_label, W.T, alpha=-1)
    return loss, d_label, -(d_whole * whole).sum()


def _by_weights(sides: _Sides, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of predictions ``f W + b`` (b of a bias only), and the derivatives by W and b."""
    bias = sides.plan.bias
    dW, db = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (W, b))
    parts = []
    for f, y, d_f, d_y in sides.slices():
        errors = torch.addmm(b, f, W) if bias else f @ W  # [c, q]
        parts.append(sides.errors(errors, y, d_y))
        if sides.inner:
            dW.addmm_(f.T, errors)
            if bias:
                db.add_(errors.sum(0))
        if d_f is not None:
            torch.mm(errors, W.T, out=d_f)
    return sides.total(parts), dW, db


def _trace(f_syn: Tensor) -> Tensor:
    """In float64."""
    if f_syn.device.type == "cpu":
        # norms of rows first: a norm in float64 of them all would convert them all
        trace = torch.linalg.vector_norm(f_syn, dim=1).double().square().sum()
        if float(trace) not in (0, math.inf):  # of squares that float32 does not hold
            return trace
    return f_syn.double().square().sum()


def _factor(f_syn: Tensor, trace: Tensor, plan: _Plan) -> tuple[Tensor | None, KRRInfo]:
    """The Cholesky factor of the form's system, in the first precision and with the first jitter that do; None where
    the trace is not finite."""
    attempts = [(f_syn.dtype, 0.0)] if f_syn.dtype != torch.float64 else []
    attempts += [(torch.float64, jitter) for jitter in (0.0, *_JITTERS)]
    for dtype, jitter in attempts:
        system = _system(f_syn.to(dtype), plan)
        largest, ridge = system.diagonal().max(), (plan.lam + jitter) * trace
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        least = len(system) * torch.finfo(dtype).eps * largest
        found = (failed == 0) & (factor.diagonal().square().min() > least)
        value, good = read(trace, found.double())  # the one that a GPU is waited for
        if not math.isfinite(value):
            return None, KRRInfo(plan.form, f_syn.dtype, math.nan, 0.0)
        if good:
            return factor, KRRInfo(plan.form, dtype, (plan.lam + jitter) * value, jitter)
    raise ValueError(
        f"f_syn: expected rows whose kernel is positive definite with lam {plan.lam} and a jitter of up to "
        f"{_JITTERS[-1]} times its trace, got one of trace {value:.3g} that is singular"
    )


def _system(f_syn: Tensor, plan: _Plan) -> Tensor:
    """The lower triangle of the matrix to which the ridge is added."""
    if plan.form != "primal":
        system = _lower_gram(f_syn)
        return system.add_(1) if plan.bias else system
    system = _lower_gram(f_syn.T)
    if not plan.bias:
        return system
    d = len(system)
    bordered = system.new_zeros(d + 1, d + 1)
    bordered[:d, :d] = system
    bordered[d, :d] = f_syn.sum(0)
    bordered[d, d] = len(f_syn)
    return bordered


def _lower_gram(rows: Tensor) -> Tensor:
    """``rows @ rows.T``, of which only the lower triangle is right."""
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        torch.mm(rows[start:], rows[start : start + _BLOCK].T, out=gram[start:, start : start + _BLOCK])
    return gram


def _check(inputs: dict[str, Tensor], lam: float, reduction: str, chunk: int | None, form: str) -> None:
    like = inputs["f_real"]
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dim() != 2 or not tensor.numel():
            raise ValueError(f"{name}: expected a matrix with at least one element, got shape {list(tensor.shape)}")
        if tensor.dtype != like.dtype or tensor.device != like.device:
            wanted = f"{like.dtype} on {like.device} as f_real"
            raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype} on {tensor.device}")
    B, m, d, q = len(like), len(inputs["f_syn"]), like.shape[1], inputs["y_syn"].shape[1]
    for name, shape in (("f_syn", [m, d]), ("y_syn", [m, q]), ("y_real", [B, q])):
        if list(inputs[name].shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {list(inputs[name].shape)}")
    if not isinstance(lam, (int, float)) or not 0 <= lam < math.inf:
        raise ValueError(f"lam: expected a finite number of at least 0, got {lam!r}")
    check_choice("reduction", reduction, ("mean", "sum"))
    check_choice("form", form, ("auto", "kernel", "weights", "primal"))
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: expected a whole number of at least 1, got {chunk!r}")
