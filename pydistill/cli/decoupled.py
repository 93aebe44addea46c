"""``pydistill squeeze``, ``recover``, ``relabel`` and ``post-train``: the decoupled methods, a command a step."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import rich.console
import torch
import tyro

from pydistill.cli.console import (
    Interrupted,
    Stop,
    append_line,
    as_json,
    device_of,
    kept_lines,
    percentage,
    picture,
    progress_bars,
)
from pydistill.cli.distill import ranks
from pydistill.cli.folder import Folder
from pydistill.cli.settings import dataset_of, value_of
from pydistill.data import Dataset, DistilledSet, load, read_safetensors, write_atomic, write_safetensors
from pydistill.evaluate import accuracy
from pydistill.labels import SoftLabelStore
from pydistill.methods import DECOUPLED
from pydistill.methods.decoupled import Recover, check, iterations_done, merge, real_images, recover, stored
from pydistill.methods.options import check_numbers
from pydistill.methods.outer import world
from pydistill.methods.post_train import PostTrain, new_student, post_train
from pydistill.methods.relabel import Relabel, check_fit, relabel, views_of
from pydistill.methods.squeeze import Squeeze, Teacher, import_weights, squeeze, untrained

__all__ = ["run"]

SetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet-1k", "image-folder"]
MethodName = Literal["sre2l", "cda", "dwa", "infer", "random"]
_FOLDERS = {"tiny-imagenet": 64, "imagenet-1k": 224}  # sets that are read as image folders, and their size
_STATE = "training state"


@dataclass(frozen=True)
class SqueezeCommand:
    """Train a network with BatchNorm on the real images, or take weights from elsewhere: teacher.safetensors in --out.

    The four steps are squeeze, recover, relabel, post-train. Each takes the files of those before, and goes on with
    --resume where it was cut off. All methods may share one squeezed network.
    """

    config: tyro.conf.OmitArgPrefixes[Squeeze]
    """The network and its training."""
    dataset: SetName = "digits"
    """The real images; tiny-imagenet (64 pixels) and imagenet-1k (224) are read as image folders."""
    method: MethodName = "sre2l"
    """Which method it is for; squeezing is the same for all of them."""
    root: Path | None = None
    """Folder of the data set's files."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    weights: Path | None = None
    """A checkpoint, as torch saves it, to take instead of training; imagenet-1k needs no images then."""
    weights_key: str | None = None
    """Where in the checkpoint the weights stand, such as model_ema; by default under the first of the usual names."""
    out: Path = Path("teacher")
    """Folder for the results, new or empty."""
    resume: bool = False
    """Go on with the run in --out, with the same options."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    def go(self, run: Run) -> None:
        imagenet = self.weights is not None and self.dataset == "imagenet-1k"
        data = None if imagenet else _load(self.dataset, self.root, self.image_size).to(device_of(self.device))
        if self.weights is not None:
            teacher = import_weights(self.config, self.weights, data, key=self.weights_key)
        else:
            untrained(self.config, data)  # refuses a network that its images are too small for
        with run.started({"config": asdict(self.config), "dataset": self.dataset, "image_size": self.image_size}):
            if self.weights is None:
                with run.epochs("squeeze", self.config.epochs) as (state, on_epoch):
                    teacher = squeeze(self.config, data, state=state, on_epoch=on_epoch)
            teacher.save(run.folder / "teacher.safetensors")
            found = {} if data is None else {"accuracy": accuracy(teacher.net, data.test_images, data.test_labels)}
            run.finish(found, "teacher.safetensors")


@dataclass(frozen=True)
class RecoverCommand:
    """Make a set of images from a squeezed network: distilled.safetensors in --out. Under torchrun, ranks share them.

    Options that are not given take the presets of the method and the data set that the teacher was squeezed from.
    """

    config: tyro.conf.OmitArgPrefixes[Recover]
    """The method's hyper-parameters."""
    teacher: tuple[Path, ...]
    """The squeezed network's file; infer takes several."""
    method: MethodName = "sre2l"
    """random takes real images as they are, to compare with."""
    root: Path | None = None
    """Folder of the data set's files, where the method starts from real images."""
    out: Path = Path("recovered")
    """Folder for the results, new or empty."""
    resume: bool = False
    """Go on with the run in --out, with the same options."""
    checkpoint_every: int = 100
    """Iterations between two checkpoints of a batch."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""
    network: str | None = None
    """package.module:function that makes the network of your own whose weights the files of --teacher are."""

    def go(self, run: Run) -> None:
        check_numbers(self, flags=True, checkpoint_every=1)
        device = device_of(self.device)
        teachers = [Teacher.load(path, device, network=self.network) for path in self.teacher]
        about, real = teachers[0].config, None
        if self.config.starts_real:
            data = _load(about["dataset"], self.root, about["image_size"])
            real = real_images(self.config, data, teachers)
        check(self.config, teachers, real)
        rank, size = world()
        share = self.config.batches(teachers[0].num_classes, len(teachers))[rank::size]

        def logged(record: dict[str, Any]) -> bool:
            return record["iteration"] <= iterations_done(self.config, teachers, run.folder, record["batch"])

        with run.started(stored(self.config, teachers), logged):
            with run.phase("recover", len(share) * self.config.iterations) as note:
                recover(
                    *(self.config, teachers, run.folder),
                    **{"real": real, "rank": rank, "world": size},
                    checkpoint_every=self.checkpoint_every,
                    before_checkpoint=lambda record: note(record, self.checkpoint_every),
                    on_step=lambda _: run.stop(),
                )
            run.wait()
            if run.first:
                distilled = merge(self.config, teachers, run.folder)
                distilled.save(run.folder / "distilled.safetensors")
                shown = len(distilled.images) // teachers[0].num_classes
                write_atomic(run.folder / "images.png", picture(distilled, shown))
            per_class = self.config.per_class(teachers[0].num_classes, len(teachers))[0]
            run.finish({"images": per_class}, "distilled.safetensors")


@dataclass(frozen=True)
class RelabelCommand:
    """Store the teachers' soft labels of many views of each image: labels.store in --out. Ranks share the epochs."""

    config: tyro.conf.OmitArgPrefixes[Relabel]
    """The views, and how labels are stored."""
    images: Path
    """The distilled.safetensors of recover."""
    teacher: tuple[Path, ...]
    """The squeezed network's file; of several, the mean of their logits is taken."""
    method: MethodName | None = None
    """Whose preset to take; by default that of the images' method."""
    out: Path = Path("labels")
    """Folder for the results, new or empty."""
    resume: bool = False
    """Go on with the run in --out, with the same options."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""
    network: str | None = None
    """package.module:function that makes the network of your own whose weights the files of --teacher are."""

    def go(self, run: Run) -> None:
        distilled = DistilledSet.load(self.images)
        device = device_of(self.device)
        teachers = [Teacher.load(path, device, network=self.network) for path in self.teacher]
        for teacher in teachers:
            check_fit(distilled, teacher.num_classes, teacher.shape)
        rank, size = world()
        # every epoch of the views is reported again where they are gone through again, to find what lacks
        whole = run.folder / "labels.store"
        with run.started(asdict(self.config), lambda record: size > 1 and whole.exists()):
            path = whole if size == 1 else run.folder / f"labels-rank{rank}-of-{size}.store"
            with run.phase("relabel", -(-self.config.epochs // size)) as note:
                if not (size > 1 and whole.exists()):

                    def on_epoch(epoch: int) -> None:
                        note({"epoch": epoch}, 1)
                        run.stop()

                    relabel(self.config, distilled, teachers, path, rank=rank, world=size, on_epoch=on_epoch)
            run.wait()
            if run.first and size > 1 and not whole.exists():
                parts = [run.folder / f"labels-rank{each}-of-{size}.store" for each in range(size)]
                SoftLabelStore.merge(parts, whole)
            results: dict[str, Any] = {"epochs": self.config.epochs}
            if run.first:
                with SoftLabelStore.open(whole) as store:
                    run.console.print(told(store))
                    results["gradient_error"] = store.gradient_error and store.gradient_error._asdict()
            run.finish(results, "labels.store")


@dataclass(frozen=True)
class PostTrainCommand:
    """Train fresh students on the images and their stored labels, and test them: student.safetensors in --out."""

    config: tyro.conf.OmitArgPrefixes[PostTrain]
    """The student."""
    images: Path
    """The distilled.safetensors of recover."""
    labels: Path
    """The labels.store of relabel, whose views the student sees."""
    hard: bool = False
    """Train on the images' classes instead of the stored labels, on the same views."""
    method: MethodName | None = None
    """Of the images; it changes nothing here."""
    root: Path | None = None
    """Folder of the data set's files, for its test images."""
    students: int = 1
    """Students, from seeds on from --seed."""
    out: Path = Path("student")
    """Folder for the results, new or empty."""
    resume: bool = False
    """Go on with the run in --out, with the same options."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    def go(self, run: Run) -> None:
        check_numbers(self, flags=True, students=1)
        distilled = DistilledSet.load(self.images)
        store = SoftLabelStore.open(self.labels)
        views = views_of(store)
        if (dataset := distilled.config.get("dataset")) is None:
            raise ValueError(f"{self.images}: expected a set that says what it was made from, to be tested on that")
        data = _load(dataset, self.root, distilled.images.shape[2])
        test = distilled.normalise(data.test_images, data)
        device, found = device_of(self.device), []
        options = {"num_classes": data.num_classes, "device": device}
        soft = None if self.hard else store
        new_student(self.config, distilled, views, soft, **options)  # refuses what does not fit
        with run.started({"config": asdict(self.config), "hard": self.hard, "students": self.students}):
            if run.first and not self.hard:
                run.console.print(told(store))
            for student in range(self.students):
                config = PostTrain(**{**asdict(self.config), "seed": self.config.seed + student})
                with run.epochs(f"student{student}", views.epochs) as (state, on_epoch):
                    net = post_train(config, distilled, views, soft, **options, state=state, on_epoch=on_epoch)
                found.append(accuracy(net, test.to(device), data.test_labels.to(device)))
                about = asdict(config) | {"channels": data.channels, "image_size": distilled.images.shape[2]}
                about["dataset"] = data.name
                name = "student.safetensors" if self.students == 1 else f"student{student}.safetensors"
                Teacher(net, distilled.mean, distilled.std, data.class_names, about).save(run.folder / name)
            run.finish({"accuracy": found}, "results.json")


def told(store: SoftLabelStore) -> str:
    """What a store's format costs."""
    form = f"{store.format}, k={store.k} of {store.num_classes}" if store.k else store.format
    error = store.gradient_error
    cost = "not measured: the file is of an older version" if error is None else str(error)
    return f"labels in {form}, at temperature {store.temperature:g}; error of the student's gradients: {cost}"


