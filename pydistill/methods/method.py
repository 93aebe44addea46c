"""A method: hyper-parameters with presets, checked in one place, and a job that a run does phase by phase."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from pydistill._arguments import meant, not_one_of
from pydistill.augment import DiffAugment
from pydistill.data import Dataset, load, stream
from pydistill.data.loading import PICTURES
from pydistill.methods.precision import decided

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.runs import Run

__all__ = [
    "DatasetInputs",
    "DatasetName",
    "Inputs",
    "Job",
    "Method",
    "OptionError",
    "check_augment",
    "check_choices",
    "check_dataset",
    "check_numbers",
    "device_of",
]

HOW = ("root", "device", "checkpoint_every", "workers", "network", "weights_key")
DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "image-folder", "tiny-imagenet", "imagenet-1k"]


class OptionError(ValueError):
    """A refused option of a run.

    Attributes:
        option: its name, as written in Python.
        reason: what was expected and what was given.
    """

    def __init__(self, option: str, reason: str):
        super().__init__(f"{option}: {reason}")
        self.option, self.reason = option, reason


def check_numbers(options: Any, error: Callable[[str, str], ValueError] | None = None, /, **least: float) -> None:
    """ValueError for a field below its least value or not finite; a least value of 0.0 requires a positive number.
    And for any field declared as bool or as a ``Literal`` written out that holds something else.

    Args:
        options: has the fields.
        error: made from the field's name and what is wrong; `OptionError` for the inputs of a run.
        least: by field; an int is itself allowed.
    """
    check_choices(options, error)
    for name, low in least.items():
        value = getattr(options, name)
        positive = isinstance(low, float)
        if not (low < value if positive else low <= value) or not value < math.inf:
            number = "" if isinstance(value, int) else "a finite number of "
            wanted = "a positive finite number" if positive else f"{number}at least {low}"
            reason = f"expected {wanted}, got {value}"
            raise ValueError(f"{name}: {reason}") if error is None else error(name, reason)


def check_augment(options: Any) -> None:
    """ValueError if the field ``augment`` is not the strategy of a `DiffAugment`."""
    try:
        DiffAugment(options.augment)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("strategy:", "augment:", 1)) from error


def check_choices(options: Any, error: Callable[[str, str], ValueError] | None = None, /) -> None:
    """ValueError for a field declared as a number, bool or as a ``Literal`` written out that holds something else."""
    for f in fields(options):
        choices, value = _choices(f.type), getattr(options, f.name)
        kind = str(f.type).removesuffix(" | None")
        may_be_none = value is None and kind != f.type
        if kind in _NUMBERS and not may_be_none and (isinstance(value, bool) or not isinstance(value, _NUMBERS[kind])):
            reason = f"expected a {'whole ' if kind == 'int' else ''}number, got {value!r}"
            raise ValueError(f"{f.name}: {reason}") if error is None else error(f.name, reason)
        if choices and not any(type(value) is type(each) and value == each for each in choices):
            flag = choices == (True, False)
            reason = f"expected True or False, got {value!r}" if flag else not_one_of(choices, value)
            raise ValueError(f"{f.name}: {reason}") if error is None else error(f.name, reason)


_NUMBERS: dict[str, Any] = {"int": int, "float": (int, float)}


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a field declared as a bool or as a ``Literal``, written out, may hold."""
    if annotation in ("bool", bool):
        return True, False
    written = re.fullmatch(r"Literal(\[[^|]*\])", annotation) if isinstance(annotation, str) else None
    return tuple(ast.literal_eval(written[1])) if written else ()


