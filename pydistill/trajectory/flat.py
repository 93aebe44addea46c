"""A module seen as a function of one flat parameter vector, and what experts' training does with such vectors.

The operators work on a vector ``[P]`` or on those of E students, ``[E, P]``, each student on its own, in one or two
passes over memory, and never wait for a GPU.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

_log = logging.getLogger("pydistill")
_LEAST_NORM = 1e-12  # a gradient shorter than this counts as this long, so that zero has a direction: none


class FlatModule:
    """``net`` as a function of theta ``[P]``, its parameters flattened and joined in ``net.parameters()`` order.

    Equivalent to filling the parameters by ``nn.utils.vector_to_parameters(theta, net.parameters())`` and calling
    ``net``, but differentiable in theta.

    ``nn.DataParallel``, ``DistributedDataParallel``, a module compiled by ``torch.compile`` and
    `pydistill.compat.ReparamModule` stand for the network inside them. So does the class ReparamModule that the
    trajectory-matching repositories share (a module whose one parameter is ``flat_param`` and whose forward takes
    ``flat_param=``), where one call of it, with its network replaced, shows that it fills the network's parameters from
    consecutive pieces of the vector and does nothing else; where it does not, it is called with ``flat_param=theta``.

    Raises:
        TypeError: net is not a Python module.
        ValueError: it has no parameters, or it is a wrapper with hooks of its own.
    """

    def __init__(self, net: nn.Module):
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: expected an nn.Module, got {type(net).__name__}")
        if isinstance(net, torch.jit.ScriptModule):
            raise TypeError(f"net: expected the nn.Module that was scripted, got a {type(net).__name__}")
        net = _unwrapped(net)
        self._flat_param: nn.Parameter | None = None  # of a foreign ReparamModule
        self._called_with_theta = False
        self._aliases: dict[str, str] = {}
        self.net: nn.Module
        self.names: list[str]
        self.shapes: list[torch.Size]
        if _is_reparametrised(net):
            self._flat_param = flat_param = cast(nn.Parameter, net.flat_param)
            pieces = _pieces(net)
            if pieces is None:
                self.net, self._called_with_theta = net, True
                self.names, self.shapes = ["flat_param"], [flat_param.shape]
            else:
                self.net = cast(nn.Module, net.module)
                self.names, self.shapes, self._aliases = pieces
            trained = [True] * len(self.names)
        else:
            self.net = net
            self.names = [name for name, _ in net.named_parameters()]
            self.shapes = [p.shape for p in net.parameters()]
            trained = [p.requires_grad for p in net.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.numel = sum(self.sizes)
        # a net with nothing to train is only a template: all of theta is trained
        self.frozen = [not each for each in trained] if any(trained) else [False] * len(trained)
        if self.numel == 0:
            raise ValueError("net: it has no parameters")

    def parameters(self) -> Tensor:
        """The module's own parameters as one detached vector ``[P]``."""
        if self._flat_param is not None:
            return self._flat_param.detach().clone()
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's first parameter."""
        return self._flat_param.dtype if self._flat_param is not None else next(self.net.parameters()).dtype

    @torch.no_grad()
    def overwrite(self, theta: Tensor) -> None:
        """Give the module the parameters theta ``[P]``."""
        if self._flat_param is not None:
            self._flat_param.copy_(theta)
            return
        own = self.unflatten(theta)
        for name, parameter in self.net.named_parameters():
            parameter.copy_(own[name])

    def trained(self, like: Tensor, unused: Iterable[str] = ()) -> Tensor | None:
        """``[P]`` like ``like``: zero where a parameter is frozen or one of ``unused``, else one; None: no zeros."""
        still = [frozen or name in unused for frozen, name in zip(self.frozen, self.names, strict=True)]
        if not any(still):
            return None
        return torch.cat([like.new_full((size,), not each) for size, each in zip(self.sizes, still, strict=True)])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta by parameter name."""
        if theta.shape != (self.numel,):
            raise ValueError(f"theta: expected shape [{self.numel}] for this net, got {list(theta.shape)}")
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def __call__(self, theta: Tensor, *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """``net(*inputs)`` at theta; ``buffers`` stand in for the module's own, which are then left untouched."""
        return self.at(self.unflatten(theta), *inputs, buffers=buffers, **kwargs)

    def at(
        self, named: Mapping[str, Tensor], *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """``net(*inputs)`` with the parameters that `unflatten` gave, or others by their names."""
        if self._called_with_theta:
            kwargs["flat_param"] = named["flat_param"]
        tied = {alias: named[name] for alias, name in self._aliases.items()}
        return functional_call(self.net, {**named, **tied, **(buffers or {})}, inputs, kwargs)


def _unwrapped(net: nn.Module) -> nn.Module:
    while True:
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = net.module
        elif compiler is not None and isinstance(net, compiler.OptimizedModule):
            inner = net._orig_mod
        else:
            inner = getattr(net, "reparametrised", None)  # a wrapper names the network that its flat vector belongs to
            if not isinstance(inner, nn.Module):
                return net
        if net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks:
            raise ValueError(
                f"net: expected the {type(inner).__name__} inside, got a {type(net).__name__} with hooks of its own, "
                "which would not be called"
            )
        net = inner


def _is_reparametrised(net: nn.Module) -> bool:
    own = [name for name, _ in net.named_parameters()]
    return own == ["flat_param"] and "flat_param" in inspect.signature(type(net).forward).parameters


def _pieces(net: nn.Module) -> tuple[list[str], list[torch.Size], dict[str, str]] | None:
    """Names, shapes and aliases of the parameters that a foreign ReparamModule sets in its ``module``, in the order
    of the flat vector; None where it does anything else."""
    inner = getattr(net, "module", None)
    if not isinstance(inner, nn.Module) or "forward" in vars(inner) or has_hooks(net) or has_hooks(inner):
        return None
    theta = cast(Tensor, net.flat_param).detach().clone()
    storage = theta.untyped_storage().data_ptr()
    image, logits = (theta.new_zeros(1, 1, 1, 1) for _ in range(2))
    seen: dict[tuple[int, torch.Size], list[str]] = {}

    def stand_in(*inputs: Any, **kwargs: Any) -> Tensor:
        if len(inputs) == 1 and inputs[0] is image and not kwargs:
            for path, module in inner.named_modules():
                for leaf, value in vars(module).items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == storage:
                        at = (int(value.storage_offset()), value.shape)
                        if value.is_contiguous():
                            seen.setdefault(at, []).append(f"{path}.{leaf}" if path else leaf)
        return logits

    inner.forward = stand_in
    try:
        plain = net(image, flat_param=theta) is logits
    except Exception as error:
        _log.debug("net: %s is called as it is, as one call of it raised %r", type(net).__name__, error)
        return None
    finally:
        del inner.forward
    places = sorted(seen)
    ends = [offset + shape.numel() for offset, shape in places]
    if not plain or [offset for offset, _ in places] != [0, *ends[:-1]] or ends[-1] != len(theta):
        return None
    names = [seen[place][0] for place in places]
    aliases = {alias: seen[place][0] for place in places for alias in seen[place][1:]}
    return names, [shape for _, shape in places], aliases


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its forward: its hooks, or those on all modules."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or torch.nn.modules.module._has_any_global_hook()


@torch.no_grad()
def ema_(average: Tensor, theta: Tensor, decay: float) -> Tensor:
    """Moves an exponential moving average in place: ``average = decay average + (1 - decay) theta``.

    FTD (Du et al., CVPR 2023) averages the synthetic images this way; any shape will do. Equivalent to
    ``average.lerp_(theta, 1 - decay)``, but theta may be of another dtype.

    Args:
        average: floating, any shape; overwritten.
        theta: floating, the shape and device of average.
        decay: in [0, 1].

    Returns:
        average itself.

    Raises:
        ValueError: decay is outside [0, 1], or the shapes differ.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
    _check_same_shape("average", average, "theta", theta)
    return average.lerp_(theta.to(average.dtype), 1 - decay)


def sam_perturbation(grad: Tensor, rho: float, theta: Tensor | None = None) -> Tensor:
    """The step towards the sharpest neighbour within ``rho``: ``rho grad / ||grad||``, zero where grad is zero.

    SAM (Foret et al., ICLR 2021). With ``theta`` the neighbourhood is ASAM's (Kwon et al., ICML 2021), the default of
    FTD's code: ``rho theta^2 grad / || |theta| grad ||``, which does not depend on how a layer is scaled.

    Args:
        grad: floating ``[P]`` or ``[E, P]``, at theta; a row whose norm is below 1e-12 is divided by that instead.
        rho: radius, a number >= 0.
        theta: as grad, or None.

    Returns:
        What to add to theta, as grad.

    Raises:
        ValueError: rho is negative, or the shapes differ.
    """
    if not rho >= 0:
        raise ValueError(f"rho: expected a number >= 0, got {rho}")
    if theta is not None:
        _check_same_shape("grad", grad, "theta", theta)
        grad = theta * grad
    norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    step = grad * (rho / norm.clamp_min(_LEAST_NORM))
    return step if theta is None else step * theta


def gsam_combine(grad_perturbed: Tensor, grad: Tensor, alpha: float) -> Tensor:
    """``grad_perturbed - alpha * (the part of grad orthogonal to grad_perturbed)``.

    GSAM (Zhuang et al., ICLR 2022), with which FTD (Du et al., CVPR 2023) trains its experts. With c =
    <grad, grad_perturbed> / ||grad_perturbed||^2 it is ``(1 + alpha c) grad_perturbed - alpha grad``; where
    grad_perturbed is zero, all of grad is orthogonal to it.

    Args:
        grad_perturbed: ``[P]`` or ``[E, P]``, at theta + `sam_perturbation`.
        grad: as grad_perturbed, at theta.
        alpha: weight of the orthogonal part; 0 is SAM.

    Returns:
        The gradient to descend along, as grad_perturbed.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("grad_perturbed", grad_perturbed, "grad", grad)
    inner = torch.linalg.vecdot(grad, grad_perturbed)
    squared = torch.linalg.vecdot(grad_perturbed, grad_perturbed)
    ratio = (inner / squared).masked_fill(squared == 0, 0)[..., None]
    return torch.addcmul(grad * -alpha, grad_perturbed, 1 + alpha * ratio)


def perturb_towards(theta: Tensor, direction: Tensor, alpha: float, flat: FlatModule | None = None) -> Tensor:
    """``theta * (1 + alpha direction / ||direction||)``: a start near an expert's, each weight moved in proportion.

    AST (Shen et al., 2023), which draws the direction from a normal distribution. With ``flat``, as in its code: each
    convolution's weight with its own piece of the direction and that piece's norm, the other parameters unchanged.

    Args:
        theta: ``[P]`` or ``[E, P]``.
        direction: as theta; zero perturbs nothing.
        alpha: how far.
        flat: the module that theta parametrises, of which only tensors of four dimensions are perturbed; None: theta
            as one tensor.

    Returns:
        The perturbed parameters, as theta.

    Raises:
        ValueError: the shapes differ, or are not flat's.
    """
    _check_same_shape("theta", theta, "direction", direction)
    if flat is None:
        return torch.addcmul(theta, theta, sam_perturbation(direction, 1.0), value=alpha)
    if theta.shape[-1] != flat.numel:
        raise ValueError(f"theta: expected shape [..., {flat.numel}] for this net, got {list(theta.shape)}")
    parts = zip(theta.split(flat.sizes, -1), direction.split(flat.sizes, -1), flat.shapes, strict=True)
    return torch.cat([perturb_towards(w, d, alpha) if len(shape) == 4 else w for w, d, shape in parts], -1)


def l2_to_reference(theta: Tensor, reference: Tensor) -> Tensor:
    """``(theta - reference).square().sum(-1)``: the squared distance of each student, differentiable.

    The numerator and the denominator of the trajectory-matching loss (Cazenavette et al., CVPR 2022), and a pull
    towards pre-trained parameters.

    Args:
        theta: ``[P]`` or ``[E, P]``.
        reference: as theta, or ``[P]`` for all students.

    Returns:
        A scalar, or ``[E]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    if reference.shape not in (theta.shape, theta.shape[-1:]):
        raise ValueError(f"reference: expected shape {list(theta.shape)} as theta, got {list(reference.shape)}")
    difference = theta - reference
    return torch.linalg.vecdot(difference, difference)


def _check_same_shape(name: str, tensor: Tensor, other: str, second: Tensor) -> None:
    if tensor.shape != second.shape:
        raise ValueError(f"{other}: expected shape {list(tensor.shape)} as {name}, got {list(second.shape)}")
