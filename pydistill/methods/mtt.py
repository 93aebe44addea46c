"""MTT: dataset distillation by matching training trajectories.

Cazenavette, Wang, Torralba, Efros, Zhu, "Dataset Distillation by Matching Training Trajectories", CVPR 2022. Each
iteration draws an expert and one of its first epochs, trains a student from there on the synthetic images for
``syn_steps`` steps, and moves the images and the student's learning rate down the gradient of the distance between
where the student ends and where the expert stood ``expert_epochs`` epochs later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pydistill.data import Dataset, DistilledSet, read_safetensors, write_safetensors
from pydistill.trajectory import trajectory_match
from pydistill.trajectory.store import Trajectories, as_trajectories

__all__ = ["MTTConfig", "MTTState", "distill"]


@dataclass(frozen=True)
class MTTConfig:
    """The paper's hyper-parameters, under the names of its code; ValueError for a count below 1 or a negative rate."""

    ipc: int = 1  # synthetic images per class
    iterations: int = 5000  # outer steps
    syn_steps: int = 50  # inner steps on synthetic images
    expert_epochs: int = 2  # how far ahead of the start the target lies
    max_start_epoch: int = 2  # starts are drawn from epochs 0 .. max_start_epoch - 1
    batch_syn: int | None = None  # synthetic images per inner step, all of them by default
    lr_img: float = 100.0  # outer learning rate of the images
    lr_lr: float = 1e-7  # outer learning rate of the student's learning rate
    lr_teacher: float = 0.01  # where the student's learning rate starts
    momentum: float = 0.5  # of both outer updates
    mode: Literal["exact", "first_order", "full"] = "exact"  # how trajectory_match differentiates
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ipc", "iterations", "syn_steps", "expert_epochs", "max_start_epoch", "batch_syn"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("lr_img", "lr_lr", "lr_teacher", "momentum", "seed"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")


@dataclass(eq=False)
class MTTState:
    """All that a run carries from one iteration to the next; saved, loaded and continued, it changes no bit."""

    images: Tensor  # [K * ipc, C, H, W]
    labels: Tensor  # [K * ipc]
    lr: Tensor  # scalar
    image_velocity: Tensor
    lr_velocity: Tensor
    generator: torch.Generator  # draws experts, starts, batches and augmentations; on the CPU
    iteration: int = 0

    @classmethod
    def initial(cls, config: MTTConfig, dataset: Dataset) -> MTTState:
        """Starts from real images, ``ipc`` of each class."""
        generator = torch.Generator().manual_seed(config.seed)
        images, labels = dataset.sample(config.ipc, generator)
        lr = torch.tensor(config.lr_teacher, dtype=images.dtype, device=images.device)
        return cls(images, labels, lr, torch.zeros_like(images), torch.zeros_like(lr), generator)

    def save(self, path: str | os.PathLike[str], config: MTTConfig) -> None:
        """Writes a safetensors file, atomically, with the configuration in its metadata."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors["generator"] = self.generator.get_state()
        tensors["iteration"] = torch.tensor(self.iteration)
        write_safetensors(path, tensors, "mtt_state", asdict(config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: MTTConfig, device: torch.device | str = "cpu") -> MTTState:
        """Reads what `save` wrote; ValueError for a damaged file or another configuration (iterations may differ)."""
        tensors, header = read_safetensors(path, "mtt_state")
        for name, value in asdict(config).items():
            if name != "iterations" and (saved := header["config"].get(name)) != value:
                raise ValueError(f"{path}: expected a run with {name}={value!r}, got {saved!r}")
        if missing := {f.name for f in fields(cls)} - tensors.keys():
            raise ValueError(f"{path}: expected the whole state of a run, {', '.join(sorted(missing))} missing")
        generator = torch.Generator()
        generator.set_state(tensors.pop("generator"))
        iteration = int(tensors.pop("iteration"))
        return cls(**{name: t.to(device) for name, t in tensors.items()}, generator=generator, iteration=iteration)


def distill(
    config: MTTConfig,
    dataset: Dataset,
    experts: Tensor | Trajectories,
    net: nn.Module,
    *,
    state: MTTState | None = None,
    augment: Any = None,
    on_step: Callable[[MTTState, dict[str, float]], None] | None = None,
) -> DistilledSet:
    """Distils ``dataset`` by trajectory matching; the same seed gives the same bits.

    Args:
        config: hyper-parameters.
        dataset: real images, from which the synthetic ones start; its device is where the work is done.
        experts: trajectories, a `pydistill.trajectory.store.ExpertStore` or a tensor ``[E, epochs + 1, P]``.
        net: a network of the experts' structure; only its structure is used.
        state: where to start, `MTTState.initial` by default; advanced in place up to ``config.iterations``.
        augment: the differentiable augmentation of `pydistill.trajectory_match`, or None.
        on_step: called after each iteration with the state and ``iteration``, ``loss``, ``lr``, ``grad_norm`` (of the
            images), ``expert``, ``start_epoch``; an exception from it ends the run with a state that can go on.

    Raises:
        ValueError: the experts do not fit the network, or have too few epochs.
        FloatingPointError: the student's parameters stop being finite within an unroll.
    """
    experts = as_trajectories(experts, net, config.max_start_epoch - 1 + config.expert_epochs)
    state = MTTState.initial(config, dataset) if state is None else state
    while state.iteration < config.iterations:
        expert = int(torch.randint(experts.shape[0], (), generator=state.generator))
        start = int(torch.randint(config.max_start_epoch, (), generator=state.generator))
        images, lr = state.images.detach().requires_grad_(), state.lr.detach().requires_grad_()
        theta0, target = (row.to(images.device) for row in experts.segment(expert, start, config.expert_epochs))
        loss = trajectory_match(
            net,
            theta0,
            target,
            images,
            state.labels,
            lr,
            steps=config.syn_steps,
            batch_size=config.batch_syn,
            generator=state.generator,
            augment=augment,
            mode=config.mode,
        )
        image_gradient, lr_gradient = torch.autograd.grad(loss, (images, lr))
        state.image_velocity = config.momentum * state.image_velocity + image_gradient
        state.lr_velocity = config.momentum * state.lr_velocity + lr_gradient
        state.images = images.detach() - config.lr_img * state.image_velocity
        state.lr = lr.detach() - config.lr_lr * state.lr_velocity
        state.iteration += 1
        if on_step is not None:
            record = {"iteration": state.iteration, "loss": loss.item(), "lr": state.lr.item()}
            record |= {"grad_norm": image_gradient.norm().item(), "expert": expert, "start_epoch": start}
            on_step(state, record)
    settings = {"method": "mtt", "dataset": dataset.name, "class_names": list(dataset.class_names), **asdict(config)}
    return DistilledSet(state.images.cpu(), state.labels.cpu(), state.lr.item(), dataset.mean, dataset.std, settings)
