"""Dataset distillation from the command line: experts, distilled sets, their evaluation, the time of the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any, Literal

import torch
from torch import nn

from pydistill import __version__
from pydistill.data import (
    EXPORT_HEADER,
    REPOSITORY_NORMALISATION,
    Dataset,
    DistilledSet,
    load,
    renormalise,
    write_atomic,
)
from pydistill.evaluate import evaluate
from pydistill.methods.mtt import MTTConfig, MTTState, distill
from pydistill.nn import ConvNet, make
from pydistill.trajectory.experts import data_crc32, seeded_generator, seeded_net, train_experts
from pydistill.trajectory.store import ExpertStore, as_trajectories
from pydistill.trajectory.train import EVAL_BATCH

try:
    import rich.progress
    import rich.table
    import tyro
    from PIL import Image
except ModuleNotFoundError as _error:
    _missing = {"PIL": "pillow", "rich": "rich", "tyro": "tyro"}.get((_error.name or "").split(".")[0])
    if _missing is None:
        raise
else:
    _missing = None

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "image-folder"]
NetName = Literal["convnet", "mlp", "alexnet", "vgg11", "resnet18", "resnet18_ap"]


@dataclass(frozen=True)
class Preset:
    """What a data set's run takes for the options that are not given; chosen for one image per class."""

    # the network: width and depth of the ConvNet
    width: int
    depth: int
    # the experts
    num_experts: int
    train_epochs: int
    lr_expert: float
    batch_train: int
    # MTT
    iterations: int
    syn_steps: int
    expert_epochs: int
    max_start_epoch: int
    lr_img: float
    lr_lr: float
    lr_teacher: float
    # the students: passes over a small set, passes over the whole training set, their learning rate on real images
    student_epochs: int
    whole_epochs: int
    lr_student: float


# fmt: off
PRESETS: dict[str, Preset] = {
    "digits": Preset(
        width=32, depth=3,
        num_experts=5, train_epochs=6, lr_expert=0.05, batch_train=64,
        iterations=150, syn_steps=10, expert_epochs=2, max_start_epoch=5, lr_img=100.0, lr_lr=1e-5, lr_teacher=0.05,
        student_epochs=200, whole_epochs=6, lr_student=0.01,
    ),
    "fashion-mnist": Preset(
        width=64, depth=3,
        num_experts=6, train_epochs=1, lr_expert=0.02, batch_train=256,
        iterations=200, syn_steps=30, expert_epochs=1, max_start_epoch=1, lr_img=300.0, lr_lr=1e-5, lr_teacher=0.05,
        student_epochs=200, whole_epochs=1, lr_student=0.01,
    ),
    "cifar10": Preset(
        width=128, depth=3,
        num_experts=10, train_epochs=20, lr_expert=0.01, batch_train=256,
        iterations=5000, syn_steps=50, expert_epochs=2, max_start_epoch=2, lr_img=100.0, lr_lr=1e-7, lr_teacher=0.01,
        student_epochs=1000, whole_epochs=50, lr_student=0.01,
    ),
    "image-folder": Preset(
        width=128, depth=3,
        num_experts=10, train_epochs=20, lr_expert=0.01, batch_train=256,
        iterations=5000, syn_steps=20, expert_epochs=2, max_start_epoch=10, lr_img=1000.0, lr_lr=1e-5, lr_teacher=0.01,
        student_epochs=1000, whole_epochs=50, lr_student=0.01,
    ),
}
# fmt: on


_NOT_OF_RESULT = ("root", "experts", "device", "checkpoint_every")  # how a run was done, not what it made
_TRAINING = ("num_experts", "epochs", "lr", "momentum", "weight_decay", "schedule", "batch_size", "seed")
_OF_EXPERTS = ("num_experts", "train_epochs", "lr_expert")  # what --experts takes the place of


