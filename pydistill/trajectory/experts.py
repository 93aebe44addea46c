"""Expert trajectories: what trajectory matching imitates.

An expert is a network trained on the real images by plain SGD, with its parameters kept after every epoch ("Dataset
Distillation by Matching Training Trajectories", Cazenavette et al., CVPR 2022, calls them a buffer).
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from pydistill.data import read_safetensors, write_safetensors
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.students import trains_at_once
from pydistill.trajectory.train import DivergedError, train_students

__all__ = ["completed_epochs", "load_experts", "seeded_generator", "seeded_net", "train_experts"]

_SAVE_EVERY_S = 30.0
# A step of so many images keeps a machine busy; more experts at once would only make a cut-off cost more.
_IMAGES_AT_ONCE = 1024


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of ``key`` and on nothing else; integers of at least 0."""
    return torch.Generator().manual_seed(int(SeedSequence(key).generate_state(1, "uint64")[0]))


def seeded_net(make_net: Callable[[], nn.Module], *key: int, device: torch.device | str = "cpu") -> nn.Module:
    """Builds a network whose initial parameters depend on ``key`` only; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(*key).initial_seed())
        return make_net().to(device)


def train_experts(
    make_net: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    num_experts: int,
    epochs: int,
    lr: float = 0.01,
    batch_size: int = 256,
    seed: int = 0,
    augment: Any = None,
    path: str | os.PathLike[str] | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Trains experts by plain SGD on the cross-entropy and keeps their flat parameters after every epoch.

    The order of the batches depends on ``(seed, expert, epoch)`` alone, so training that was cut off goes on from the
    last whole epoch to the very trajectories that an unbroken run gives. Where experts can be trained at once
    (`pydistill.train_students`), a few go through their epochs together.

    Args:
        make_net: builds a network of float32 parameters that gives logits ``[B, K]``.
        images: float32 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        num_experts: how many experts, E.
        epochs: passes over the images, each followed by a snapshot.
        lr: SGD's learning rate; no momentum, no weight decay.
        batch_size: images per SGD step.
        seed: of the initial parameters and the order of the batches.
        augment: None, or an object with ``draw(shape, generator) -> record`` and ``__call__(images, record)``.
        path: a safetensors file that receives the trajectories, atomically, now and then and at the end, an exception
            included. One that exists already is continued.
        on_step: called after each SGD step of each expert; an exception from it ends the training, whole epochs stay
            saved.
        on_epoch: called after each epoch of each expert with ``expert``, ``epoch`` (1-based), ``loss`` and ``accuracy``
            (on the batches as they were trained on).

    Returns:
        float32 ``[E, epochs + 1, P]`` on the CPU: snapshot 0 is the initialisation, parameters are flat in
        ``net.parameters()`` order.

    Raises:
        ValueError: a count below 1, labels that do not match the images, or a file at ``path`` that is truncated,
            foreign, or of a training with other options or on other images.
        FloatingPointError: an expert's loss or parameters stop being finite; its number, epoch and step are named.
    """
    for name, value in (("num_experts", num_experts), ("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images: expected [N, C, H, W] with at least one image, got shape {list(images.shape)}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected torch.int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    config = {
        "num_experts": num_experts,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "augment": repr(augment),
        "data_crc32": zlib.crc32(labels.cpu().numpy().tobytes(), zlib.crc32(images.cpu().numpy().tobytes())),
    }
    nets = [seeded_net(make_net, seed, 0, expert, device=images.device) for expert in range(num_experts)]
    start = torch.stack([FlatModule(net).parameters().cpu() for net in nets])
    trajectories = start.new_zeros(num_experts, epochs + 1, start.shape[1])
    trajectories[:, 0] = start
    completed = torch.zeros(num_experts, dtype=torch.int64)
    if path is not None and Path(path).exists():
        trajectories, completed = _continue(path, config, start)

    at_once = -(-_IMAGES_AT_ONCE // min(batch_size, len(images))) if trains_at_once(nets[0], images) else 1
    saved_at = time.monotonic()
    try:
        for first in range(0, num_experts, at_once):
            members = range(first, min(first + at_once, num_experts))
            while (epoch := min(int(completed[expert]) for expert in members)) < epochs:
                # the last bits depend on how many train at once: a cut-off leaves all members after the same epoch
                group = [expert for expert in members if completed[expert] == epoch]
                try:
                    trained = train_students(
                        nets[group[0]],
                        trajectories[group, epoch].to(images.device),
                        images,
                        labels,
                        epochs=1,
                        lr=lr,
                        batch_size=batch_size,
                        augment=augment,
                        generator=[seeded_generator(seed, 1, expert, epoch) for expert in group],
                        train_accuracy=on_epoch is not None,
                        on_step=on_step,
                    )
                except DivergedError as error:
                    raise FloatingPointError(
                        f"lr: expected a rate at which training stays finite, got {lr}: "
                        f"{error.what.format(f'expert {group[error.student]}')} in epoch {epoch + 1}, step {error.step}"
                    ) from None
                trajectories[group, epoch + 1] = trained.theta.cpu()
                completed[group] = epoch + 1
                if path is not None and time.monotonic() - saved_at > _SAVE_EVERY_S:
                    _save(path, trajectories, completed, config)
                    saved_at = time.monotonic()
                if on_epoch is not None:
                    losses, accuracies = trained.losses[0].tolist(), trained.train_accuracy[0].tolist()
                    for expert, loss, accuracy in zip(group, losses, accuracies, strict=True):
                        on_epoch({"expert": expert, "epoch": epoch + 1, "loss": loss, "accuracy": accuracy})
    finally:
        if path is not None:
            _save(path, trajectories, completed, config)
    return trajectories


def load_experts(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """Reads the trajectories ``[E, epochs + 1, P]`` and the options of `train_experts` from its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign, or its training was cut off.
    """
    trajectories, completed, config = _read(path)
    epochs = trajectories.shape[1] - 1
    if (completed < epochs).any():
        raise ValueError(
            f"{path}: expected {epochs} epochs of each expert, got {completed.tolist()}; "
            "train_experts with the same options and path finishes them"
        )
    return trajectories, config


def completed_epochs(path: str | os.PathLike[str]) -> list[int]:
    """How many epochs of each expert a file of `train_experts` holds; no experts when there is no file."""
    return _read(path)[1].tolist() if Path(path).exists() else []


def _save(path: str | os.PathLike[str], trajectories: Tensor, completed: Tensor, config: dict[str, Any]) -> None:
    write_safetensors(path, {"trajectories": trajectories, "completed": completed}, "experts", config)


def _read(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    tensors, header = read_safetensors(path, "experts")
    trajectories, completed = tensors.get("trajectories"), tensors.get("completed")
    if trajectories is None or completed is None or trajectories.ndim != 3 or completed.shape != trajectories.shape[:1]:
        raise ValueError(f"{path}: expected 'trajectories' [E, epochs + 1, P] and 'completed' [E]")
    return trajectories, completed, header["config"]


def _continue(path: str | os.PathLike[str], config: dict[str, Any], start: Tensor) -> tuple[Tensor, Tensor]:
    trajectories, completed, saved = _read(path)
    for name, value in config.items():
        if saved.get(name) != value:
            raise ValueError(f"{path}: expected experts trained with {name}={value!r}, got {saved.get(name)!r}")
    if not torch.equal(trajectories[:, 0], start):
        raise ValueError(f"{path}: expected experts that start as make_net's networks do, got others")
    return trajectories, completed
