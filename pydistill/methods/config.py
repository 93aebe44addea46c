"""What methods that distil images for training students have in common: their shared hyper-parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydistill._arguments import meant
from pydistill.augment import DiffAugment
from pydistill.data import Dataset
from pydistill.methods.distilling import OF_EXPERTS, DistillInputs, DistillJob
from pydistill.methods.method import Method, check_augment, check_choices
from pydistill.ops._precision import Precision, check_name
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule, Trajectories
from pydistill.trajectory.students import choose_students

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.outer import State

__all__ = ["PHOTOGRAPHS", "Config"]

PHOTOGRAPHS = "color_crop_cutout_flip_scale_rotate"  # how the papers augment photographs


@dataclass(frozen=True)
class Config(Method):
    """Hyper-parameters; ValueError for a count below 1, a negative number, or one that is not finite."""

    inputs: ClassVar[type[DistillInputs]] = DistillInputs
    shared: ClassVar[bool] = True
    free: ClassVar[tuple[str, ...]] = ("iterations",)
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {}  # by data set and images per class
    needs_experts: ClassVar[bool] = False
    streams: ClassVar[bool] = False  # whether training images may be read when they are needed
    may_be_zero: ClassVar[tuple[str, ...]] = ("seed",)  # counts that may be zero
    student_lr: ClassVar[str] = ""  # field with the learning rate of students on the result, which must be positive

    ipc: int = 1
    """Synthetic images per class."""
    iterations: int = 5000
    """Outer steps."""
    augment: str = field(default="", kw_only=True)
    """Differentiable siamese augmentation of the students' batches: color, crop, cutout, flip, scale, rotate, joined
    by _."""
    zca: bool = field(default=False, kw_only=True)
    """Distil ZCA-whitened images."""
    precision: Precision = field(default="auto", kw_only=True)
    """Precision of the students' convolutions, and on a GPU of all float32 products: ieee (also called fp32), bf16, or
    on a GPU tf32 (tf32-conv, tf32-matmul: convolutions or matrix products alone). auto is, on a GPU, what torch's
    switches say when the run begins, which it keeps: tf32-conv by torch's default; on the CPU ieee."""
    seed: int = field(default=0, kw_only=True)
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_name(self.precision)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least = 1 if isinstance(value, int) and "int" in str(f.type) and f.name not in self.may_be_zero else 0
            if not least <= value < math.inf:
                raise ValueError(f"{f.name}: expected a finite number of at least {least}, got {value}")
        if self.student_lr and not getattr(self, self.student_lr) > 0:
            raise ValueError(f"{self.student_lr}: expected a positive number, got {getattr(self, self.student_lr)}")
        check_augment(self)

    @classmethod
    def preset(cls, dataset: str, ipc: int) -> Self:  # type: ignore[override]  # its presets have an ipc, too
        """The paper's (or, for small sets, our) choice; ValueError names the available ones."""
        if dataset not in cls.presets:
            known = ", ".join(cls.presets)
            near = meant(dataset, cls.presets)
            raise ValueError(f"preset: expected {cls.name}'s for one of {known}, got {dataset!r}{near}")
        if ipc not in cls.presets[dataset]:
            known = ", ".join(map(str, cls.presets[dataset]))
            raise ValueError(f"preset: expected {cls.name}'s for {dataset} with ipc {known}, got {ipc!r}")
        return cls(ipc=ipc, **cls.presets[dataset][ipc])

    @classmethod
    def nearest_preset(cls, dataset: str, ipc: int) -> Self:  # type: ignore[override]
        """The preset of the nearest available ipc, with this ipc; the defaults where the data set has none."""
        if ipc < 1:
            raise ValueError(f"ipc: expected a finite number of at least 1, got {ipc}")
        table = cls.presets.get(dataset)
        if not table:
            return cls(ipc=ipc)
        nearest = min(table, key=lambda known: (abs(math.log(known / ipc)), known))
        return replace(cls.preset(dataset, nearest), ipc=ipc)

    def unused(self, inputs: DistillInputs) -> dict[str, str]:
        if not self.needs_experts:
            unused = dict.fromkeys(("experts", *OF_EXPERTS), f": {self.name} matches no trajectories")
        elif inputs.experts is not None:
            unused = dict.fromkeys(OF_EXPERTS, " with experts=FILE, whose file says it")
        else:
            return {}
        return unused | ({"batch_train": " with whole_epochs=0"} if inputs.whole_epochs == 0 else {})

    def job(self, inputs: DistillInputs, device: torch.device) -> DistillJob:
        return DistillJob(self, inputs, device)

    def augmentation(self) -> DiffAugment | None:
        """The augmentation of the students' batches, here and when the result is tested."""
        return DiffAugment(self.augment) if self.augment else None

    def check_precision(self, dataset: Dataset, net: nn.Module) -> None:
        """ValueError if ``net`` cannot be run in this precision on the data set's device."""
        choose_students("auto", FlatModule(net), dataset.train_images[:1], "hard", None, 0, self.precision)

    def check_start(self, dataset: Dataset, net: nn.Module) -> None:
        """ValueError for what does not fit, as far as can be seen before there are experts."""
        if not self.needs_experts:
            self.check(dataset, net, None)

    def check(self, dataset: Dataset, net: nn.Module, experts: Trajectories | Tensor | None) -> Any:
        """ValueError if the experts do not fit; returns what `step` gets as experts."""
        if not self.needs_experts:
            return None
        raise NotImplementedError

    def first_images(self, dataset: Dataset, start: Literal["real", "noise"]) -> tuple[Tensor, Tensor]:
        """Real images of each class or noise of their shape, and their labels: what a distillation begins with."""
        generator = seeded_generator(self.seed, Stream.SYNTHETIC)
        images, labels = dataset.sample(self.ipc, generator)
        if start == "noise":
            images = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu").to(images)
        return images, labels

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        """The state before the first iteration."""
        raise NotImplementedError

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        """One iteration: updates the state, returns what is to be logged."""
        raise NotImplementedError

    def result(self, state: State) -> tuple[Tensor, Tensor, float]:
        """Images, labels and the students' learning rate."""
        return state["images"], state["labels"], state["lr"].item()