@dataclass(frozen=True)
class Experts:
    """Train experts into one file, for pydistill distill --experts; or make the file of replay buffers.

    Options that stand at None take the data set's preset. The same command goes on with a file that was cut off, at any
    moment, and ends in the bytes of a run that was not; the file of another training is refused. --out receives the
    experts, and --out with .jsonl added the loss and accuracy of each epoch.
    """

    out: Path
    """The file to write."""
    overwrite: bool = False
    """Start anew, whatever is at --out."""
    dataset: DatasetName = "digits"
    """What to train on; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files, as for pydistill distill."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    width: int | None = None
    """Channels of the ConvNet; the papers take 128."""
    depth: int | None = None
    """Blocks of the ConvNet: 3 for images of 28 or 32 pixels, 4 for 64."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the stored parameters; experts train in fp32."""
    replay_buffers: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """replay_buffer_*.pt of another code, to convert instead of training; width and depth say of which network."""

    num_experts: int | None = None
    """Experts to train."""
    epochs: int | None = None
    """Epochs of each expert."""
    lr: float | None = None
    """Learning rate."""
    momentum: float = 0.0
    """Of SGD; an epoch continues the velocity of the one before."""
    weight_decay: float = 0.0
    """Of SGD."""
    schedule: Literal["step", "cosine"] | None = None
    """Factor on the learning rate by epoch: a tenth from half of them on, or half a cosine; none by default."""
    batch_size: int | None = None
    """Images per SGD step."""
    seed: int = 0
    """Of the initial parameters and the order of the images."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    def resolved(self) -> Experts:
        """The same options with those at None taken from the preset."""
        preset = PRESETS[self.dataset]
        options = {"width": preset.width, "depth": preset.depth, "num_experts": preset.num_experts}
        options |= {"epochs": preset.train_epochs, "lr": preset.lr_expert, "batch_size": preset.batch_train}
        return dataclasses.replace(self, **{k: v for k, v in options.items() if getattr(self, k) is None})


@dataclass(frozen=True)
class Distill:
    """Distil a data set: train experts, match their trajectories, and test fresh students on the result.

    Options that stand at None take the data set's preset. The folder --out receives the experts, a checkpoint,
    metrics.jsonl, images.png and distilled.safetensors; a run that was cut off goes on with --resume.
    """

    method: tyro.conf.Positional[Literal["mtt"]] = "mtt"
    """The distillation method: mtt, matching training trajectories (Cazenavette et al., CVPR 2022)."""
    dataset: DatasetName = "digits"
    """What to distil; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files; fashion-mnist looks in /usr/share/datasets/fashion-mnist by itself."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    ipc: int = 1
    """Synthetic images per class."""
    iterations: int | None = None
    """Outer steps; a finished run goes on when it is resumed with more of them."""
    seed: int = 0
    """Of everything that is drawn."""
    out: Path | None = None
    """Folder for the results, new or empty; a new one under runs/ by default."""
    resume: bool = False
    """Go on with the run in --out; its options are kept."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    width: int | None = None
    """Channels of the ConvNet; the papers take 128."""
    depth: int | None = None
    """Blocks of the ConvNet: 3 for images of 28 or 32 pixels, 4 for 64."""

    experts: Path | None = None
    """A file of pydistill experts, instead of experts that this run trains."""
    num_experts: int | None = None
    """Experts to train."""
    train_epochs: int | None = None
    """Epochs of each expert."""
    lr_expert: float | None = None
    """Learning rate of the experts."""
    batch_train: int | None = None
    """Real images per SGD step, of experts and of students."""

    syn_steps: int | None = None
    """Inner steps on synthetic images."""
    expert_epochs: int | None = None
    """How many epochs ahead of its start the target lies."""
    max_start_epoch: int | None = None
    """Starts are drawn from that many first epochs."""
    batch_syn: int | None = None
    """Synthetic images per inner step; all of them by default."""
    lr_img: float | None = None
    """Outer learning rate of the images."""
    lr_lr: float | None = None
    """Outer learning rate of the students' learning rate."""
    lr_teacher: float | None = None
    """Where the students' learning rate starts."""

    students: int = 5
    """Fresh students for each accuracy."""
    student_epochs: int | None = None
    """Passes of a student over a distilled or random set."""
    whole_epochs: int | None = None
    """Passes of a student over the whole training set; 0 leaves that row out."""
    lr_student: float | None = None
    """Learning rate of students on real images; on distilled ones they take the learnt rate."""
    checkpoint_every: int = 25
    """Iterations between checkpoints."""

    def resolved(self) -> Distill:
        """The same options with those at None taken from the preset."""
        preset = asdict(PRESETS[self.dataset])
        for name in _OF_EXPERTS if self.experts else ():
            if getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected none with --experts, whose file says it, got {getattr(self, name)}")
            del preset[name]
        return dataclasses.replace(self, **{k: v for k, v in preset.items() if getattr(self, k) is None})

    def stored(self) -> dict[str, Any]:
        """The options as JSON has them, without those that say where the run lies."""
        options = {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}
        paths = {"root": self.root, "experts": self.experts}
        return options | {name: str(path.absolute()) if path else None for name, path in paths.items()}

    def mtt(self) -> MTTConfig:
        names = {f.name for f in dataclasses.fields(MTTConfig)} & {f.name for f in dataclasses.fields(self)}
        return MTTConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Evaluate:
    """Train fresh students on a distilled file and test them: a row for each network architecture.

    The protocol is the papers': SGD with momentum 0.9 and weight decay 5e-4, a tenth of the learning rate from half of
    the epochs on.
    """

    file: tyro.conf.Positional[Path]
    """A distilled.safetensors that pydistill distill wrote; or a folder of images.pt, labels.pt and maybe lr.pt."""
    net: tuple[NetName, ...] = ("convnet",)
    """The students' architectures, one or more."""
    dataset: DatasetName | None = None
    """What to test on; by default the data set that the file was made from. A folder that other code wrote is taken
    to be normalised as the method repositories do it for this set."""
    root: Path | None = None
    """Folder of the data set's files, as for pydistill distill."""
    students: int = 5
    """Fresh students of each architecture."""
    epochs: int | None = None
    """Passes of a student over the distilled set; by default as many as when it was made, or else 1000."""
    batch_size: int = 256
    """Distilled images per SGD step."""
    lr: float | None = None
    """Learning rate of the students; by default the one learnt along with the images."""
    label_kind: Literal["logits", "probs"] | None = None
    """What the soft labels of a folder are that other code wrote."""
    width: int | None = None
    """Channels of the ConvNet; by default as when the file was made, or else 128."""
    depth: int | None = None
    """Blocks of the ConvNet; by default as when the file was made, or else 3, from 64 pixels on 4."""
    seed: int = 0
    """Of the students; 0 gives the very students of pydistill distill at its default seed."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""
    json: Path | None = None
    """Where to write the accuracies of all students as JSON."""


@dataclass(frozen=True)
class Export:
    """Write a distilled file as the method repositories and DD-Ranking have theirs: images.pt, labels.pt and lr.pt.

    What these cannot say is in distilled.json beside them; pydistill evaluate takes the folder as well as the file.
    """

    file: tyro.conf.Positional[Path]
    """A distilled.safetensors that pydistill distill wrote."""
    folder: tyro.conf.Positional[Path]
    """Where to write; made where it is not there."""
    normalised: Literal["own", "repositories"] = "own"
    """By which mean and deviation: own, the file's, which are those of the real pixels; repositories, the constants of
    the method repositories and DD-Ranking, which their code needs (Fashion-MNIST and CIFAR-10)."""
    overwrite: bool = False
    """Take the place of files that are there."""


@dataclass(frozen=True)
class Bench:
    """Time the kernels on this machine beside plain PyTorch and torch.compile: a table per case, in a few minutes."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ()
    """Cases by name; without any, those that a user would decide by. An unknown name lists them."""


