"""Expert trajectories, which trajectory matching imitates.

An expert is a network trained on the real images by SGD, with its parameters kept after every epoch ("Dataset
Distillation by Matching Training Trajectories", Cazenavette et al., CVPR 2022, calls them a buffer).
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydistill._arguments import check_whole
from pydistill._atomic import PathLike
from pydistill.ops._precision import resolved
from pydistill.seeding import Stream, seeded_generator, seeded_net
from pydistill.trajectory.arguments import check_rate
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.recognition import trains_at_once
from pydistill.trajectory.store import ExpertStore, StoreDtype
from pydistill.trajectory.train import DivergedError, Schedule, schedule_factors, train_students

__all__ = ["data_crc32", "train_experts"]

# A step of this many images keeps a machine busy; more experts at once would only make an interruption cost more.
_IMAGES_AT_ONCE = 1024


def data_crc32(images: Tensor, labels: Tensor) -> int:
    """The checksum by which a store recognises the images ``[N, C, H, W]`` and labels ``[N]`` of its experts."""
    found = 0
    for part in (*images.split(256), labels):
        found = zlib.crc32(part.cpu().contiguous().numpy().data, found)
    return found


def train_experts(
    make_net: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    path: PathLike,
    *,
    num_experts: int,
    epochs: int,
    lr: float = 0.01,
    batch_size: int = 256,
    momentum: float = 0.0,
    schedule: Schedule = None,
    seed: int = 0,
    augment: Any = None,
    dtype: StoreDtype = "fp32",
    dataset: str | None = None,
    overwrite: bool = False,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> ExpertStore:
    """Trains experts by SGD on the cross-entropy and stores their flat parameters after every epoch.

    The order of the batches depends on ``(seed, expert, epoch)`` alone, and the store keeps what an epoch continues
    (the velocity with momentum, float32 parameters beside bfloat16 rows): training interrupted at any moment continues
    from the last whole epoch and ends with the same bytes as an uninterrupted run. Where experts can be trained at once
    (`pydistill.train_students`), a few go through their epochs together.

    Args:
        make_net: builds a network of float32 parameters that gives logits ``[B, K]``.
        images: float32 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        path: the store's file. An existing one is continued.
        num_experts: how many experts, E.
        epochs: passes over the images, each followed by a snapshot.
        lr: SGD's learning rate.
        batch_size: images per SGD step.
        momentum: SGD's; an epoch continues the velocity of the one before.
        schedule: as in `pydistill.train_students`, over all epochs.
        seed: of the initial parameters and the order of the batches.
        augment: None, or an object with ``draw(shape, generator) -> record`` and ``__call__(images, record)``.
        dtype: of the stored rows, "fp32" or "bf16"; experts train in float32 either way.
        dataset: name of the images' data set, which the store keeps.
        overwrite: start afresh, whatever is at ``path``.
        on_step: called after each SGD step of each expert; an exception from it ends the training, whole epochs stay
            stored.
        on_epoch: called for each epoch of each expert, before it is stored: ``expert``, ``epoch`` (1-based),
            ``loss`` and ``accuracy`` (on the batches as they were trained on).
        options: further options of `pydistill.train_students`, such as weight_decay, sharpness, smoothing, engine and
            precision; recorded, so they must be what JSON can hold, or dataclasses of such. The precision "auto" is
            decided when a store is begun, and stays.

    Returns:
        The store, ``[E, epochs + 1, P]``, complete and open for reading: snapshot 0 is the initialisation, parameters
        are flat in ``net.parameters()`` order.

    Raises:
        TypeError: an option that `pydistill.train_students` does not know, or that JSON cannot hold.
        ValueError: a count below 1, labels that do not match the images, or a file at ``path`` that is not a store, or
            is of a training with other options or on other images.
        FloatingPointError: an expert's loss or parameters stop being finite; its number, epoch and step are named.
    """
    for name, value in (("num_experts", num_experts), ("epochs", epochs), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    check_rate("momentum", momentum)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images: expected [N, C, H, W] with at least one image, got shape {list(images.shape)}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected torch.int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    factors = schedule_factors(schedule, epochs)
    options = _with_precision(options, images, None if overwrite or not Path(path).exists() else path)
    nets = [seeded_net(make_net, seed, Stream.EXPERT, expert, device=images.device) for expert in range(num_experts)]
    header = {
        "experts": num_experts,
        "epochs": epochs,
        "dtype": dtype,
        "state": ["theta"] * (dtype != "fp32") + ["velocity"] * (momentum > 0),
        "dataset": dataset,
        "data_crc32": data_crc32(images, labels),
        "options": {
            **{"lr": lr, "batch_size": batch_size, "momentum": momentum, "seed": seed},
            "schedule": factors if callable(schedule) else schedule,
            # without the address that the default repr has
            "augment": None if augment is None else re.sub(" at 0x[0-9a-f]+", "", repr(augment)),
            **{name: _plain(name, value) for name, value in options.items()},
        },
    }
    options = {"precision": "ieee", **options}
    start = torch.stack([FlatModule(net).parameters().cpu() for net in nets])

    # a throwaway step: what train_students refuses is refused before a file is made or overwritten
    two = torch.stack([labels.argmax(), labels.argmin()])
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        train_students(
            copy.deepcopy(nets[0]),
            start[:1].to(images.device),
            images[two],
            labels[two],
            epochs=1,
            lr=lr,
            batch_size=batch_size,
            momentum=momentum,
            check_finite=False,
            **_of_epoch(options, 0),
        )
    at_once = -(-_IMAGES_AT_ONCE // min(batch_size, len(images))) if trains_at_once(nets[0], images) else 1
    with _open(path, nets[0], header, start, overwrite) as store:
        for group in _groups(store.completed, at_once):
            theta, velocity = (each.to(images.device) for each in _state(store, group))
            for epoch in range(store.completed[group.start], epochs):
                if schedule == "step" and epoch == (epochs + 1) // 2:
                    velocity.zero_()
                try:
                    trained = train_students(
                        nets[group.start],
                        theta,
                        images,
                        labels,
                        epochs=1,
                        lr=lr,
                        batch_size=batch_size,
                        schedule=lambda *_, factor=factors[epoch]: factor,
                        momentum=momentum,
                        velocity0=velocity if momentum else None,
                        augment=augment,
                        generator=[seeded_generator(seed, Stream.EXPERT_BATCHES, expert, epoch) for expert in group],
                        train_accuracy=on_epoch is not None,
                        on_step=on_step,
                        **_of_epoch(options, epoch),
                    )
                except DivergedError as error:
                    raise FloatingPointError(
                        f"lr: expected a rate at which training stays finite, got {lr}: "
                        f"{error.what.format(f'expert {group[error.student]}')} in epoch {epoch + 1}, "
                        f"step {error.step}"
                    ) from None
                theta = trained.theta
                if momentum:
                    assert trained.velocity is not None
                    velocity = trained.velocity
                if on_epoch is not None:
                    assert trained.train_accuracy is not None  # as it was asked for
                    losses, accuracies = trained.losses[0].tolist(), trained.train_accuracy[0].tolist()
                    for expert, loss, accuracy in zip(group, losses, accuracies, strict=True):
                        on_epoch({"expert": expert, "epoch": epoch + 1, "loss": loss, "accuracy": accuracy})
                _append(store, group, epoch + 1, theta, velocity)
    return ExpertStore(path)


def _with_precision(options: dict[str, Any], images: Tensor, continued: PathLike | None) -> dict[str, Any]:
    """The options, with the precision "auto" decided; left out where it is "ieee", which no store names."""
    if options.get("precision", "auto") != "auto":
        return options
    if continued is None:
        now = resolved("auto", images.device)
        kept = None if now == "ieee" else now
    else:
        with ExpertStore(continued) as store:
            kept = store.options.get("precision")
    rest = {name: value for name, value in options.items() if name != "precision"}
    return rest if kept is None else rest | {"precision": kept}


def _groups(completed: list[int], at_once: int) -> Iterator[range]:
    """Experts to train together. As their last bits may depend on it, a group is trained together throughout."""
    for first in range(0, len(completed), at_once):
        members = range(first, min(first + at_once, len(completed)))
        together = len({completed[expert] for expert in members}) == 1
        yield from [members] if together else [range(expert, expert + 1) for expert in members]


def _of_epoch(options: dict[str, Any], epoch: int) -> dict[str, Any]:
    """The options that make a training of one epoch that of ``epoch``."""
    smoothing = options.get("smoothing")
    if smoothing is None:
        return options
    return options | {"smoothing": replace(smoothing, loss_decay=smoothing.loss_decay[epoch : epoch + 1])}


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected what JSON can hold, to be recorded, got {type(value).__name__}") from error


def _open(path: PathLike, net: nn.Module, header: dict[str, Any], start: Tensor, overwrite: bool) -> ExpertStore:
    """The store to continue, with each expert's initialisation in it."""
    if overwrite or not Path(path).exists():
        store = ExpertStore.create(path, net, **header, overwrite=overwrite)
    else:
        store = ExpertStore(path, writable=True)
    try:
        _check_same(store, header)
        store.check_fits(net)
        if not store.holds(0, 0):
            _append(store, range(len(start)), 0, start, torch.zeros_like(start))
        stored = start.to(torch.bfloat16).float() if store.dtype == "bf16" else start
        for expert, row in enumerate(stored):
            if not torch.equal(store.row(expert, 0), row):
                raise ValueError(f"{path}: expected experts that start as make_net's networks do, got others")
    except BaseException:
        store.close()
        raise
    return store


def _check_same(store: ExpertStore, header: dict[str, Any]) -> None:
    wanted = header | header["options"]
    found = store.header | store.options
    for name in sorted((wanted | store.options).keys() - {"options"}):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{store.path}: expected experts trained with {name}={wanted.get(name)!r}, got {found.get(name)!r}; "
                "overwrite=True starts anew"
            )


def _append(store: ExpertStore, group: range, epoch: int, theta: Tensor, velocity: Tensor) -> None:
    state = {"theta": theta, "velocity": velocity}
    store.append(group, epoch, theta, {name: state[name] for name in store.state_names})


def _state(store: ExpertStore, group: range) -> tuple[Tensor, Tensor]:
    """What the next epoch of some experts starts from: parameters and velocity, ``[len(group), P]``."""
    states = [store.state(expert) for expert in group]
    rows = [store.row(expert, store.completed[expert]) for expert in group]
    theta = torch.stack([state.get("theta", row) for state, row in zip(states, rows, strict=True)])
    velocity = torch.stack(
        [state.get("velocity", torch.zeros_like(row)) for state, row in zip(states, rows, strict=True)]
    )
    return theta, velocity
