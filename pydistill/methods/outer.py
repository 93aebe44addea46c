"""What every distillation method has: hyper-parameters with presets, a state that is saved, and the loop around it."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydistill.augment import DiffAugment
from pydistill.data import Dataset, DistilledSet, read_safetensors, write_safetensors
from pydistill.seeding import seeded_generator, torch_seeded
from pydistill.trajectory import FlatModule, Trajectories

if TYPE_CHECKING:
    from typing_extensions import Self

OnStep = Callable[["State", dict[str, Any]], None]


@dataclass(eq=False)
class State:
    """All that a run carries from one iteration to the next; saved, loaded and continued, it changes no bit.

    What is drawn in an iteration depends on the seed and the iteration alone, so there is no generator in it.
    """

    tensors: dict[str, Tensor]  # "images" [N, C, H, W], "labels" and what else the method moves
    label_kind: str = "hard"
    iteration: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def save(self, path: str | os.PathLike[str], config: Config) -> None:
        """Writes a safetensors file, atomically, with the configuration in its metadata."""
        more = {"label_kind": self.label_kind, "iteration": self.iteration}
        write_safetensors(path, self.tensors, f"{config.name}_state", asdict(config), **more)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Config, device: torch.device | str = "cpu") -> State:
        """Reads what `save` wrote; ValueError for a damaged file or another configuration (iterations may differ)."""
        tensors, header = read_safetensors(path, f"{config.name}_state")
        for name, value in asdict(config).items():
            if name != "iterations" and (saved := header["config"].get(name)) != value:
                raise ValueError(f"{path}: expected a run with {name}={value!r}, got {saved!r}")
        if "images" not in tensors or "labels" not in tensors or not isinstance(header.get("iteration"), int):
            raise ValueError(f"{path}: expected the whole state of a run; images, labels or iteration missing")
        return cls({name: t.to(device) for name, t in tensors.items()}, header["label_kind"], header["iteration"])

    def descend(self, name: str, grad: Tensor, lr: float, momentum: float) -> None:
        """A step of SGD with momentum on a tensor; its velocity is kept beside it."""
        velocity = self.tensors.get(f"{name}_velocity")
        velocity = grad if velocity is None else momentum * velocity + grad
        self.tensors[f"{name}_velocity"] = velocity
        self.tensors[name] = self.tensors[name].detach() - lr * velocity


@dataclass(frozen=True)
class Config:
    """Hyper-parameters; ValueError for a count below 1, a negative number, or one that is not finite."""

    name: ClassVar[str]
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {}  # by data set and images per class
    needs_experts: ClassVar[bool] = False
    may_be_zero: ClassVar[tuple[str, ...]] = ("seed",)  # counts of which there may be none
    student_lr: ClassVar[str] = ""  # the learning rate of students on the result, which has to be positive

    ipc: int = 1  # synthetic images per class
    iterations: int = 5000  # outer steps
    augment: str = field(default="", kw_only=True)  # differentiable siamese augmentation: operations joined by "_"
    zca: bool = field(default=False, kw_only=True)  # distil ZCA-whitened images
    precision: Literal["fp32", "tf32", "bf16"] = field(default="fp32", kw_only=True)  # of the students' convolutions
    seed: int = field(default=0, kw_only=True)  # of everything that is drawn

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least = 1 if isinstance(value, int) and "int" in str(f.type) and f.name not in self.may_be_zero else 0
            if not least <= value < math.inf:
                raise ValueError(f"{f.name}: expected a finite number of at least {least}, got {value}")
        if self.student_lr and not getattr(self, self.student_lr) > 0:
            raise ValueError(f"{self.student_lr}: expected a positive number, got {getattr(self, self.student_lr)}")
        self.augmentation()  # raises for an unknown operation

    @classmethod
    def preset(cls, dataset: str, ipc: int) -> Self:
        """The paper's (or, for small sets, our) choice; ValueError names those that there are."""
        if dataset not in cls.presets:
            raise ValueError(f"preset: expected {cls.name}'s for one of {', '.join(cls.presets)}, got {dataset!r}")
        if ipc not in cls.presets[dataset]:
            known = ", ".join(map(str, cls.presets[dataset]))
            raise ValueError(f"preset: expected {cls.name}'s for {dataset} with ipc {known}, got {ipc}")
        return cls(ipc=ipc, **cls.presets[dataset][ipc])

    @classmethod
    def nearest_preset(cls, dataset: str, ipc: int) -> Self:
        """The preset of the nearest ipc there is, for this one; the defaults where the data set has none."""
        if ipc < 1:
            raise ValueError(f"ipc: expected a finite number of at least 1, got {ipc}")
        table = cls.presets.get(dataset)
        if not table:
            return cls(ipc=ipc)
        nearest = min(table, key=lambda known: (abs(math.log(known / ipc)), known))
        return replace(cls.preset(dataset, nearest), ipc=ipc)

    def augmentation(self) -> DiffAugment | None:
        """Of the students' batches, here and where the result is tested."""
        return DiffAugment(self.augment) if self.augment else None

    def check_start(self, dataset: Dataset, net: nn.Module) -> None:
        """ValueError for what does not fit, as far as it shows before there are experts."""
        if not self.needs_experts:
            self.check(dataset, net, None)

    def check(self, dataset: Dataset, net: nn.Module, experts: Trajectories | Tensor | None) -> Any:
        """ValueError where the experts do not fit; gives what `step` gets as experts."""
        if not self.needs_experts:
            return None
        raise NotImplementedError

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        """The state before the first iteration."""
        raise NotImplementedError

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        """One iteration: moves the state, returns what is worth noting."""
        raise NotImplementedError

    def result(self, state: State) -> tuple[Tensor, Tensor, float]:
        """Images, labels and the students' learning rate."""
        return state["images"], state["labels"], state["lr"].item()


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
        dataset: real images; their device is where the work is done.
        net: a network of the students' structure; only its structure is used.
        experts: for methods that match trajectories: a `pydistill.trajectory.ExpertStore`, or trajectories
            ``[E, epochs + 1, P]``.
        state: where to start, ``config.initial`` by default; advanced in place up to ``config.iterations``.
        on_step: called after each iteration with the state and a record of ``iteration``, ``loss`` and what else the
            method notes; an exception from it ends the run with a state that can go on.

    Raises:
        ValueError: the experts do not fit the network, or have too few epochs.
        FloatingPointError: a student's parameters, a loss, a gradient or a learnt rate stops being finite; the
            iteration is named, and which rates may be too large.
    """
    experts = config.check(dataset, net, experts)
    state = config.initial(dataset, net, experts) if state is None else state
    while state.iteration < config.iterations:
        record = _finite_step(config, state, dataset, net, experts)
        state.iteration += 1
        if on_step is not None:
            on_step(state, {"iteration": state.iteration, **record})
    images, labels, lr = config.result(state)
    settings = {"method": config.name, "dataset": dataset.name, "class_names": list(dataset.class_names)}
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


def world() -> tuple[int, int]:
    """This process's rank among how many; alone without `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the ranks, in one exchange."""
    if world()[1] == 1:
        return tensors
    joined = torch.cat([t.detach().flatten() for t in tensors])
    torch.distributed.all_reduce(joined)
    parts = joined.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def fresh_parameters(net: nn.Module, seed: int, *key: int) -> Tensor:
    """A new initialisation ``[P]`` of ``net``'s structure, by ``seed`` and ``key`` alone; ``net`` is left as it is.

    Raises:
        ValueError: a module with parameters of its own has no ``reset_parameters``.
    """
    net = copy.deepcopy(net)
    with torch_seeded(seeded_generator(seed, *key)):
        for module in net.modules():
            if next(module.parameters(recurse=False), None) is not None:
                if not hasattr(module, "reset_parameters"):
                    raise ValueError(f"net: expected modules with reset_parameters, {type(module).__name__} has none")
                module.reset_parameters()
    return FlatModule(net).parameters()
