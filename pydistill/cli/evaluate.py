"""``pydistill evaluate`` and ``pydistill export``: what to do with a distilled file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any, Literal, cast

import rich.console
import torch
import tyro
from torch import nn

from pydistill import __version__
from pydistill.augment import DiffAugment
from pydistill.cli.console import Bars, Stop, accuracy_table, add_row
from pydistill.data import EXPORT_HEADER, REPOSITORY_NORMALISATION, Dataset, DistilledSet, load, stream, write_atomic
from pydistill.data.loading import PICTURES
from pydistill.data.reading import cores
from pydistill.evaluate import evaluate
from pydistill.methods.folder import as_json
from pydistill.methods.method import DatasetName, OptionError, device_of
from pydistill.methods.settings import SHAPES
from pydistill.nn import NetName, make
from pydistill.trajectory.train import EVAL_BATCH


@dataclass(frozen=True)
class Evaluate:
    """Train fresh students on a distilled file and test them: a row for each network architecture.

    The protocol is the papers': SGD with momentum 0.9 and weight decay 5e-4, and a tenth of the learning rate in the
    second half of the epochs.
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A distilled.safetensors from pydistill distill, or its folder; or a folder of images.pt, labels.pt and optionally
    lr.pt."""
    net: tuple[NetName, ...] = ("convnet",)
    """The students' architectures, one or more."""
    dataset: DatasetName | None = None
    """What to test on; by default the data set that the file was made from. A folder written by other code is assumed
    to be normalised as the method repositories do for this set."""
    root: Path | None = None
    """Folder of the data set's files, as for pydistill distill."""
    students: int = 5
    """Fresh students per architecture."""
    epochs: int | None = None
    """Passes of a student over the distilled set; by default as many as when it was made, or else 1000."""
    batch_size: int = 256
    """Distilled images per SGD step."""
    lr: float | None = None
    """Learning rate of the students; by default the one learnt along with the images."""
    label_kind: Literal["logits", "probs"] | None = None
    """Kind of the soft labels of a folder written by other code."""
    zca: bool = False
    """The images of a folder written by other code are ZCA-whitened, as MTT's are with its --zca."""
    width: int | None = None
    """Channels of the ConvNet; by default as when the file was made, or else 128."""
    depth: int | None = None
    """Blocks of the ConvNet; by default as when the file was made, or else 3, or 4 from 64 pixels."""
    augment: str | None = None
    """Differentiable siamese augmentation of the students' batches, operations joined by _, or none; by default the
    one that the set was distilled with."""
    seed: int = 0
    """Seed of the students; 0 gives the same students as pydistill distill at its default seed."""
    device: str = "auto"
    """Where to compute, by torch's name; auto is cuda if available."""
    json: Path | None = None
    """Where to write the accuracies of all students as JSON."""

    def run(self, console: rich.console.Console, stop: Stop) -> None:
        device, distilled = device_of(self.device), _distilled(self)
        config = {}
        kinds = {"dataset": str, "width": int, "depth": int, "student_epochs": int, "augment": str, "flip_batch": bool}
        for key, kind in kinds.items():
            config[key] = distilled.config.get(key)
            if not isinstance(config[key], kind | None):
                raise ValueError(f"{self.file}: expected {key} ({kind.__name__}) or none in it, got {config[key]!r}")
        name = self.dataset or config["dataset"]
        if name is None:
            raise ValueError(f"--dataset: expected the set to test on, {self.file} does not say what it was made from")
        if self.students < 1 or self.batch_size < 1 or not self.net:
            raise ValueError("--students, --net, --batch-size: expected at least 1 of each")
        for option in ("width", "depth"):
            if "convnet" not in self.net and getattr(self, option) is not None:
                raise OptionError(option, f"expected none without convnet in --net, got {getattr(self, option)}")
        if self.json and not self.json.parent.is_dir():
            raise FileNotFoundError(f"--json: expected a file in a folder that is there, got {self.json}")
        size = distilled.images.shape[2] if name == "digits" or name in PICTURES else None
        if name in PICTURES and not self.zca:  # of which only the test images are read
            space = distilled.mean, distilled.std
            dataset: Dataset = stream(name, self.root, image_size=size, workers=cores(), space=space).to(device)
        else:
            dataset = load(name, self.root, image_size=size).to(device)
        if self.zca:
            white = dataset.whitened()
            distilled = replace(distilled, mean=white.mean, std=white.std, zca=white.zca)
        _check_fits(self.file, distilled, dataset)
        test_images = distilled.normalise(dataset.test_images[:], dataset)
        options = {
            "lr": _given(self.lr, distilled.lr),
            "epochs": _given(self.epochs, config["student_epochs"], 1000),
            "batch_size": self.batch_size,
        }
        strategy = _given(self.augment, config["augment"], "")
        augment = DiffAugment(strategy, flip_batch=self.augment is None and bool(config["flip_batch"]))
        shape = dataset.channels, dataset.num_classes, dataset.image_size
        sizes = {name: _given(getattr(self, name), config[name]) for name in ("width", "depth")}
        makers = {net: partial(make, net, *shape, **(sizes if net == "convnet" else {})) for net in self.net}
        labels = {net: _label(net, maker()) for net, maker in makers.items()}  # raises for what cannot be built
        steps = options["epochs"] * -(-len(distilled.images) // self.batch_size) + -(-len(test_images) // EVAL_BATCH)
        table = accuracy_table(f"{self.file}: {dataset.name}", "network", self.students)
        about = {"file": str(self.file), "dataset": dataset.name, "images": len(distilled.images)}
        about |= {"label_kind": distilled.label_kind, **options, "augment": strategy, "seed": self.seed}
        about["pydistill"] = __version__
        results = {}
        with Bars(console) as bars:
            for net, maker in makers.items():
                advance = bars.bar(labels[net], self.students * steps)

                def on_step(advance: Callable[[], None] = advance) -> None:
                    advance()
                    stop()

                accuracies = evaluate(
                    maker,
                    distilled.images.to(device),
                    distilled.labels.to(device),
                    test_images,
                    dataset.test_labels,
                    students=range(self.students),
                    seed=self.seed,
                    label_kind=distilled.label_kind,
                    augment=augment if augment.operations or augment.flip_batch else None,
                    on_step=on_step,
                    **options,
                )
                results[labels[net]] = {"mean": mean(accuracies), "std": pstdev(accuracies), "accuracies": accuracies}
                add_row(table, labels[net], len(distilled.images), options["epochs"], options["lr"], accuracies)
                if self.json:
                    write_atomic(self.json, as_json(about | {"nets": results}))
        console.print(table)


@dataclass(frozen=True)
class Export:
    """Write a distilled file in the format of the method repositories and DD-Ranking: images.pt, labels.pt and lr.pt.

    What these cannot hold is in distilled.json beside them; pydistill evaluate takes the folder as well as the file.
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A distilled.safetensors from pydistill distill, or its folder."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Where to write; created if missing."""
    normalised: Literal["own", "repositories"] = "own"
    """Which mean and deviation: own, the file's, which are those of the real pixels; repositories, the constants of the
    method repositories and DD-Ranking, which their code needs (Fashion-MNIST and CIFAR-10)."""
    overwrite: bool = False
    """Replace existing files."""

    def run(self, console: rich.console.Console) -> None:
        distilled = DistilledSet.load(_in_run(self.file))
        if self.normalised == "repositories":
            space = _repository_normalisation(distilled.config.get("dataset"), self.file)
            distilled = distilled.renormalised(*map(torch.tensor, space))
        distilled.export(self.folder, overwrite=self.overwrite)
        mean, std = ([round(each, 4) for each in pair.tolist()] for pair in (distilled.mean, distilled.std))
        console.print(f"{len(distilled.images)} images, normalised by mean {mean} and deviation {std} -> {self.folder}")


def _in_run(path: Path) -> Path:
    """A distilled file, where its run's folder is given."""
    inside = path / "distilled.safetensors"
    return inside if inside.is_file() else path


def _distilled(command: Evaluate) -> DistilledSet:
    command = replace(command, file=_in_run(command.file))
    if command.file.is_dir() and not any((command.file / f"images{ending}.pt").is_file() for ending in ("", "_best")):
        wanted = "distilled.safetensors, or images.pt and labels.pt"
        raise FileNotFoundError(f"{command.file}: expected a folder of {wanted}, found neither")
    ours = not command.file.is_dir() or (command.file / EXPORT_HEADER).exists()
    if ours and command.zca:
        raise ValueError(f"--zca: expected none, {command.file} says whether its images are whitened")
    if not command.file.is_dir():
        if command.label_kind:
            raise ValueError(f"--label-kind: expected none, {command.file} says what its labels are")
        return DistilledSet.load(command.file)
    space: dict[str, Sequence[float]] = {}
    if command.zca and command.dataset is not None:
        channels = SHAPES[command.dataset][0]
        space = {"mean": [0.0] * channels, "std": [1.0] * channels}
    elif not ours:
        space = dict(zip(("mean", "std"), _repository_normalisation(command.dataset, command.file), strict=True))
    # the names of other code's learning rate that `import_tensors` looks for
    if command.lr is None and not any((command.file / name).exists() for name in ("lr.pt", "lr_best.pt")):
        raise ValueError(f"--lr: expected a learning rate, {command.file / 'lr.pt'} is not there to say it")
    return DistilledSet.import_tensors(command.file, **space, lr=command.lr, label_kind=command.label_kind)


def _repository_normalisation(dataset: str | None, file: Path) -> tuple[Sequence[float], Sequence[float]]:
    if dataset not in REPOSITORY_NORMALISATION:
        known = " or ".join(REPOSITORY_NORMALISATION)
        raise ValueError(f"{file}: the repositories' normalisation is known for {known}; got {dataset}")
    return REPOSITORY_NORMALISATION[dataset]


def _given(*values: Any) -> Any:
    """The first that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _label(name: str, net: nn.Module) -> str:
    if name != "convnet":
        return name
    convolutions = [layer for layer in cast(nn.Sequential, net.features) if isinstance(layer, nn.Conv2d)]
    return f"convnet-D{len(convolutions)}-W{convolutions[0].out_channels}"


def _check_fits(file: Path, distilled: DistilledSet, dataset: Dataset) -> None:
    wanted, got = list(dataset.train_images.shape[1:]), list(distilled.images.shape[1:])
    if wanted != got or not len(distilled.images):
        count = len(distilled.images)
        raise ValueError(f"{file}: expected images {wanted} as {dataset.name} has, got {count} of {got}")
    hard, K = distilled.label_kind == "hard", dataset.num_classes
    classes = int(distilled.labels.max()) + 1 if hard else distilled.labels.shape[1]
    if classes > K or (classes < K and not hard):
        raise ValueError(f"{file}: expected labels of the {K} classes of {dataset.name}, got {classes}")
