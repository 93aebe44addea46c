"""Makes a registered operator compose with the rest of torch.

An operator here is a pure function ``name(*tensors, *options)`` whose kernels are registered in C++. From its closed
formulas (fake, vjp, jvp, vmap) `Operator` builds everything the framework asks for:

- eager autograd to the second order, ``torch.func.grad``, ``vmap`` and ``jvp``: an ``autograd.Function`` in its
  ``setup_context`` form, because formulas given to ``register_autograd`` fail under ``torch.func.grad`` and are
  silently wrong under ``torch.func.jvp``;
- ``torch.compile`` and ``torch.export``: the registered operator with fake and autograd formulas, because dynamo does
  not trace a Function that has a ``jvp``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import _library
from pydistill._arguments import check_choice

Formula = Callable[..., Any]


class Operator:
    """``torch.ops.<library>.<name>`` with its first ``tensors`` arguments tensors (or None) and the rest options.

    ``vjp(saved, options, *grads)`` returns a gradient (or None) per tensor, ``jvp(saved, options, *tangents)`` the
    outputs' tangents; both are written in operators, so that they are differentiable in turn. An operator whose
    ``vjp`` is None raises when a gradient is asked for: it never gives a wrong one.

    The last ``kept`` outputs are not results: they have no derivative, and follow the tensors in ``saved`` for a
    ``vjp(saved, options, ctx, *grads)``, which also sees autograd's context. So does that of a ``selective`` operator,
    which need not compute all gradients.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: int,
        fake: Formula,
        vmap: Formula,
        vjp: Formula | None,
        jvp: Formula | None,
        kept: int = 0,
        selective: bool = False,
        differentiable: str = "twice",
        library: str = "pydistill",
    ):
        self.name = name
        self.raw = getattr(getattr(torch.ops, library), name).default
        qualified = f"{library}::{name}"

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            beside = output[-kept:] if kept else ()
            ctx.save_for_backward(*inputs[:tensors], *beside)
            if kept:
                # a caller of the registered operator also sees them, and may keep them
                ctx.owns_kept = getattr(ctx, "_forward_cls", None) is self.function
                ctx.mark_non_differentiable(*beside)
                ctx.set_materialize_grads(False)  # zeros for kept outputs would double their memory
            if hasattr(ctx, "save_for_forward"):  # absent where register_autograd calls
                ctx.save_for_forward(*inputs[:tensors])
            ctx.options = inputs[tensors:]

        def backward(ctx: Any, *grads: Tensor) -> tuple:
            if vjp is None:
                raise NotImplementedError(
                    f"{qualified} has no derivative: the family is differentiable {differentiable}, not more"
                )
            if kept or selective:
                grads = (ctx, *grads)
            return (*vjp(ctx.saved_tensors, ctx.options, *grads), *(None for _ in ctx.options))

        def forward_derivative(ctx: Any, *tangents: Tensor | None) -> Any:
            if jvp is None:
                raise NotImplementedError(f"{qualified} has no forward derivative")
            filled = [
                torch.zeros_like(x) if t is None and x is not None else t
                for x, t in zip(ctx.saved_tensors, tangents, strict=False)
            ]
            return jvp(ctx.saved_tensors, ctx.options, *filled)

        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # otherwise the autograd kernels would run as well
                return self.raw(*args)

        # autograd.Function.apply asks for it in every call, and computing it takes 20 microseconds
        forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]

        kind = type(
            name,
            (torch.autograd.Function,),
            {
                "generate_vmap_rule": True,
                "forward": staticmethod(forward),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(backward),
                "jvp": staticmethod(forward_derivative),
            },
        )
        self.function = cast(type[torch.autograd.Function], kind)
        torch_library.register_fake(qualified, fake)
        torch_library.register_autograd(qualified, backward, setup_context=setup_context)
        torch_library.register_vmap(qualified, vmap)

    def __call__(self, *args: Any) -> Any:
        return self.raw(*args) if torch.compiler.is_dynamo_compiling() else self.function.apply(*args)


def register_filled(library: torch_library.Library, name: str, fake: Formula, fill: Formula) -> None:
    """Register ``pydistill::<name>`` once more, in another library: ``fill(fake(*args), *args)`` on every device.

    So the native operator's schema holds for both, and what is allocated is what the fake promises.
    """
    library.define(str(getattr(torch.ops.pydistill, name).default._schema).removeprefix("pydistill::"))

    def implementation(*args: Any) -> Any:
        outputs = fake(*args)
        fill(outputs, *args)
        return outputs

    for key in ("CPU", "CUDA"):  # HIP's tensors have the key CUDA; the CPU's are for the interpreter
        library.impl(name, implementation, key)


def check_plain_backend(function: str, backend: str) -> None:
    """For what is plain torch on every device: `choose_backend` of no kernels."""
    if backend != "auto":
        choose_backend(function, backend, torch.device("cpu"), ("reference",))


def best_on_gpu(available: Sequence[str], device: torch.device) -> tuple[str | None, dict[str, str]]:
    """What "auto" takes on a GPU, CUDA's kernel or else Triton's; and why none that would have come before it."""
    passed_over: dict[str, str] = {}
    for backend in ("cuda", "triton"):
        reason = _library.unavailable(backend, device) if backend in available else "no such kernel"
        if reason is None:
            return backend, passed_over
        passed_over[backend] = reason
    return None, passed_over


def choose_backend(op: str, backend: str, device: torch.device, available: Sequence[str]) -> str:
    """The backend that runs ``op`` on ``device``: the named one and never another; for "auto" the device's own, which
    on a GPU is the best of those that can run.

    Raises ``ValueError`` for an unknown backend, ``NotImplementedError`` with the reason if it cannot run.
    """
    check_choice("backend", backend, ("auto", "reference", "cpu", "cuda", "triton"))
    if backend == "reference":
        return backend
    # "meta" tensors hold shapes only: the CPU's registration answers for them
    native = {"cpu": "cpu", "meta": "cpu", "cuda": "cuda"}.get(device.type)
    chosen = native if backend == "auto" else backend
    if backend == "auto" and chosen == "cuda" and ("cuda" in available or "triton" in available):
        found, passed_over = best_on_gpu(available, device)
        if found is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
            raise NotImplementedError(f"{op}: no kernel can run on {device} tensors: {reasons}")
        return found
    if chosen is None:
        raise NotImplementedError(f"{op} has no kernel for {device.type} tensors; backend='reference' runs anywhere")
    if chosen not in available:
        raise NotImplementedError(f"{op} has no {chosen} kernel; it has {', '.join(available)}")
    if chosen == "triton":
        if not (device.type == "cuda" or (device.type == "cpu" and _library.triton_is_interpreted)):
            raise NotImplementedError(
                f"{op}: backend='triton' cannot run on {device.type} tensors, but on a GPU's, and on the CPU's in "
                "Triton's interpreter (TRITON_INTERPRET=1 before Python starts)"
            )
    elif chosen != native:
        raise NotImplementedError(f"{op}: backend={chosen!r} cannot run on {device.type} tensors")
    if reason := _library.unavailable(chosen, device):
        raise NotImplementedError(f"{op}: backend={chosen!r} cannot run: {reason}")
    return chosen
