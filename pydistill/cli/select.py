"""``pydistill select``: real images picked by a method, beside as many random ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import rich.console
import rich.progress
import torch
import tyro

from pydistill import __version__
from pydistill.augment import DiffAugment
from pydistill.cli.console import Interrupted, Stop, accuracy_table, add_row, as_json, picture, progress_bars
from pydistill.cli.folder import Folder
from pydistill.cli.settings import SETTINGS, DatasetName, convnet, dataset_of, load_for
from pydistill.data import Dataset, DistilledSet, write_atomic
from pydistill.evaluate import evaluate
from pydistill.methods import dq, pca
from pydistill.methods.options import check_numbers
from pydistill.methods.picking import Picking, train_teacher
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory.train import EVAL_BATCH

_METHODS = {"dq": (dq.DQ, dq.quantize), "pca": (pca.PCA, pca.combine)}


@dataclass(frozen=True)
class _Select:
    dataset: DatasetName = "digits"
    """What to pick from; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files; fashion-mnist looks in /usr/share/datasets/fashion-mnist by itself."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    out: Path | None = None
    """Folder for the results, new or empty; a new one under runs/ by default."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""
    width: int = 128
    """Channels of the ConvNet, of the judging network as of the students."""
    depth: int = 3
    """Blocks of the ConvNet."""
    students: int = 5
    """Fresh students for each accuracy; 0 picks and tests nothing."""
    student_epochs: int = 1000
    """Passes of a student over its images."""
    lr_student: float = 0.01
    """Learning rate of the students."""

    zca = False  # what load_for asks for


@dataclass(frozen=True)
class SelectDQ(_Select):
    """Pick real images by Dataset Quantization, and test fresh students on them beside as many random ones.

    Options that are not given take the data set's preset. The folder --out receives distilled.safetensors, for
    pydistill evaluate, images.png and results.json.
    """

    config: tyro.conf.OmitArgPrefixes[dq.DQ] = field(default_factory=dq.DQ)
    """The method's hyper-parameters."""


@dataclass(frozen=True)
class SelectPCA(_Select):
    """Prune, combine and augment real images (PCA), and test fresh students on them beside as many random ones.

    Options that are not given take the data set's preset. The folder --out receives distilled.safetensors, for
    pydistill evaluate, images.png and results.json.
    """

    config: tyro.conf.OmitArgPrefixes[pca.PCA] = field(default_factory=pca.PCA)
    """The method's hyper-parameters."""


_COMMANDS: dict[str, Any] = {"dq": SelectDQ, "pca": SelectPCA}


def run(method: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``select`` and the method, dq or pca."""
    dataset = dataset_of(argv)
    setting = SETTINGS[dataset]
    sizes = {name: getattr(setting, name) for name in ("width", "depth", "student_epochs", "lr_student")}
    options = tyro.cli(
        _COMMANDS[method],
        args=argv,
        prog=f"pydistill select {method}",
        default=_COMMANDS[method](dataset=dataset, config=_METHODS[method][0].preset(dataset), **sizes),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        _run(options, console, stop)
    except Interrupted:
        console.print("stopped; the same command starts anew")
        raise


def _run(options: Any, console: rich.console.Console, stop: Stop) -> None:
    began, config = time.monotonic(), options.config
    check_numbers(options, flags=True, students=0, student_epochs=1, lr_student=0.0)
    run = Folder(options.out, f"{config.name}-{options.dataset}", f"select {config.name}", resume=None)
    folder, dataset = run.path, load_for(options)
    dataset.sample(config.ipc)  # refuses more than there are
    config.check(dataset)
    convnet(dataset, options.width, options.depth)  # refuses images that are too small
    stop()
    with run.held(), progress_bars(console) as progress:
        run.begin(None)
        steps = config.teacher_epochs * -(-len(dataset.train_images) // config.teacher_batch)
        teacher = train_teacher(
            *(config, dataset, lambda: convnet(dataset, options.width, options.depth)),
            on_step=_ticks(progress, stop, "judging network", steps),
        )
        on_class = _ticks(progress, stop, "pick", dataset.num_classes)
        picked = _METHODS[config.name][1](config, dataset, teacher, lr=options.lr_student, on_class=on_class)
        sizes = {name: getattr(options, name) for name in ("width", "depth", "student_epochs")}
        picked.config |= {**sizes, "pydistill": __version__}
        picked.save(folder / "distilled.safetensors")
        write_atomic(folder / "images.png", picture(picked, config.ipc))
        results = _results(options, dataset, picked, progress, stop)
        write_atomic(folder / "results.json", as_json(results))
    if options.students:
        title = f"{options.dataset}, ipc {config.ipc}, ConvNet-D{options.depth}-W{options.width}"
        table = accuracy_table(title, "training set", options.students)
        for name, label in (("random", "random real"), ("picked", f"picked ({config.name})")):
            row = results[name]
            add_row(table, label, row["images"], row["epochs"], row["lr"], row["accuracies"])
        console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s; distilled.safetensors is in {folder}")


def _ticks(progress: rich.progress.Progress, stop: Stop, name: str, total: int) -> Any:
    task = progress.add_task(name, total=total, note="")

    def tick() -> None:
        progress.advance(task)
        stop()

    return tick


def _results(
    options: Any, dataset: Dataset, picked: DistilledSet, progress: rich.progress.Progress, stop: Stop
) -> dict[str, Any]:
    """Accuracies of the students; every student on random images has a draw of its own."""
    config: Picking = options.config
    results: dict[str, Any] = {"config": picked.config}
    if not options.students:
        return results
    device = dataset.train_images.device
    draws = [
        dataset.sample(config.ipc, seeded_generator(config.seed, Stream.TEST_REAL_IMAGES, s))
        for s in range(options.students)
    ]
    images, labels = (torch.stack(each) for each in zip(*draws, strict=True))
    sets = {
        "random": (images, labels, "hard"),
        "picked": (picked.images.to(device), picked.labels.to(device), picked.label_kind),
    }
    augment = DiffAugment(config.augment) if config.augment else None
    for name, (x, y, kind) in sets.items():
        count = len(picked.images)
        steps = options.student_epochs * -(-count // 256) + -(-len(dataset.test_images) // EVAL_BATCH)
        accuracies = evaluate(
            lambda: convnet(dataset, options.width, options.depth),
            *(x, y, dataset.test_images, dataset.test_labels),
            lr=options.lr_student,
            epochs=options.student_epochs,
            label_kind=kind,
            augment=augment,
            students=range(options.students),
            seed=config.seed,
            on_step=_ticks(progress, stop, f"students on {name}", options.students * steps),
        )
        results[name] = {"accuracies": accuracies, "mean": mean(accuracies), "images": count}
        results[name] |= {"lr": options.lr_student, "epochs": options.student_epochs}
    return results