class Method:
    """The base of every method: a frozen dataclass of its hyper-parameters, whose ``__post_init__`` checks them.

    A method names itself and its paper, has `presets`, says in `inputs` what a run takes besides the hyper-parameters,
    and makes from these the `Job` that `pydistill.methods.run` does.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # one line: what it does and what comes out
    paper: ClassVar[str]
    group: ClassVar[str] = "images"  # what comes out, or how: images, decoupled, selection, networks
    presets: ClassVar[dict[str, Any]] = {}  # by data set: what differs from the defaults
    inputs: ClassVar[type[Inputs]]
    resumable: ClassVar[bool] = True
    shared: ClassVar[bool] = False  # whether the ranks of torchrun share the work
    free: ClassVar[tuple[str, ...]] = ()  # what of the result may differ when a run is resumed
    state_kind: ClassVar[str] = "training state"  # how the files of a training in progress describe themselves

    @classmethod
    def preset(cls, dataset: str) -> Self:
        """The values for a data set; ValueError names the available ones."""
        if dataset not in cls.presets:
            known = ", ".join(cls.presets)
            near = meant(dataset, cls.presets)
            raise ValueError(f"preset: expected {cls.name}'s for one of {known}, got {dataset!r}{near}")
        return cls(**cls.presets[dataset])

    @classmethod
    def nearest_preset(cls, dataset: str) -> Self:
        """The preset of a data set, or the defaults where it has none."""
        return cls.preset(dataset) if dataset in cls.presets else cls()

    def on(self, device: torch.device, kept: dict[str, Any] | None = None) -> Self:
        """These as a run on ``device`` has them: where the precision is "auto", with what is `decided` for that.

        Args:
            device: of the run.
            kept: the options of the run that is resumed, whose precision is taken; what was not decided yet is written
                into them.
        """
        precision = getattr(self, "precision", None)
        if precision is None:
            return self
        options = {} if kept is None else kept.get("config", kept)
        options["precision"] = decided(device, options.get("precision"))
        return replace(self, precision=options["precision"]) if precision == "auto" else self  # type: ignore[type-var]

    def unused(self, inputs: Any) -> dict[str, str]:
        """Hyper-parameters and inputs that have no effect beside these, each with the reason."""
        return {}

    def check_used(self, inputs: Any, given: Collection[str]) -> None:
        """`OptionError` for an option that is given, and has no effect."""
        for name, reason in self.unused(inputs).items():
            if name in given:
                value = getattr(inputs if hasattr(inputs, name) else self, name)
                raise OptionError(name, f"expected none{reason}, got {value}")

    def job(self, inputs: Any, device: torch.device) -> Job:
        """What a run does; reads the inputs, and raises for what does not fit before anything is written."""
        raise NotImplementedError


@dataclass(frozen=True)
class Inputs:
    """What a run takes besides the method's hyper-parameters."""

    device: str = field(default="auto", kw_only=True)
    """Where to compute, by torch's name; auto is cuda if available."""

    @classmethod
    def for_method(cls, method: Any, **given: Any) -> Self:
        """The given inputs, and defaults for the others by method and data set."""
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown:
            names = ", ".join(f.name for f in fields(cls))
            raise OptionError(min(unknown), f"expected an input of {method.name}: {names}")
        needed = {f.name for f in fields(cls) if f.default is MISSING} - set(given)
        if needed:
            raise OptionError(min(needed), f"expected one for {method.name}, got none")
        if "device" in given:
            given["device"] = str(given["device"])
        return cls(**given)

    def how(self) -> dict[str, Any]:
        """How a run is done and not what it makes, as JSON values: kept with it, and free when it is resumed."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name in HOW or self._is_file(f)}

    def resumed(self, kept: dict[str, Any]) -> Self:
        """These inputs with the device and the folder of data of the run that is resumed, where none are given."""
        found = {"device": kept.get("device") if self.device == "auto" else None}
        if getattr(self, "root", "") is None:
            found["root"] = kept.get("root") and Path(kept["root"])
        return replace(self, **{name: value for name, value in found.items() if value is not None})

    def stored(self) -> dict[str, Any]:
        """The inputs as JSON values by their names in the files; without paths, which may change."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, (Path, tuple))}

    @classmethod
    def _is_file(cls, f: Field[Any]) -> bool:
        """Whether a field names files that the run reads, and that may lie elsewhere when it is resumed."""
        return "Path" in str(f.type) and f.name not in ("root", "experts")

    def files(self) -> dict[str, Any]:
        """The files that the run reads, as JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if self._is_file(f)}


def _plain(value: Any) -> Any:
    """An input as a JSON value."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value.absolute()) if isinstance(value, Path) else value


