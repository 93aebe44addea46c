"""The loop that trains networks here: a falling learning rate, and a state from which it continues bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pydistill._devices import read

__all__ = ["Batches", "OnEpoch", "half_cosine", "restore_scaler", "restored", "scaler_state", "train"]

Batches = Callable[[int], Iterable[tuple[int, Callable[[], Tensor]]]]
_SCALER = {"scale": float, "_growth_tracker": int}  # of a GradScaler's state, what changes
OnEpoch = Callable[[dict[str, Any], dict[str, Tensor]], None]


def half_cosine(done: float, whole: float) -> float:
    """From 1 to 0 while ``done`` goes from 0 to ``whole``."""
    return 0.5 + 0.5 * math.cos(math.pi * done / whole)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    epochs: int,
    steps: int,
    rate: Callable[[float, int, int], float] | None = None,
    state: dict[str, Tensor] | None = None,
    state_name: str = "optimizer",
    scaler: torch.amp.GradScaler | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: Callable[[], None] | None = None,
) -> list[float]:
    """Trains ``net`` in place, in the mode that it is in, and gives each epoch's mean loss.

    Args:
        net: what is trained.
        optimizer: of parameters of ``net``, new.
        batches: gives an epoch's losses as functions without arguments, each with its weight in the epoch's mean; what
            they draw must depend on the epoch alone if the training is to be continued from a state.
        epochs: passes.
        steps: batches in an epoch.
        rate: maps the optimiser's learning rate, the epoch and its step, both from 0, to the learning rate there; by
            default it falls along half a cosine over all steps.
        state: what ``on_epoch`` got last, to continue from there.
        state_name: name of the optimiser's numbers in the state.
        scaler: of the losses of a network in float16, new; its numbers are part of the state.
        on_epoch: called after each epoch with ``epoch`` and mean ``loss``, and with a state; an exception ends it.
        on_step: called after each step; an exception ends it.

    Raises:
        ValueError: ``state`` is of another network.
        FloatingPointError: an epoch's loss is not finite.
    """
    done = 0
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    if state is not None:
        done = int(state["epoch"])
        _restore(net, optimizer, state, state_name)
        restore_scaler(scaler, state)
    elif scaler.is_enabled():
        _begin(optimizer)
    if rate is None:
        rate = lambda lr, epoch, step: lr * half_cosine(epoch * steps + step, epochs * steps)  # noqa: E731
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for epoch in range(done, epochs):
        values, weights = [], []
        for step, (weight, loss) in enumerate(batches(epoch)):
            for group, highest in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate(highest, epoch, step)
            optimizer.zero_grad()
            value = loss()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            values.append(value.detach())
            weights.append(weight)
            if on_step is not None:
                on_step()
        total = 0.0
        for number, weight in zip(read(*values), weights, strict=True):  # read once an epoch
            total += number * weight
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {total}: a smaller lr than {rates[0]} may help")
        losses.append(total / sum(weights))
        if on_epoch is not None:
            record = {"epoch": epoch + 1, "loss": losses[-1]}
            on_epoch(record, _state(net, optimizer, epoch + 1, state_name) | scaler_state(scaler))
    return losses


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Momentum from zero, which without dampening changes no step: where the first one is left out for an overflow,
    torch's fused SGD would begin with the contents of fresh memory."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _state(net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, state_name: str) -> dict[str, Tensor]:
    state = {"epoch": torch.tensor(epoch, device="cpu")}
    state |= {f"net.{name}": value for name, value in net.state_dict().items()}
    for name, p in net.named_parameters():
        # a parameter that the loss does not use has no gradient and no moments
        kept = optimizer.state.get(p, {})
        state |= {f"{state_name}.{key}.{name}": v for key, v in kept.items() if isinstance(v, Tensor)}
    return state


def _restore(net: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], state_name: str) -> None:
    try:
        net.load_state_dict({key.removeprefix("net."): v for key, v in state.items() if key.startswith("net.")})
    except RuntimeError as error:
        raise ValueError(f"state: expected one of this network ({error})") from error
    for name, p in net.named_parameters():
        for full, value in state.items():
            start, _, rest = full.partition(".")
            key, _, owner = rest.partition(".")
            if start == state_name and owner == name:
                optimizer.state[p][key] = restored(optimizer, key, value, p)


def restored(optimizer: torch.optim.Optimizer, key: str, value: Tensor, p: Tensor) -> Tensor:
    """A number of an optimiser's state of ``p`` as the optimiser itself would hold it: a copy."""
    if key == "step":
        return value.to(p.device if optimizer.defaults.get("fused") else "cpu", copy=True)
    return torch.empty_like(p).copy_(value)  # in the memory format of p, which fused optimisers require


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """What a scaler of losses has learnt; nothing of one that does nothing."""
    found = scaler.state_dict()
    kept = {name: found[name] for name in _SCALER if found}
    return {f"scaler.{name.lstrip('_')}": torch.tensor(value, device="cpu") for name, value in kept.items()}


def restore_scaler(scaler: torch.amp.GradScaler, state: dict[str, Tensor]) -> None:
    """A new scaler as it was when `scaler_state` was called; ValueError if ``state`` holds none."""
    if not scaler.is_enabled():
        return
    try:
        kept = {name: kind(state[f"scaler.{name.lstrip('_')}"]) for name, kind in _SCALER.items()}
    except KeyError as error:
        raise ValueError(f"state: expected one of a training in float16; it lacks {error}") from error
    scaler.load_state_dict(scaler.state_dict() | kept)
