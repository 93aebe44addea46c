"""`check_op`: the properties that every operator must have.

    check_op(pydistill.instance_norm_relu_avg_pool, pydistill.reference.instance_norm_relu_avg_pool, cases)

The operator and its reference are called alike, ``op(*tensors, **options)``. Each check is a function of its own in
`CHECKS`, so that a test file can run them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one kind: ``make(dtype)`` builds the differentiable tensors, the same ones for every dtype."""

    name: str
    make: Callable[[torch.dtype], tuple[Tensor, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)  # besides float64
    order: int = 2  # derivatives that the operator has; if 1, the second and forward mode must be refused


def check_op(
    op: Function,
    reference: Function,
    cases: Iterable[Case],
    *,
    raw_calls: Callable[..., list[tuple[Any, tuple]]] | None = None,
    checks: Iterable[str] | None = None,
) -> None:
    """Compare ``op`` with ``reference`` in every check on every case.

    Args:
        op: the public function, differentiable as often as the cases say.
        reference: its definition in plain torch.
        cases: the inputs.
        raw_calls: from ``(*tensors, **options)`` the registered operators behind ``op`` with arguments, for
            torch's ``opcheck``; None omits that check.
        checks: names from `CHECKS`; all by default.

    Raises:
        AssertionError: names the check, the case and what was off.
    """
    for case in cases:
        for name in CHECKS if checks is None else checks:
            try:
                check = CHECKS[name]
                if check is not None:
                    check(op, reference, case)
                elif raw_calls is not None:
                    check_registrations(raw_calls, case)
            except Exception as error:
                raise AssertionError(f"{name} on {case.name}: {error}") from error


def assert_close(name: str, actual: Tensor, truth: Tensor, plain: Tensor | None = None, rtol: float = 0.0) -> None:
    """Elementwise closeness, direction, size, and no true value turned into zero.

    The bound is twice the error of ``plain`` (torch's own result in the same precision), plus ``rtol`` of the largest
    true value, applied elementwise and, with a quarter of ``rtol``, to the root mean square (with few elements, either
    maximum is luck). Tolerances alone would pass a gradient that is zero where the truth is small.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    if truth.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    actual, truth = actual.detach().double(), truth.detach().double()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    assert plain is None or not plain.isnan().any(), f"{name}: the reference's is NaN in this precision"
    scale = truth.abs().max().item()
    bound = rtol * scale
    if plain is not None:
        bound += 2 * (plain.detach().double() - truth).abs().max().item()
    error = (actual - truth).abs().max().item()
    assert error <= bound, f"{name}: off by {error:.3e}, at most {bound:.3e} allowed"
    if plain is not None:
        spread = (actual - truth).norm().item()
        allowed = 2 * (plain.detach().double() - truth).norm().item() + 0.25 * rtol * truth.norm().item()
        assert spread <= allowed, f"{name}: root mean square off by {spread / allowed:.2f} of what is allowed"
    if scale > 0 and truth.norm() > 1e-6 * truth.numel() ** 0.5 and bound < 0.1 * scale:
        cosine = torch.nn.functional.cosine_similarity(actual.flatten(), truth.flatten(), 0).item()
        assert cosine > 0.999, f"{name}: cosine {cosine:.6f} to the truth"
        relative = ((actual - truth).norm() / truth.norm()).item()
        assert relative < 0.05, f"{name}: relative L2 error {relative:.3e}"
    present = truth.abs() > max(eps, rtol) * scale  # smaller values may be lost to rounding
    if plain is not None:  # torch's own result may have underflowed too
        present &= plain.detach() != 0
    lost = ((actual == 0) & present).sum().item()
    assert lost == 0, f"{name}: {lost} values are zero and should not be"


def _leaves(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in case.make(dtype))


def _weights(like: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Fixed cotangents: normal numbers, rounded to the tensors' dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.dtype) for t in like]


def _orders(function: Function, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, first and second derivatives along fixed cotangents."""
    leaves = _leaves(case, dtype)
    out = function(*leaves, **case.options)
    cotangent = _weights([out], 1)[0].requires_grad_()
    first = torch.autograd.grad(out, leaves, cotangent, create_graph=case.order == 2)
    second: tuple[Tensor, ...] = ()
    if case.order == 2:
        wanted = (*leaves, cotangent)
        second = torch.autograd.grad(first, wanted, _weights(first, 2), allow_unused=True, materialize_grads=True)
    return {
        "output": out,
        **{f"gradient {i}": g for i, g in enumerate(first)},
        **{f"second derivative {i}": g for i, g in enumerate(second)},
    }


def check_values(op: Function, reference: Function, case: Case) -> None:
    """Output, gradients and second derivatives: float64 to rounding, others within twice torch's own error."""
    truth = _orders(reference, case, torch.float64)
    for name, actual in _orders(op, case, torch.float64).items():
        assert_close(f"float64 {name}", actual, truth[name], rtol=1e-11)
    for dtype in case.dtypes:

        def make_rounded(_: torch.dtype, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            return tuple(t.to(dtype).double() for t in case.make(dtype))

        rounded = Case(case.name, make_rounded, case.options, order=case.order)
        truth = _orders(reference, rounded, torch.float64)
        plain = _orders(reference, case, dtype)
        for name, actual in _orders(op, case, dtype).items():
            assert actual.dtype == dtype, f"{dtype} {name}: has dtype {actual.dtype}"
            floor = 16 * torch.finfo(dtype).eps
            assert_close(f"{dtype} {name}", actual, truth[name], plain[name], rtol=floor)


def check_gradcheck(op: Function, reference: Function, case: Case) -> None:
    """Numerical derivatives, first and second order, reverse and forward mode, batched."""
    leaves = _leaves(case, torch.float64)
    if any(t.numel() == 0 or _overlaps(t) for t in leaves):  # nothing to perturb, or not one element at a time
        return
    function = lambda *tensors: op(*tensors, **case.options)  # noqa: E731
    torch.autograd.gradcheck(
        function,
        leaves,
        check_forward_ad=case.order == 2,
        check_batched_grad=True,
        check_batched_forward_grad=case.order == 2,
        fast_mode=True,
    )
    if case.order == 1:
        _check_refused(function, leaves)
        return
    torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def _check_refused(function: Function, leaves: tuple[Tensor, ...]) -> None:
    """A second derivative in any input, even behind a term that has one, raises NotImplementedError."""
    for i, leaf in enumerate(leaves):
        total = function(*leaves).sum() + leaf.pow(3).sum()
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        try:
            torch.autograd.grad(first.sum(), leaf)
        except NotImplementedError:
            continue
        raise AssertionError(f"the second derivative in input {i} was not refused")


def _overlaps(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def check_registrations(raw_calls: Callable[..., list[tuple[Any, tuple]]], case: Case) -> None:
    """``opcheck`` of every registered operator: schema, fake kernel, autograd registration, under AOT autograd."""
    for operator, args in raw_calls(*_leaves(case, torch.float64), **case.options):
        torch_library.opcheck(operator, args)


def check_func(op: Function, reference: Function, case: Case) -> None:
    """``torch.func``: grad, vmap, vmap of grad, jvp, and jvp of grad against the reference."""
    # torch itself writes into the inputs of jvp, which must therefore not be expanded
    tensors = tuple(t.contiguous() if _overlaps(t) else t for t in case.make(torch.float64))
    tangents = tuple(_weights(tensors, 3))
    cotangent = _weights([reference(*tensors, **case.options)], 4)[0]

    def scalar(function: Function) -> Function:
        return lambda *args: (function(*args, **case.options) * cotangent).sum()

    every = tuple(range(len(tensors)))
    first_only = (0, *(None for _ in tensors[1:]))
    Arguments = tuple[Tensor, ...]

    def compare(name: str, transform: Callable[[Function, Arguments, Arguments], Any]) -> None:
        # torch's own group norm views its input under these transforms: the reference gets dense tensors
        dense = tuple(t.contiguous() for t in tensors)
        actual = transform(op, tensors, tuple(torch.stack([t, 2 * t + 1, -t]) for t in tensors))
        truth = transform(reference, dense, tuple(torch.stack([t, 2 * t + 1, -t]) for t in dense))
        flat = torch.utils._pytree.tree_leaves
        for a, t in zip(flat(actual), flat(truth), strict=True):
            assert_close(name, a, t, rtol=1e-11)

    def plain(f: Function) -> Function:
        return lambda *args: f(*args, **case.options)

    compare("func.grad", lambda f, t, _: torch.func.grad(scalar(f), every)(*t))
    if case.order == 2:
        compare("func.jvp", lambda f, t, _: torch.func.jvp(plain(f), t, tangents)[1])
        compare("jvp of grad", lambda f, t, _: torch.func.jvp(torch.func.grad(scalar(f), every), t, tangents)[1])
    else:
        try:
            torch.func.jvp(plain(op), tensors, tangents)
        except NotImplementedError:
            pass
        else:
            raise AssertionError("forward mode was not refused")
    compare("vmap", lambda f, _, batch: torch.func.vmap(plain(f))(*batch))
    compare("vmap of one", lambda f, t, batch: torch.func.vmap(plain(f), first_only)(batch[0], *t[1:]))
    compare("vmap of grad", lambda f, _, batch: torch.func.vmap(torch.func.grad(scalar(f), every))(*batch))


def check_compile(op: Function, reference: Function, case: Case) -> None:
    """``torch.compile(fullgraph=True)`` forward and backward, and ``torch.export``."""
    leaves = _leaves(case, torch.float64)
    function = lambda *tensors: op(*tensors, **case.options)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    out, truth = compiled(*leaves), reference(*leaves, **case.options)
    assert_close("compiled output", out, truth, rtol=1e-11)
    cotangent = _weights([out], 5)[0]
    pairs = zip(torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent), strict=True)
    for i, (actual, expected) in enumerate(pairs):
        assert_close(f"compiled gradient {i}", actual, expected, rtol=1e-11)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    exported = torch.export.export(Module(), tuple(t.detach() for t in leaves)).module()
    assert_close("exported output", exported(*(t.detach() for t in leaves)), truth, rtol=1e-11)


def check_repeats(op: Function, reference: Function, case: Case) -> None:
    """Equal bits across runs and thread counts."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, threads, max(2, threads), 3):
            torch.set_num_threads(count)
            results.append(_orders(op, case, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{name}: bits differ between runs"


def check_nan(op: Function, reference: Function, case: Case) -> None:
    """NaN and Inf inputs give the same as in the reference: NaN in the same places, no crash."""
    for poison in (float("nan"), float("inf")):
        tensors = [t.clone() if _overlaps(t) else t for t in case.make(torch.float32)]
        if tensors[0].numel() == 0:
            return
        tensors[0][tuple(size // 2 for size in tensors[0].shape)] = poison
        actual, truth = (f(*tensors, **case.options).isnan() for f in (op, reference))
        assert torch.equal(actual, truth), f"{poison}: NaN in {actual.sum()} places, in the reference in {truth.sum()}"


CHECKS: dict[str, Callable[[Function, Function, Case], None] | None] = {
    "values": check_values,
    "gradcheck": check_gradcheck,
    "opcheck": None,  # check_registrations, which checks the registered operators instead
    "func": check_func,
    "compile": check_compile,
    "repeats": check_repeats,
    "nan": check_nan,
}
