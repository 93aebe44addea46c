"""Distance between the attention maps of real and of synthetic images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill.matching.class_mean import check_classes, class_mean_match
from pydistill.ops.attention_map import AXES, Axis, attention_map, check_power

__all__ = ["attention_match", "match_maps"]

Norm = Literal["l2", "l1", "none"]
Reduction = Literal["sum", "mean", "none"]
_LEAST_NORM = 1e-12  # a map smaller than this is divided by this instead, as in torch.nn.functional.normalize


def attention_match(
    feats_real: Sequence[Tensor],
    feats_syn: Sequence[Tensor],
    labels_real: Tensor,
    labels_syn: Tensor,
    *,
    p: float = 4.0,
    norm: Norm = "l2",
    axis: Axis = "spatial",
    num_classes: int | None = None,
    reduction: Reduction = "sum",
    backend: str = "auto",
) -> Tensor:
    """Squared distance between the class means of normalised attention maps, for all layers and classes at once.

    Equivalent to ::

        A = lambda f: F.normalize(f.abs().pow(p).sum(1).flatten(1), p=2)
        sum((A(r)[labels_real == k].mean(0) - A(s)[labels_syn == k].mean(0)).square().sum()
            for r, s in zip(feats_real, feats_syn) for k in range(num_classes))

    It is DataDAM's loss (Sajedi et al., ICCV 2023: p = 4; its code: p = 1), and with ``axis="both"`` ATOM's (Khaki et
    al., 2024), where channel maps ``f.abs().pow(p).sum((2, 3))`` are matched too. Feature maps are read once; classes
    may have any sizes. For ConvNets, `pydistill.matching.features` and `match_maps` do without feature maps
    altogether. Differentiable in all features, to any order.

    Args:
        feats_real: a tensor ``[B, C, H, W]`` for each layer; floating.
        feats_syn: ``[b, C, H, W]`` likewise, the layers in the same order.
        labels_real: int64 ``[B]`` class numbers.
        labels_syn: int64 ``[b]`` class numbers.
        p: power of the attention, above zero.
        norm: what each map is divided by: its "l2" or "l1" norm, or "none".
        axis: maps over "spatial" positions, over "channel"s, or "both", added up.
        num_classes: K. When None, it is one more than the largest label, which synchronises with the device once;
            nothing else does. ``torch.compile(fullgraph=True)`` needs it.
        reduction: "sum" over layers and classes, "mean" over the classes that the labels name (summed over layers), or
            "none": ``[layers, K]``, with both axes ``[2 * layers, K]``, spatial ones first.
        backend: see `pydistill.ops.attention_map`.

    Returns:
        A scalar, or the distances for reduction "none"; in float32 or float64.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: the lists differ in length or their entries in channels or size (the message names the entry), p is
            not above zero, a class is on one side only, there are no labels, or a label is out of range (labels are
            checked on the CPU only; elsewhere a class that one side lacks makes the loss NaN).
    """
    check_power(p)
    check_choice("axis", axis, AXES)
    _check_lists("feats", feats_real, feats_syn, 4)
    maps_real, maps_syn = (_maps(feats, p, axis, backend) for feats in (feats_real, feats_syn))
    return match_maps(
        maps_real, maps_syn, labels_real, labels_syn, norm=norm, num_classes=num_classes, reduction=reduction
    )


def match_maps(
    maps_real: Sequence[Tensor],
    maps_syn: Sequence[Tensor],
    labels_real: Tensor,
    labels_syn: Tensor,
    *,
    norm: Norm = "l2",
    num_classes: int | None = None,
    reduction: Reduction = "sum",
    backend: str = "auto",
) -> Tensor:
    """`attention_match` of precomputed attention maps, such as those of `pydistill.matching.features`.

    Args:
        maps_real: a tensor ``[B, M]`` for each layer, not normalised.
        maps_syn: ``[b, M]`` likewise.
        backend: "auto" or "reference": it is plain torch on every device.

    Other arguments, results and errors are those of `attention_match`.
    """
    check_choice("norm", norm, ("l2", "l1", "none"))
    check_choice("reduction", reduction, ("sum", "mean", "none"))
    _check_lists("maps", maps_real, maps_syn, 2)
    num_classes = check_classes(labels_real, labels_syn, num_classes)
    found = [
        class_mean_match(
            _normalised(real, norm),
            _normalised(syn, norm),
            labels_real,
            labels_syn,
            num_classes=num_classes,
            reduction=reduction,
            backend=backend,
        )
        for real, syn in zip(maps_real, maps_syn, strict=True)
    ]
    return torch.stack(found) if reduction == "none" else torch.stack(found).sum()


def _maps(feats: Sequence[Tensor], p: float, axis: Axis, backend: str) -> list[Tensor]:
    if axis == "both":
        pairs = [attention_map(f, p, axis, backend=backend) for f in feats]
        return [spatial for spatial, _ in pairs] + [channel for _, channel in pairs]
    return [attention_map(f, p, axis, backend=backend) for f in feats]


def _normalised(maps: Tensor, norm: Norm) -> Tensor:
    if norm == "none" or not maps.shape[1]:
        return maps
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # in units of the largest: squares of a fourth power soon overflow float32
    unit = maps.detach().abs().amax(1, keepdim=True).clamp_min(_LEAST_NORM)
    maps = maps / unit
    length = torch.linalg.vector_norm(maps, 2 if norm == "l2" else 1, dim=1, keepdim=True)
    return maps / length.clamp_min(_LEAST_NORM / unit)


def _check_lists(name: str, real: Sequence[Tensor], syn: Sequence[Tensor], dims: int) -> None:
    for side, tensors in ((f"{name}_real", real), (f"{name}_syn", syn)):
        if isinstance(tensors, Tensor) or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"{side}: expected a sequence of tensors")
        for i, tensor in enumerate(tensors):
            if tensor.dim() != dims:
                wanted = "[N, C, H, W]" if dims == 4 else "[N, M]"
                raise ValueError(f"{side}[{i}]: expected {wanted}, got shape {list(tensor.shape)}")
    if len(real) != len(syn) or not len(real):
        raise ValueError(f"{name}_syn: expected {max(1, len(real))} layers as {name}_real, got {len(syn)}")
    for i, (r, s) in enumerate(zip(real, syn, strict=True)):
        if r.shape[1:] != s.shape[1:]:
            shape, got = list(r.shape[1:]), list(s.shape[1:])
            raise ValueError(f"{name}_syn[{i}]: expected {shape} a sample as {name}_real[{i}], got {got}")