class Interrupted(Exception):
    """A signal asked to stop, and the step under way is done."""


class Stop:
    """Turns the first SIGINT or SIGTERM into `Interrupted` at the next call; a second one ends the process at once."""

    requested = False

    def __call__(self) -> None:
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stop]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(number: int, frame: Any) -> None:
            self.requested = True
            for each in previous:
                signal.signal(each, signal.SIG_DFL)

        for number in previous:
            signal.signal(number, request)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """The console command ``pydistill``; exits with 0, 1 after an error, 130 after SIGINT or SIGTERM."""
    if _missing:
        sys.exit(f"pydistill: the command line needs {_missing}, which is not installed: pip install 'pydistill[cli]'")
    argv = list(sys.argv[1:] if argv is None else argv)
    command = tyro.cli(
        Annotated[Distill, tyro.conf.subcommand("distill")]
        | Annotated[Experts, tyro.conf.subcommand("experts")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Bench, tyro.conf.subcommand("bench")],
        args=argv,
        prog="pydistill",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        if isinstance(command, Bench):
            sys.exit(_bench(command))
        with Stop().installed() as stop:
            if isinstance(command, Distill):
                config = _options_of_resumed(command, argv[1:]) if command.resume else command
                _Run(config.resolved(), _folder(config), console, stop).go()
            elif isinstance(command, Experts):
                _experts(command, console, stop)
            elif isinstance(command, Export):
                _export(command, console)
            else:
                _evaluate(command, console, stop)
    except Interrupted:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"pydistill: {error}", file=sys.stderr)
        sys.exit(1)


