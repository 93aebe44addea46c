"""A network's attention maps, of its activations, and its embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydistill.nn import InstanceNormReLUAvgPool
from pydistill.ops import attention_map
from pydistill.ops._precision import Precision, check_switches
from pydistill.ops.attention_map import AXES, Axis, check_power
from pydistill.ops.convnet_step import Workspace
from pydistill.ops.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool
from pydistill.trajectory import FlatModule
from pydistill.trajectory.generic import GenericStudents
from pydistill.trajectory.step import saved_tensors
from pydistill.trajectory.students import ConvNetStudents, Engine, choose_students

__all__ = ["Features", "features"]

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU, nn.GELU)


class Features(NamedTuple):
    """For N images: a map per attended activation, from first to last, and the embedding."""

    spatial: tuple[Tensor, ...]  # [N, H_l * W_l] each; none for axis "channel"
    channel: tuple[Tensor, ...]  # [N, C_l] each; none for axis "spatial"
    embedding: Tensor  # [N, F], what the classifier sees


def features(
    net: nn.Module,
    theta: Tensor,
    images: Tensor,
    *,
    p: float = 4.0,
    axis: Axis | None = "spatial",
    layers: Sequence[int] | None = None,
    precision: Precision = "auto",
    engine: Engine = "auto",
    workspace: Workspace | None = None,
) -> Features:
    """Attention maps of a network's activations, before normalisation, and its embedding.

    With ``a_l`` the output of activation l, equivalent to ``a_l.abs().pow(p).sum(1).flatten(1)`` and
    ``a_l.abs().pow(p).sum((2, 3))``, and to ``net.embed(images)``: what DataDAM (Sajedi et al., ICCV 2023), ATOM (Khaki
    et al., 2024) and DM (Zhao and Bilen, WACV 2023) match. On the CPU, ConvNets of the student engine
    (`pydistill.info.engine` says which) take a few images at a time through all layers, so that only activations needed
    for a derivative with respect to the images are written: up to 256 MiB of them are kept, the rest is recomputed.
    The result's own second derivative raises ``NotImplementedError``. Other nets, other devices, and theta that
    requires a gradient run on autograd, in the net's current mode and without touching its buffers; the maps are then
    those of the ``[N, C, H, W]`` outputs of its ReLU, LeakyReLU, Sigmoid, SiLU and GELU modules, in the order in which
    they are called, and the embedding is the input of its last nn.Linear.

    Args:
        net: its structure; the parameters come from ``theta``.
        theta: ``[P]`` in ``net.parameters()`` order, floating.
        images: ``[N, C, H, W]``, dtype and device of theta.
        p: the power, above zero.
        axis: "spatial" maps, "channel" maps, "both", or None: the embedding alone.
        layers: which activations have maps, counted from 0; by default all but the last, as in DataDAM.
        precision: as in `pydistill.unroll`. On CUDA, where autograd runs the net, only "bf16" (autocast) and what
            torch's switches say.
        engine: "student", "generic" or "auto", as in `pydistill.unroll`.
        workspace: working memory of the student engine to reuse; fresh when None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: theta or images were changed in place between the forward pass and its backward pass.
    """
    flat = FlatModule(net)
    for name, tensor in (("theta", theta), ("images", images)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if theta.shape != (flat.numel,):
        raise ValueError(f"theta: expected shape [{flat.numel}] for this net, got {list(theta.shape)}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images: expected [N, C, H, W] with at least one image, got shape {list(images.shape)}")
    if images.dtype != theta.dtype or images.device != theta.device:
        wanted, got = (f"{t.dtype} on {t.device}" for t in (theta, images))
        raise ValueError(f"images: expected {wanted} as theta, got {got}")
    if axis is not None and axis not in AXES:
        raise ValueError(f"axis: expected 'spatial', 'channel', 'both' or None, got {axis!r}")
    check_power(p)
    blocked = None
    if theta.requires_grad and torch.is_grad_enabled():
        blocked = "theta requires a gradient, which the features of the student engine do not have"
    elif images.device.type != "cpu":
        blocked = f"its features have no kernel for {images.device.type} tensors"
    if engine == "compiled":
        raise ValueError("engine: expected 'auto', 'student' or 'generic', got 'compiled', which trains students")
    students = choose_students(engine, flat, images, "hard", "any", 0, precision, blocked)
    if isinstance(students, GenericStudents):
        check_switches(students.precision, images.device, images.dtype, "which features by autograd follow")
        return _by_autograd(flat, theta, images, p, axis, layers, students.precision == "bf16")
    if workspace is not None:
        students.workspace = workspace
    shape = students.shape
    attended = () if axis is None else _chosen(layers, len(shape.layers))
    options = (p, attended, axis or "spatial", torch.is_grad_enabled() and images.requires_grad)
    spatial, channel, embedding = _Features.apply(images, theta.detach()[None], students, options)
    maps: list[tuple[Tensor, ...]] = []
    for rows, sizes in (
        (spatial, [shape.layers[block].height * shape.layers[block].width for block in attended]),
        (channel, [shape.layers[block].out_channels for block in attended]),
    ):
        maps.append(tuple(rows.split(sizes, 1)) if rows.shape[1] else ())
    return Features(maps[0], maps[1], embedding)


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(count - 1))
    if sorted(set(layers)) != list(layers) or any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"layers: expected ascending numbers out of 0..{count - 1}, got {list(layers)}")
    return tuple(layers)


class _Features(torch.autograd.Function):
    """images [N, C, H, W], theta [1, P]: maps side by side and embedding, [N, ...]."""

    @staticmethod
    def forward(
        images: Tensor, theta: Tensor, students: ConvNetStudents, options: tuple[float, tuple[int, ...], Any, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        spatial, channel, embedding = students.features(theta, images.detach(), *options)
        return spatial[0], channel[0], embedding[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        images, theta, ctx.students, (ctx.p, ctx.attended, *_) = inputs
        ctx.save_for_backward(images, theta)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "features: those of the student engine are differentiable once; engine='generic' goes further"
            )
        images, theta = saved_tensors(ctx, "images, theta")
        own = [None if g is None or not g.numel() else g.contiguous()[None] for g in grads]
        return ctx.students.features_backward(theta, images.detach(), own, ctx.p, ctx.attended)[0], None, None, None


def _by_autograd(
    flat: FlatModule,
    theta: Tensor,
    images: Tensor,
    p: float,
    axis: Axis | None,
    layers: Sequence[int] | None,
    half: bool,
) -> Features:
    linear = [module for module in flat.net.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"net: expected an nn.Linear to take the embedding from, {type(flat.net).__name__} has none")
    wanted = axis is not None
    maps: list[Any] = []
    embedding: list[Tensor] = []

    def observe(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, InstanceNormReLUAvgPool):  # its activation is inside: run it again without the pool
            if not module.relu:
                return
            if module.pool:
                output = instance_norm_relu_avg_pool(inputs[0], module.weight, module.bias, eps=module.eps, pool=False)
        if output.dim() == 4 and axis is not None:
            maps.append(attention_map(output, p, axis))

    with contextlib.ExitStack() as stack:
        kinds = (*_ACTIVATIONS, InstanceNormReLUAvgPool)
        for module in flat.net.modules() if wanted else ():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(observe).remove)
        seen = linear[-1].register_forward_pre_hook(lambda module, inputs: embedding.append(inputs[0]))
        stack.callback(seen.remove)
        if half:
            stack.enter_context(torch.autocast(images.device.type, dtype=torch.bfloat16))
        flat(theta, images, buffers={name: b.clone() for name, b in flat.net.named_buffers()})
    if not embedding:
        raise ValueError("net: expected its forward to call its last nn.Linear, whose input is the embedding")
    chosen = [maps[layer] for layer in _chosen(layers, len(maps))] if wanted else []
    spatial = [m[0] if axis == "both" else m for m in chosen] if axis != "channel" else []
    channel = [m[1] if axis == "both" else m for m in chosen] if axis != "spatial" else []
    return Features(tuple(spatial), tuple(channel), embedding[-1].flatten(1).to(theta.dtype))