_Command = SqueezeCommand | RecoverCommand | RelabelCommand | PostTrainCommand


class Run:
    """What the four commands share: the folder, its metrics and checkpoints, and the ranks."""

    def __init__(self, name: str, command: _Command, console: rich.console.Console, stop: Stop):
        self.name, self.console, self.stop = name, console, stop
        self.began, self.first = time.monotonic(), world()[0] == 0
        self._folder = Folder(command.out, name, name, resume=command.resume, first=self.first)
        self.folder = command.out
        self.metrics = self.folder / f"metrics{'' if self.first else f'-rank{world()[0]}'}.jsonl"

    @contextlib.contextmanager
    def started(
        self, options: dict[str, Any], logged: Callable[[dict[str, Any]], bool] | None = None
    ) -> Iterator[None]:
        """Holds the folder, which is made or is that of a run with the same options, ValueError for another's.

        ``logged`` tells which records of the metrics stand; the others are of steps that are taken once more. By
        default those of the epochs that a phase's state has behind it.
        """
        options = {"command": self.name, **options}
        self._folder.check_same(options)
        with self._folder.held():
            if self.first:
                states = {path: self._done(path) for path in self.folder.glob("*-state.safetensors")}
                stands = logged or (lambda record: record["epoch"] <= states.get(self._state(record["phase"]), 0))
                lines = {path: kept_lines(path, stands) for path in self.folder.glob("metrics*.jsonl")}
                self._folder.begin(options)
                for path, kept in lines.items():
                    write_atomic(path, kept)
            self.wait()
            if self.first:
                self.console.print(f"{self.name} -> {self.folder}")
            yield

    def wait(self) -> None:
        """Until every rank is here."""
        if world()[1] > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[dict[str, Any], int], None]]:
        """Progress and metrics: gives what takes a record and by how much it is further."""
        with progress_bars(self.console) as progress:
            task = progress.add_task(name, total=total, note="")

            def note(record: dict[str, Any], advance: int) -> None:
                append_line(self.metrics, {"phase": name, **record})
                shown = f"loss {record['loss']:.4f}" if "loss" in record else ""
                progress.update(task, advance=advance, note=shown)

            yield note

    @contextlib.contextmanager
    def epochs(self, name: str, total: int) -> Iterator[tuple[dict[str, Any] | None, Callable[..., None]]]:
        """A training's state to go on from, and what keeps the next one after each epoch."""
        path = self._state(name)
        state = read_safetensors(path, _STATE)[0] if path.exists() else None
        with self.phase(name, total) as note:

            def on_epoch(record: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
                # the line first: a run that is killed before it has the state drops it again, and never lacks it
                note(record, 1)
                write_safetensors(path, state, _STATE, {})
                self.stop()

            yield state, on_epoch

    def _state(self, phase: str) -> Path:
        return self.folder / f"{phase}-state.safetensors"

    def _done(self, path: Path) -> int:
        return int(read_safetensors(path, _STATE)[0]["epoch"])

    def finish(self, results: dict[str, Any], made: str) -> None:
        if self.first:
            write_atomic(self.folder / "results.json", as_json(results))
            brief = {name: value for name, value in results.items() if not isinstance(value, dict | None)}
            shown = "".join(f"{name} {_shown(name, value)}; " for name, value in brief.items())
            self.console.print(f"{shown}{time.monotonic() - self.began:.0f} s; {made} is in {self.folder}")
        self.wait()


def _shown(name: str, value: Any) -> str:
    if name != "accuracy":
        return str(value)
    return percentage([value] if isinstance(value, float) else value)


def run(name: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows the command ``name``: squeeze, recover, relabel or post-train."""
    command = _parse(name, argv)
    with ranks(command.device):
        run = Run(name, command, console, stop)
        try:
            command.go(run)
        except Interrupted:
            again = f"--out {shlex.quote(str(command.out))} --resume"
            console.print(f"stopped; go on with the same options and {again}")
            raise


def _parse(name: str, argv: list[str]) -> _Command:
    """The command with the presets of the data set and the method that are named, or stand in the files named."""
    method = value_of(argv, "--method")
    if method is not None and method not in get_args(MethodName):
        raise ValueError(f"--method: expected one of {', '.join(get_args(MethodName))}, got {method!r}")
    if name == "squeeze":
        dataset = dataset_of(argv, SetName)
        default: Any = SqueezeCommand(Squeeze.preset(dataset), dataset)  # type: ignore[arg-type]
    elif name == "recover":
        teacher = value_of(argv, "--teacher")
        dataset = "" if teacher is None else read_safetensors(teacher, "teacher")[1]["config"]["dataset"]
        default = RecoverCommand(DECOUPLED[method or "sre2l"].preset(dataset), tyro.MISSING, method or "sre2l")  # type: ignore[arg-type]
    else:
        images = value_of(argv, "--images")
        about = {} if images is None else read_safetensors(images, "distilled")[1]["config"]
        dataset = about.get("dataset", "")
        if name == "relabel":
            config = Relabel.preset(dataset, method or about.get("method", ""))
            default = RelabelCommand(config, tyro.MISSING, tyro.MISSING)
        else:
            default = PostTrainCommand(PostTrain.preset(dataset), tyro.MISSING, tyro.MISSING)
    options = {"args": argv, "prog": f"pydistill {name}", "config": (tyro.conf.FlagCreatePairsOff,)}
    return tyro.cli(type(default), default=default, **options)


def _load(name: str, root: Path | None, image_size: int | None) -> Dataset:
    """A data set by the name that the presets know it by, in the size that was asked for."""
    if name in _FOLDERS:
        size = image_size or _FOLDERS[name]
        data = load("image-folder", root, image_size=size)
        return Dataset(**{**vars(data), "name": name})
    sized = name in ("digits", "image-folder")
    return load(name, root, image_size=image_size if sized else None)