@dataclass(frozen=True)
class DatasetInputs(Inputs):
    """A data set, for methods that need no more."""

    dataset: DatasetName = "digits"
    """The real images; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files, or what pack made of it; fashion-mnist looks in /usr/share/datasets/fashion-mnist
    by itself."""
    image_size: int | None = None
    """Size in pixels to which digits (16), image folders (32) and the two ImageNets (64, 224) are resized."""

    @classmethod
    def for_method(cls, method: Any, **given: Any) -> Self:
        check_dataset(given.get("dataset", "digits"))
        return super().for_method(method, **given)

    def load(self, device: torch.device, *, zca: bool = False, streams: bool = False) -> Dataset:
        """The data set, on the device.

        With ``streams``, packed pictures are read when they are asked for.
        """
        if streams and not zca and self.dataset in PICTURES and self.root is not None and self.root.is_file():
            return stream(self.dataset, self.root, image_size=self.image_size).to(device)
        dataset = load(self.dataset, self.root, image_size=self.image_size)
        return (dataset.whitened() if zca else dataset).to(device)


def check_dataset(name: str, names: Any = DatasetName) -> None:
    """ValueError for a data set that is not one of ``names``, a Literal."""
    if name not in get_args(names):
        raise OptionError("dataset", not_one_of(get_args(names), name))


def device_of(name: str) -> torch.device:
    """The device by torch's name; "auto" is cuda if available. `OptionError` for one that torch does not have here."""
    kind = "cuda" if torch.cuda.is_available() else _accelerator()
    if name == "auto":
        return torch.device(kind if kind == "cuda" else "cpu")
    count = torch.accelerator.device_count() if kind else 0
    there = ["cpu", *([kind] if kind else []), *(f"{kind}:{number}" for number in range(count))]
    if name not in (*there, "cpu:0"):
        raise OptionError("device", f"expected auto or {' or '.join(there)}, which torch has here, got {name!r}")
    return torch.device(name)


def _accelerator() -> str | None:
    """The kind of accelerator that torch was built for and finds."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


class Job:
    """A method's work on given inputs. What it reads is checked on construction; `phases` fill the folder of a run.

    Attributes:
        title: what is worked on, for display.
        made: the files that it makes, the most important one last.
        config, inputs: what it was made from.
        results: of the finished phases; a run writes them as results.json.
        data: the real images, by which a run that is resumed knows whether they are still the same; None without any.
    """

    title: str
    made: Sequence[str]
    config: Any
    inputs: Any
    results: dict[str, Any]
    data: Dataset | None = None

    def stored(self) -> dict[str, Any]:
        """The options that determine the result; a run can only be resumed with the same ones.

        By default the hyper-parameters and the data set.
        """
        config, inputs = self.config, self.inputs
        about = {"dataset": inputs.dataset, "image_size": inputs.image_size}
        return {"method": config.name, **about, "config": asdict(config)}

    def opened(self, run: Run) -> None:
        """Reads what an earlier process left in the folder; ValueError if no run can continue from it."""

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        """Whether a record of the metrics stays when a run is resumed, or is of a step that is taken again.

        By default, records of epochs that the phase's state has completed stay.
        """
        return bool(record["epoch"] <= run.epochs_done(record["phase"]))

    def phases(self) -> Sequence[Callable[[Run], None]]:
        """The phases in order; each continues where its files end."""
        raise NotImplementedError