def _bench(command: Bench) -> int:
    # installed, the benchmarks are a part of the package; in a checkout, a folder of their own beside it
    installed = importlib.util.find_spec("pydistill.bench") is not None
    return importlib.import_module("pydistill.bench.run" if installed else "bench.run").brief(command.cases)


def _folder(config: Distill) -> Path:
    if config.out is None:
        return Path("runs") / f"{config.method}-{config.dataset}-ipc{config.ipc}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out: expected a folder, {config.out} is a file")
    if not config.resume and config.out.exists() and any(config.out.iterdir()):
        raise ValueError(
            f"--out: expected a new or empty folder, {config.out} is not empty; --resume goes on with a run"
        )
    return config.out


def _options_of_resumed(command: Distill, arguments: list[str]) -> Distill:
    """The options in the run's config.json; one that is given again has to say the same, the iterations excepted."""
    if command.out is None:
        raise ValueError("--resume: expected --out with the folder of the run to go on with")
    path, wanted = command.out / "config.json", "the options of a run of pydistill distill"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted} to go on with, found no file")
    try:
        options = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign ({error})") from error
    if not isinstance(options, dict) or options.keys() != Distill().stored().keys():
        raise ValueError(f"{path}: expected {wanted}; it holds other fields")
    options |= {name: Path(options[name]) if options[name] else None for name in ("root", "experts")}
    saved = Distill(**options, out=command.out)
    config = (tyro.conf.FlagCreatePairsOff,)
    given = tyro.cli(Distill, args=arguments, prog="pydistill distill", default=saved, config=config)
    for name, value in saved.stored().items():
        if name not in ("iterations", "root", "device", "checkpoint_every") and given.stored()[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: expected {value} as the run in {command.out} has, got {given.stored()[name]}")
    return given


class _Run:
    """One ``pydistill distill``: its folder, and the phases that fill it. Each phase goes on where its files end."""

    def __init__(self, config: Distill, folder: Path, console: rich.console.Console, stop: Stop):
        self.config, self.folder, self.console, self.stop = config, folder, console, stop
        self.mtt = config.mtt()
        if config.students < 1 or config.checkpoint_every < 1:
            raise ValueError("--students, --checkpoint-every: expected at least 1 of each")
        self.experts_file, self.state_file = config.experts or folder / "experts.store", folder / "state.safetensors"
        self.metrics, self.results_file = folder / "metrics.jsonl", folder / "results.json"
        self.progress = _progress(console)

    def go(self) -> None:
        began = time.monotonic()
        kept = self.config.resume
        try:
            dataset = load(self.config.dataset, self.config.root, image_size=self.config.image_size)
            self.dataset = dataset.to(_device(self.config.device))
            self.net = seeded_net(self.make_net, self.config.seed, device=self.device)
            state = MTTState.load(self.state_file, self.mtt, self.device) if self.state_file.exists() else None
            state = state or MTTState.initial(self.mtt, self.dataset)
            if state.iteration > self.mtt.iterations:
                raise ValueError(
                    f"--iterations: expected at least {state.iteration}, already done, got {self.mtt.iterations}"
                )
            experts = self._ready_experts() if self.config.experts else None
            self.stop()
            # Whatever can be refused has been: from here on the folder holds a run that can go on.
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "config.json", _json(self.config.stored()))
            kept = True
            self.console.print(f"{self.dataset.name} -> {self.folder}")
            results = self._results()
            self._forget_metrics(state.iteration, results)
            with self.progress:
                experts = experts or self._train_experts()
                distilled = self._distill(experts, state)
                self._test(distilled, results)
        except Interrupted:
            again = f"go on with: pydistill distill --out {shlex.quote(str(self.folder))} --resume"
            self.console.print(f"stopped; {again if kept else 'nothing was begun, the same command starts anew'}")
            raise
        self.console.print(self._table(distilled, results))
        self.console.print(
            f"{time.monotonic() - began:.0f} s; images.png and distilled.safetensors are in {self.folder}"
        )

    @property
    def device(self) -> torch.device:
        return self.dataset.train_images.device

    def make_net(self) -> ConvNet:
        return _convnet(self.dataset, self.config.width, self.config.depth)

    def _results(self) -> dict[str, Any]:
        """What of the students' accuracies an earlier process left; those of another number of iterations are void."""
        try:
            results = json.loads(self.results_file.read_text()) if self.results_file.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self.results_file}: expected accuracies as JSON; it is truncated or foreign") from error
        if results.get("iterations") != self.mtt.iterations:
            results.pop("distilled", None)
        return results

    def _log(self, record: dict[str, Any]) -> None:
        _append_line(self.metrics, record)

    def _forget_metrics(self, iteration: int, results: dict[str, Any]) -> None:
        """Drops the lines written after the last checkpoint, whose steps are taken, and logged, again."""
        epochs = dict(enumerate(_completed(self.experts_file)))

        def keep(record: dict[str, Any]) -> bool:
            if record["phase"] == "experts":
                return record["epoch"] <= epochs.get(record["expert"], 0)
            return record["iteration"] <= iteration if record["phase"] == "distill" else record["set"] in results

        _keep_lines(self.metrics, keep)

    def _ready_experts(self) -> ExpertStore:
        """Those of --experts, once they are known to be of this data set and network."""
        store = ExpertStore(self.experts_file)
        found = data_crc32(self.dataset.train_images, self.dataset.train_labels)
        if store.data_crc32 not in (None, found):
            raise ValueError(
                f"{store.path}: expected experts of {self.dataset.name} with crc32 {found} of its images and labels, "
                f"got {store.dataset} with {store.data_crc32}"
            )
        as_trajectories(store, self.net, self.mtt.max_start_epoch - 1 + self.mtt.expert_epochs)
        return store

    def _train_experts(self) -> ExpertStore:
        config = self.config
        experts = _train_with_progress(
            *(self.make_net, self.dataset, self.experts_file, self.progress, self.stop),
            lambda record: self._log({"phase": "experts", **record}),
            num_experts=config.num_experts,
            epochs=config.train_epochs,
            lr=config.lr_expert,
            batch_size=config.batch_train,
            seed=config.seed,
        )
        self.console.print(f"{len(experts)} experts trained for {config.train_epochs} epochs")
        return experts

    def _distill(self, experts: ExpertStore, state: MTTState) -> DistilledSet:
        task = self.progress.add_task("distil", total=self.mtt.iterations, completed=state.iteration, note="")

        def on_step(state: MTTState, record: dict[str, float]) -> None:
            self._log({"phase": "distill", **record})
            note = f"loss {record['loss']:.3f}, lr {record['lr']:.4f}"
            self.progress.update(task, completed=state.iteration, note=note)
            last = state.iteration == self.mtt.iterations
            if last or self.stop.requested or state.iteration % self.config.checkpoint_every == 0:
                state.save(self.state_file, self.mtt)
            self.stop()

        distilled = distill(self.mtt, self.dataset, experts, self.net, state=state, on_step=on_step)
        options = {k: v for k, v in self.config.stored().items() if k not in _NOT_OF_RESULT}
        distilled.config |= {**options, "pydistill": __version__}
        distilled.save(self.folder / "distilled.safetensors")
        self.console.print(f"distilled in {state.iteration} iterations, learning rate {distilled.lr:.4f}")
        write_atomic(self.folder / "images.png", _picture(distilled, self.config.ipc))
        return distilled

    def _test(self, distilled: DistilledSet, results: dict[str, Any]) -> None:
        """Fills ``results`` with the students' accuracies on each set; what is there already stays."""
        config, dataset = self.config, self.dataset
        synthetic = distilled.images.to(self.device), distilled.labels.to(self.device)
        whole = dataset.train_images, dataset.train_labels
        # every student on random real images gets a draw of its own
        draws = [
            dataset.sample(config.ipc, seeded_generator(config.seed, 4, student)) for student in range(config.students)
        ]
        random = tuple(torch.stack(each) for each in zip(*draws, strict=True))
        sets = {
            "random": (random, config.lr_student, config.student_epochs, 256),
            "distilled": (synthetic, distilled.lr, config.student_epochs, 256),
            "whole": (whole, config.lr_student, config.whole_epochs, config.batch_train),
        }
        for name, (training_set, lr, epochs, batch_size) in sets.items():
            if name in results or epochs == 0:
                continue
            images = training_set[0].shape[-4]
            steps = epochs * -(-images // batch_size) + -(-len(dataset.test_images) // 500)
            task = self.progress.add_task(f"students on {name}", total=config.students * steps, note="")

            def on_step(task: rich.progress.TaskID = task) -> None:
                self.progress.advance(task)
                self.stop()

            accuracies = evaluate(
                self.make_net,
                *training_set,
                dataset.test_images,
                dataset.test_labels,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                students=range(config.students),
                seed=config.seed,
                on_step=on_step,
            )
            self.progress.update(task, note=f"accuracy {mean(accuracies):.1%}")
            results[name] = {"accuracies": accuracies, "lr": lr, "epochs": epochs, "images": images}
            results["iterations"] = config.iterations
            write_atomic(self.results_file, _json(results))
            self._log({"phase": "evaluate", "set": name, **results[name]})

    def _table(self, distilled: DistilledSet, results: dict[str, Any]) -> rich.table.Table:
        config = self.config
        table = _accuracy_table(
            f"{config.dataset}, ipc {config.ipc}, ConvNet-D{config.depth}-W{config.width}",
            "training set",
            config.students,
        )
        labels = {"random": "random real", "distilled": f"distilled ({config.method})", "whole": "whole set"}
        for name, label in labels.items():
            if row := results.get(name):
                _add_row(table, label, row["images"], row["epochs"], row["lr"], row["accuracies"])
        return table


def _experts(command: Experts, console: rich.console.Console, stop: Stop) -> None:
    config = command.resolved()
    dataset = load(config.dataset, config.root, image_size=config.image_size).to(_device(config.device))

    def make_net() -> ConvNet:
        return _convnet(dataset, config.width, config.depth)

    if config.replay_buffers:
        defaults = {f.name: f.default for f in dataclasses.fields(Experts)}
        if changed := [name for name in _TRAINING if getattr(command, name) != defaults[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"{flags}: expected none with --import, which trains nothing")
        options = {"dtype": config.dtype, "dataset": dataset.name, "overwrite": config.overwrite}
        store = ExpertStore.import_replay_buffers(config.replay_buffers, make_net(), config.out, **options)
        console.print(f"{len(store)} experts of {store.epochs} epochs imported: {config.out}")
        return
    began, metrics = time.monotonic(), config.out.with_name(f"{config.out.name}.jsonl")
    epochs = {} if config.overwrite else dict(enumerate(_completed(config.out)))
    _keep_lines(metrics, lambda record: record["epoch"] <= epochs.get(record["expert"], 0))
    try:
        with _progress(console) as progress:
            store = _train_with_progress(
                *(make_net, dataset, config.out, progress, stop, lambda record: _append_line(metrics, record)),
                **{name: getattr(config, name) for name in (*_TRAINING, "dtype", "overwrite")},
            )
    except Interrupted:
        console.print("stopped; the same command, without --overwrite, goes on")
        raise
    seconds = time.monotonic() - began
    console.print(f"{len(store)} experts trained for {store.epochs} epochs in {seconds:.0f} s: {config.out}")


def _train_with_progress(
    make_net: Callable[[], ConvNet],
    dataset: Dataset,
    path: Path,
    progress: rich.progress.Progress,
    stop: Stop,
    log: Callable[[dict[str, Any]], None],
    *,
    num_experts: int,
    epochs: int,
    batch_size: int,
    overwrite: bool = False,
    **options: Any,
) -> ExpertStore:
    steps = -(-len(dataset.train_images) // batch_size)
    done = 0 if overwrite else sum(_completed(path)) * steps
    task = progress.add_task("experts", total=num_experts * epochs * steps, completed=done, note="")

    def on_step() -> None:
        progress.advance(task)
        stop()

    def on_epoch(record: dict[str, Any]) -> None:
        log(record)
        progress.update(task, note=f"accuracy {record['accuracy']:.1%}")

    return train_experts(
        *(make_net, dataset.train_images, dataset.train_labels, path),
        **{"num_experts": num_experts, "epochs": epochs, "batch_size": batch_size, "overwrite": overwrite},
        dataset=dataset.name,
        on_step=on_step,
        on_epoch=on_epoch,
        **options,
    )


def _completed(path: Path) -> list[int]:
    """Whole epochs of the experts in a file; no experts when there is no file."""
    if not path.exists():
        return []
    with ExpertStore(path) as store:
        return store.completed


def _append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the other records of a file of JSON lines, and the line that a killed process was writing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            kept += [line] if keep(json.loads(line)) else []
    write_atomic(path, "".join(kept).encode())


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}"))
    return rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)


def _evaluate(command: Evaluate, console: rich.console.Console, stop: Stop) -> None:
    distilled = _distilled(command)
    config = {}
    for key, kind in (("dataset", str), ("width", int), ("depth", int), ("student_epochs", int)):
        config[key] = distilled.config.get(key)
        if not isinstance(config[key], kind | None):
            raise ValueError(f"{command.file}: expected {key} ({kind.__name__}) or none in it, got {config[key]!r}")
    name = command.dataset or config["dataset"]
    if name is None:
        raise ValueError(f"--dataset: expected the set to test on, {command.file} does not say what it was made from")
    if command.students < 1 or command.batch_size < 1 or not command.net:
        raise ValueError("--students, --net, --batch-size: expected at least 1 of each")
    if command.json and not command.json.parent.is_dir():
        raise FileNotFoundError(f"--json: expected a file in a folder that is there, got {command.json}")
    size = distilled.images.shape[2] if name in ("digits", "image-folder") else None
    dataset = load(name, command.root, image_size=size).to(_device(command.device))
    device = dataset.test_images.device
    _check_fits(command.file, distilled, dataset)
    test_images = renormalise(dataset.test_images, (dataset.mean, dataset.std), (distilled.mean, distilled.std))
    options = {
        "lr": _given(command.lr, distilled.lr),
        "epochs": _given(command.epochs, config["student_epochs"], 1000),
        "batch_size": command.batch_size,
    }
    shape = dataset.channels, dataset.num_classes, dataset.image_size
    sizes = {name: _given(getattr(command, name), config[name]) for name in ("width", "depth")}
    makers = {net: partial(make, net, *shape, **(sizes if net == "convnet" else {})) for net in command.net}
    labels = {net: _label(net, maker()) for net, maker in makers.items()}  # refuses what cannot be built
    steps = options["epochs"] * -(-len(distilled.images) // command.batch_size) + -(-len(test_images) // EVAL_BATCH)
    table = _accuracy_table(f"{command.file}: {dataset.name}", "network", command.students)
    about = {"file": str(command.file), "dataset": dataset.name, "images": len(distilled.images)}
    about |= {"label_kind": distilled.label_kind, **options, "seed": command.seed, "pydistill": __version__}
    results = {}
    with _progress(console) as progress:
        for net, maker in makers.items():
            task = progress.add_task(labels[net], total=command.students * steps, note="")

            def on_step(task: rich.progress.TaskID = task) -> None:
                progress.advance(task)
                stop()

            accuracies = evaluate(
                maker,
                distilled.images.to(device),
                distilled.labels.to(device),
                test_images,
                dataset.test_labels,
                students=range(command.students),
                seed=command.seed,
                label_kind=distilled.label_kind,
                on_step=on_step,
                **options,
            )
            results[labels[net]] = {"mean": mean(accuracies), "std": pstdev(accuracies), "accuracies": accuracies}
            _add_row(table, labels[net], len(distilled.images), options["epochs"], options["lr"], accuracies)
            if command.json:
                write_atomic(command.json, _json(about | {"nets": results}))
    console.print(table)


def _distilled(command: Evaluate) -> DistilledSet:
    if not command.file.is_dir():
        if command.label_kind:
            raise ValueError(f"--label-kind: expected none, {command.file} says what its labels are")
        return DistilledSet.load(command.file)
    space: dict[str, Sequence[float]] = {}
    if not (command.file / EXPORT_HEADER).exists():
        space = dict(zip(("mean", "std"), _repository_normalisation(command.dataset, command.file), strict=True))
    return DistilledSet.import_tensors(command.file, **space, lr=command.lr, label_kind=command.label_kind)


def _repository_normalisation(dataset: str | None, file: Path) -> tuple[Sequence[float], Sequence[float]]:
    if dataset not in REPOSITORY_NORMALISATION:
        known = " or ".join(REPOSITORY_NORMALISATION)
        raise ValueError(f"{file}: the repositories' normalisation is known for {known}; got {dataset}")
    return REPOSITORY_NORMALISATION[dataset]


def _export(command: Export, console: rich.console.Console) -> None:
    distilled = DistilledSet.load(command.file)
    if command.normalised == "repositories":
        space = _repository_normalisation(distilled.config.get("dataset"), command.file)
        distilled = distilled.renormalised(*map(torch.tensor, space))
    distilled.export(command.folder, overwrite=command.overwrite)
    mean, std = ([round(each, 4) for each in pair.tolist()] for pair in (distilled.mean, distilled.std))
    console.print(f"{len(distilled.images)} images, normalised by mean {mean} and deviation {std} -> {command.folder}")


def _given(*values: Any) -> Any:
    """The first that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _label(name: str, net: nn.Module) -> str:
    if name != "convnet":
        return name
    convolutions = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
    return f"convnet-D{len(convolutions)}-W{convolutions[0].out_channels}"


def _check_fits(file: Path, distilled: DistilledSet, dataset: Dataset) -> None:
    wanted, got = list(dataset.train_images.shape[1:]), list(distilled.images.shape[1:])
    if wanted != got or not len(distilled.images):
        got = f"{len(distilled.images)} of {got}"
        raise ValueError(f"{file}: expected images {wanted} as {dataset.name} has, got {got}")
    hard, K = distilled.label_kind == "hard", dataset.num_classes
    classes = int(distilled.labels.max()) + 1 if hard else distilled.labels.shape[1]
    if classes > K or (classes < K and not hard):
        raise ValueError(f"{file}: expected labels of the {K} classes of {dataset.name}, got {classes}")


def _convnet(dataset: Dataset, width: int, depth: int) -> ConvNet:
    return ConvNet(dataset.channels, dataset.num_classes, width, depth, dataset.image_size)


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}"))
    return rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)


def _accuracy_table(title: str, rows: str, students: int) -> rich.table.Table:
    table = rich.table.Table(title=title)
    table.add_column(rows)
    for heading in ("images", "epochs", "learning rate", f"test accuracy of {students} students"):
        table.add_column(heading, justify="right")
    return table


def _add_row(
    table: rich.table.Table, label: str, images: int, epochs: int, lr: float, accuracies: Sequence[float]
) -> None:
    accuracy = f"{100 * mean(accuracies):.1f} ± {100 * pstdev(accuracies):.1f} %"
    table.add_row(label, str(images), str(epochs), f"{lr:.4f}", accuracy)


def _picture(distilled: DistilledSet, ipc: int) -> bytes:
    """A PNG of the distilled images, enlarged to about 64 pixels, a column for each class."""
    images = distilled.pixels()
    scale, gap = max(1, 64 // images.shape[2]), 2
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=1.0)  # [K * ipc, 3, h, w]
    count, channels, height, width = images.shape
    grid = images.view(count // ipc, ipc, channels, height, width).permute(1, 3, 0, 4, 2)
    pixels = (grid.reshape(ipc * height, count // ipc * width, channels) * 255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


if __name__ == "__main__":
    main()
