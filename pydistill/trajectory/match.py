"""Trajectory matching: how far a student trained on synthetic images ends from an expert's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from pydistill._arguments import check_choice
from pydistill.trajectory.arguments import check_theta
from pydistill.trajectory.flat import FlatModule, l2_to_reference
from pydistill.trajectory.unrolling import unroll


def trajectory_match(
    net: nn.Module,
    theta0: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    *,
    steps: int,
    targets: Mapping[int, Tensor] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    **options: Any,
) -> Tensor:
    """The loss of MTT (Cazenavette et al., CVPR 2022), differentiable in images, labels, lr and theta0.

    Equivalent to ``(theta_T - target).square().sum() / (theta0 - target).square().sum()`` with
    ``theta_T = pydistill.unroll(net, theta0, images, labels, lr, steps=steps, **options)``.

    Args:
        net, theta0, images, labels, lr, steps, **options: as for `pydistill.unroll` (without ``at``).
        target: ``[P]``, the expert's parameters to reach, dtype and device of theta0; ``[E, P]`` for E students,
            several segments of experts at once.
        targets: intermediate targets by step number in 1..T (AST, Shen et al., 2023): each adds the same ratio with
            the parameters after that step and its own target.
        reduction: "mean" over students, or "none".

    Returns:
        The loss, a scalar; with E students their mean, or ``[E]`` for reduction "none".

    Raises:
        TypeError, ValueError: as `pydistill.unroll`, or a target of the wrong kind, or equal to theta0 (on a GPU, where
            the host would have to wait to see it, the loss is then not finite).
        FloatingPointError: as `pydistill.unroll`.
    """
    check_choice("reduction", reduction, ("mean", "none"))
    if "at" in options:
        raise TypeError("at: expected no such option; trajectory_match takes targets={step: parameters}")
    if not isinstance(theta0, Tensor):
        raise TypeError(f"theta0: expected a tensor, got {type(theta0).__name__}")
    for t in targets or {}:
        if not isinstance(t, int) or not isinstance(steps, int) or not 1 <= t <= steps:
            raise ValueError(f"targets: expected step numbers in 1..{steps}, got {t!r}")
    pairs = [(f"targets[{t}]", t, goal) for t, goal in (targets or {}).items()] + [("target", steps, target)]
    for name, _, goal in pairs:
        if not isinstance(goal, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(goal).__name__}")
        if goal.shape != theta0.shape:
            check_theta(FlatModule(net), theta0)  # or it is that one which is wrong
        if goal.shape != theta0.shape or goal.dtype != theta0.dtype or goal.device != theta0.device:
            raise ValueError(
                f"{name}: expected {theta0.dtype} {list(theta0.shape)} on {theta0.device} as theta0, "
                f"got {goal.dtype} {list(goal.shape)} on {goal.device}"
            )
    thetas = unroll(net, theta0, images, labels, lr, steps=steps, at=[t for _, t, _ in pairs], **options)
    loss = theta0.new_zeros(theta0.shape[:-1])
    for (name, _, goal), theta in zip(pairs, thetas, strict=True):
        distance = l2_to_reference(theta0, goal)
        if not distance.is_cuda and (distance == 0).any():  # on a GPU the loss is not finite
            raise ValueError(f"{name}: it equals theta0, which leaves no distance to normalise by")
        loss = loss + l2_to_reference(theta, goal) / distance
    return loss.mean() if reduction == "mean" else loss
