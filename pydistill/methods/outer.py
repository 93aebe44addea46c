"""The loop of every method that moves synthetic images by outer steps, and the state that it updates."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.data import Dataset, DistilledSet, read_safetensors, write_safetensors
from pydistill.methods.precision import agree, switches
from pydistill.ops.convnet_step import LabelKind
from pydistill.seeding import seeded_generator, torch_seeded
from pydistill.trajectory import FlatModule, KeptSteps, Trajectories

if TYPE_CHECKING:
    from pydistill.methods.config import Config

__all__ = ["OnStep", "State", "distill", "fresh_parameters"]

OnStep = Callable[["State", dict[str, Any]], None]


@dataclass(eq=False)
class State:
    """All that a run carries from one iteration to the next; saving, loading and continuing changes no bit.

    Random draws depend on the seed and the iteration alone, so it holds no generator.
    """

    tensors: dict[str, Tensor]  # "images" [N, C, H, W], "labels" and whatever else the method moves
    label_kind: LabelKind = "hard"
    iteration: int = 0
    kept: KeptSteps = field(default_factory=KeptSteps)  # of its students' inner steps

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def save(self, path: str | os.PathLike[str], config: Config) -> None:
        """Writes a safetensors file, atomically, with the configuration in its metadata."""
        more = {"label_kind": self.label_kind, "iteration": self.iteration, **self.kept_steps()}
        write_safetensors(path, self.tensors, f"{config.name}_state", asdict(config), **more)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Config, device: torch.device | str = "cpu") -> State:
        """Reads what `save` wrote; ValueError for a damaged file or another configuration (iterations may differ)."""
        tensors, header = read_safetensors(path, f"{config.name}_state")
        for name, value in asdict(config).items():
            saved = header["config"].get(name, "auto" if name == "precision" else None)
            if name != "iterations" and not (agree(saved, value) if name == "precision" else saved == value):
                raise ValueError(f"{path}: expected a run with {name}={value!r}, got {saved!r}")
        if "images" not in tensors or "labels" not in tensors or not isinstance(header.get("iteration"), int):
            raise ValueError(f"{path}: expected the whole state of a run; images, labels or iteration missing")
        kept = KeptSteps(header.get("kept_steps"))
        return cls({name: t.to(device) for name, t in tensors.items()}, header["label_kind"], header["iteration"], kept)

    def kept_steps(self) -> dict[str, int]:
        """For the state's file and the metrics; empty as long as it is not decided."""
        return {} if self.kept.number is None else {"kept_steps": self.kept.number}

    def descend(self, name: str, grad: Tensor, lr: float, momentum: float) -> None:
        """A step of SGD with momentum on a tensor; its velocity is kept in the state."""
        velocity = self.tensors.get(f"{name}_velocity")
        velocity = grad if velocity is None else momentum * velocity + grad
        self.tensors[f"{name}_velocity"] = velocity
        self.tensors[name] = self.tensors[name].detach() - lr * velocity


def distill(
    config: Config,
    dataset: Dataset,
    net: nn.Module,
    experts: Trajectories | Tensor | None = None,
    *,
    state: State | None = None,
    on_step: OnStep | None = None,
) -> DistilledSet:
    """Distils ``dataset`` as ``config``'s method does; the same seed gives the same bits.

    Under `torch.distributed` the ranks share each iteration's work, add up their gradients, and all hold the result.

    Args:
        config: the method, with its hyper-parameters.
        dataset: real images; the work is done on their device.
        net: a network of the students' structure; only its structure is used.
        experts: for methods that match trajectories: a `pydistill.trajectory.ExpertStore`, or trajectories
            ``[E, epochs + 1, P]``.
        state: where to start, ``config.initial`` by default; advanced in place up to ``config.iterations``.
        on_step: called after each iteration with the state and a record of ``iteration``, ``loss`` and whatever else
            the method logs; an exception from it ends the run with a state that can be continued.

    Raises:
        ValueError: the experts do not fit the network, or have too few epochs.
        FloatingPointError: a student's parameters, a loss, a gradient or a learnt rate becomes non-finite; names the
            iteration, and which rates may be too large.
    """
    kinds = {"dataset": (dataset, Dataset), "net": (net, nn.Module)}
    kinds |= {} if state is None else {"state": (state, State)}
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {value!r:.80}")
    device = dataset.train_images.device
    config = config.on(device)
    experts = config.check(dataset, net, experts)
    state = config.initial(dataset, net, experts) if state is None else state
    while state.iteration < config.iterations:
        with switches(config.precision, device):  # what a method leaves to torch's switches, too
            record = _finite_step(config, state, dataset, net, experts)
        state.iteration += 1
        if on_step is not None:
            on_step(state, {"iteration": state.iteration, **record})
    images, labels, lr = config.result(state)
    settings: dict[str, Any] = {
        "method": config.name,
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
    }
    augmentation = config.augmentation()
    settings |= {**asdict(config), "flip_batch": augmentation is not None and augmentation.flip_batch}
    space = (dataset.mean, dataset.std)
    return DistilledSet(images.cpu(), labels.cpu(), lr, *space, settings, state.label_kind, dataset.zca)


def _finite_step(config: Config, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
    rates = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config) if f.name.startswith("lr_"))
    where, advice = f"iteration {state.iteration + 1}", f"smaller rates may help ({rates})"
    try:
        record = config.step(state, dataset, net, experts)
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {getattr(error, 'where', error)}; {advice}") from error
    for name, value in record.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{where}: {name} is {value}; {advice}")
    return record


def fresh_parameters(net: nn.Module, seed: int, *key: int, like: Tensor | None = None) -> Tensor:
    """A new initialisation ``[P]`` of ``net``'s structure, by ``seed`` and ``key`` alone; ``net`` is unchanged.

    Drawn on the CPU, wherever ``net`` is, and then given the dtype and device of ``like``.

    Raises:
        ValueError: a module with its own parameters has no ``reset_parameters``.
    """
    net = copy.deepcopy(_on_cpu(net))
    with torch_seeded(seeded_generator(seed, *key)):
        for module in net.modules():
            if next(module.parameters(recurse=False), None) is not None:
                if not hasattr(module, "reset_parameters"):
                    raise ValueError(f"net: expected modules with reset_parameters, {type(module).__name__} has none")
                cast(Callable[[], None], module.reset_parameters)()
    theta = FlatModule(net).parameters()
    return theta if like is None else to_device(theta.to(like.dtype), like.device)


_copies: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()


def _on_cpu(net: nn.Module) -> nn.Module:
    """``net``, or a copy of it on the CPU: kept while it is the same, for the host waits for a copy's values."""
    tensors = [*net.parameters(), *net.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return net
    state = ([(type(module), id(module)) for module in net.modules()], [(id(t), t._version) for t in tensors])
    if net not in _copies or _copies[net][0] != state:
        _copies[net] = state, copy.deepcopy(net).cpu()
    return _copies[net][1]
