"""The loop in which networks are trained here: cosine learning rate, a state from which it goes on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OnEpoch", "train"]

OnEpoch = Callable[[dict[str, Any], dict[str, Tensor]], None]


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Callable[[], Tensor]]],
    *,
    epochs: int,
    steps: int,
    state: dict[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Trains ``net`` in place; the learning rate follows half a cosine over all steps, from the optimiser's to zero.

    Args:
        net: in training mode from here on.
        optimizer: of ``net.parameters()``, new.
        batches: gives an epoch's losses as functions without arguments; what they draw depends on the epoch alone.
        epochs: passes.
        steps: batches in an epoch.
        state: what ``on_epoch`` got last, to go on from there.
        on_epoch: called after each epoch with ``epoch`` and mean ``loss``, and with a state; an exception ends it.

    Raises:
        ValueError: ``state`` is of another network.
        FloatingPointError: an epoch's loss is not finite.
    """
    done = 0
    if state is not None:
        done = int(state["epoch"])
        _restore(net, optimizer, state)
    rates = [group["lr"] for group in optimizer.param_groups]
    net.train()
    for epoch in range(done, epochs):
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for step, loss in enumerate(batches(epoch)):
            falling = 0.5 + 0.5 * math.cos(math.pi * (epoch * steps + step) / (epochs * steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * falling
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            total += value.detach().double().cpu()
        if not math.isfinite(float(total)):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {float(total)}: a smaller lr may help")
        if on_epoch is not None:
            on_epoch({"epoch": epoch + 1, "loss": float(total) / steps}, _state(net, optimizer, epoch + 1))


def _state(net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Tensor]:
    state = {"epoch": torch.tensor(epoch, device="cpu")} | {
        f"net.{name}": value for name, value in net.state_dict().items()
    }
    for name, p in net.named_parameters():
        kept = optimizer.state.get(p, {})
        state |= {f"optimizer.{key}.{name}": v for key, v in kept.items() if isinstance(v, Tensor)}
    return state


def _restore(net: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    try:
        net.load_state_dict({key.removeprefix("net."): v for key, v in state.items() if key.startswith("net.")})
    except RuntimeError as error:
        raise ValueError(f"state: expected one of this network ({error})") from error
    for name, p in net.named_parameters():
        for full, value in state.items():
            start, _, rest = full.partition(".")
            key, _, owner = rest.partition(".")
            if start == "optimizer" and owner == name:
                like = value.clone() if key == "step" else value.to(p, copy=True)
                optimizer.state[p][key] = like
