"""``pydistill distill``: a data set, a method, and all that lies between them and a table of accuracies."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import rich.console
import rich.progress
import rich.table
import torch
import tyro
from torch import nn

from pydistill import __version__
from pydistill.augment import DiffAugment
from pydistill.cli.console import (
    Interrupted,
    Stop,
    accuracy_table,
    add_row,
    append_line,
    as_json,
    device_of,
    keep_lines,
    picture,
    progress_bars,
)
from pydistill.cli.experts import completed, train_with_progress
from pydistill.cli.folder import Folder, options_in
from pydistill.cli.settings import SETTINGS, DatasetName, convnet, dataset_of, load_for, value_of
from pydistill.data import DistilledSet, write_atomic
from pydistill.evaluate import evaluate
from pydistill.methods import METHODS, Config, State, distill
from pydistill.methods.options import check_numbers
from pydistill.methods.outer import world
from pydistill.seeding import Stream, seeded_generator, seeded_net
from pydistill.trajectory.experts import data_crc32
from pydistill.trajectory.store import ExpertStore

# fmt: off
MethodName = Literal[
    "mtt", "tesla", "ftd", "ast", "datm", "fyi", "rat_bptt",
    "dc", "dsa", "dm", "datadam", "atom", "fyi_dm", "fyi_dsa", "fedlgd",
]
# fmt: on

_HOW = ("root", "experts", "device", "checkpoint_every")  # how a run was done, not what it made
_OF_EXPERTS = ("num_experts", "train_epochs", "lr_expert")  # what --experts takes the place of


@dataclass(frozen=True)
class Distill:
    """Distil a data set: train experts where the method matches them, distil, and test fresh students on the result.

    Options that are not given take the presets of the method, the data set and --ipc: --help after a method, --dataset
    and --ipc shows them. The folder --out receives the experts, a checkpoint, metrics.jsonl, images.png and
    distilled.safetensors; a run that was cut off goes on with --resume. Under torchrun the ranks share --segments.
    `pydistill distill unip` distils a teacher's attention into a student network instead, with options of its own.
    """

    method: tyro.conf.Positional[MethodName]
    """The distillation method, the first of the arguments; mtt without one."""
    config: tyro.conf.OmitArgPrefixes[Config]
    """The method's hyper-parameters."""

    dataset: DatasetName
    """What to distil; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files; fashion-mnist looks in /usr/share/datasets/fashion-mnist by itself."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    out: Path | None = None
    """Folder for the results, new or empty; a new one under runs/ by default."""
    resume: bool = False
    """Go on with the run in --out; its options are kept."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    width: int = 128
    """Channels of the ConvNet; the papers take 128."""
    depth: int = 3
    """Blocks of the ConvNet: 3 for images of 28 or 32 pixels, 4 for 64."""

    experts: Path | None = None
    """A file of pydistill experts, instead of experts that this run trains."""
    num_experts: int = 100
    """Experts to train."""
    train_epochs: int = 50
    """Epochs of each expert."""
    lr_expert: float = 0.01
    """Learning rate of the experts."""
    batch_train: int = 256
    """Real images per SGD step, of experts and of students."""

    students: int = 5
    """Fresh students for each accuracy."""
    student_epochs: int = 1000
    """Passes of a student over a distilled or random set."""
    whole_epochs: int = 50
    """Passes of a student over the whole training set; 0 leaves that row out."""
    lr_student: float = 0.01
    """Learning rate of students on real images; on distilled ones they take the learnt rate."""
    checkpoint_every: int = 25
    """Iterations between checkpoints."""

    @property
    def zca(self) -> bool:
        return self.config.zca

    @classmethod
    def default_for(cls, argv: list[str]) -> Distill:
        """The presets for the method, the data set and the ipc in ``argv``; with --resume the options of that run."""
        method = argv[0] if argv and not argv[0].startswith("-") else "mtt"
        if "--resume" in argv:
            return cls._of_run(value_of(argv, "--out"))
        if method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(METHODS)}, got {method!r}; pydistill --help has all commands"
            )
        dataset, ipc = dataset_of(argv), value_of(argv, "--ipc") or "1"
        if not ipc.lstrip("-").isdecimal():
            raise ValueError(f"--ipc: expected a whole number, got {ipc!r}")
        config, setting = METHODS[method].nearest_preset(dataset, int(ipc)), SETTINGS[dataset]
        if config.needs_experts:
            setting = replace(setting, train_epochs=max(config.epochs_needed()[0], setting.train_epochs))
        return cls(method, config, dataset, **asdict(setting))

    @classmethod
    def _of_run(cls, out: str | None) -> Distill:
        if out is None:
            raise ValueError("--resume: expected --out with the folder of the run to go on with")
        path, wanted = Path(out) / "config.json", "the options of a run of pydistill distill"
        options = options_in(Path(out), "distill")
        try:
            config = METHODS[options["method"]](**options["config"])
            paths = {name: Path(options[name]) if options[name] else None for name in ("root", "experts")}
            saved = cls(**options | paths | {"config": config}, out=Path(out))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected {wanted}; it holds other fields ({error})") from error
        if saved.stored().keys() != options.keys():
            raise ValueError(f"{path}: expected {wanted}; it holds other fields")
        return saved

    def stored(self) -> dict[str, Any]:
        """The options as JSON has them, without those that say where the run lies."""
        options = {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}
        paths = {"root": self.root, "experts": self.experts}
        return options | {name: str(path.absolute()) if path else None for name, path in paths.items()}

    def check(self, default: Distill) -> None:
        """ValueError for options that contradict each other, or the run that is resumed."""
        counts = ("students", "checkpoint_every", "student_epochs", "num_experts", "train_epochs", "batch_train")
        check_numbers(self, flags=True, **dict.fromkeys(counts, 1), whole_epochs=0, lr_student=0.0, lr_expert=0.0)
        changed = {n: (v, w) for (n, v), w in zip(_flat(self).items(), _flat(default).values(), strict=True) if v != w}
        if self.resume:
            for name, (given, kept) in changed.items():
                if name not in ("iterations", "root", "device", "checkpoint_every"):
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag}: expected {kept} as the run in {self.out} has, got {given}")
        elif self.experts:
            for name in _OF_EXPERTS:
                if name in changed:
                    flag, given = "--" + name.replace("_", "-"), changed[name][0]
                    raise ValueError(f"{flag}: expected none with --experts, whose file says it, got {given}")
        elif self.config.needs_experts:
            needed, why = self.config.epochs_needed()
            if self.train_epochs < needed:
                raise ValueError(f"--train-epochs: expected at least {needed} ({why}), got {self.train_epochs}")


def _flat(options: Distill) -> dict[str, Any]:
    stored = options.stored()
    return stored.pop("config") | stored


@contextlib.contextmanager
def ranks(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpus = device_of(device).type == "cuda"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def run(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill``."""
    default = Distill.default_for(argv)
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Distill, args=argv, prog="pydistill distill", default=default, config=config)
    Run(options, console, stop).go(default)


class Run:
    """One ``pydistill distill``: its folder, and the phases that fill it. Each phase goes on where its files end."""

    def __init__(self, options: Distill, console: rich.console.Console, stop: Stop):
        self.options, self.config, self.console, self.stop = options, options.config, console, stop

    def go(self, default: Distill) -> None:
        began, options = time.monotonic(), self.options
        options.check(default)
        self.progress = progress_bars(self.console)
        kept = options.resume
        with ranks(options.device):
            self.first = world()[0] == 0
            name = f"{options.method}-{options.dataset}-ipc{self.config.ipc}"
            run = Folder(options.out, name, "distill", resume=options.resume, first=self.first)
            self.folder = run.path
            self.experts_file = options.experts or self.folder / "experts.store"
            self.state_file, self.results_file = self.folder / "state.safetensors", self.folder / "results.json"
            self.metrics = self.folder / "metrics.jsonl"
            try:
                self.dataset = load_for(options)
                self.net = seeded_net(self.make_net, self.config.seed, device=self.device)
                self.dataset.sample(self.config.ipc)  # refuses more than there are
                self.config.check_start(self.dataset, self.net)
                experts = self._ready_experts() if options.experts else None
                self.stop()
                with run.held():
                    state = self._state()
                    results = self._results()
                    # Whatever can be refused has been: from here on the folder holds a run that can go on.
                    run.begin(options.stored())
                    kept = True
                    if self.first:
                        self._forget_metrics(state.iteration if state is not None else 0, results)
                        self.console.print(f"{self.dataset.name} -> {self.folder}")
                    with self.progress:
                        if experts is None and self.config.needs_experts:
                            experts = self._train_experts()
                        distilled = self._distill(experts, state)
                        if self.first:
                            self._test(distilled, results)
            except Interrupted:
                again = f"go on with: pydistill distill --out {shlex.quote(str(self.folder))} --resume"
                self.console.print(f"stopped; {again if kept else 'nothing was begun, the same command starts anew'}")
                raise
        if self.first:
            self.console.print(self._table(results))
            seconds = time.monotonic() - began
            self.console.print(f"{seconds:.0f} s; images.png and distilled.safetensors are in {self.folder}")

    def _state(self) -> State | None:
        """What the last checkpoint holds."""
        if not self.state_file.exists():
            return None
        state = State.load(self.state_file, self.config, self.device)
        if state.iteration > self.config.iterations:
            raise ValueError(
                f"--iterations: expected at least {state.iteration}, already done, got {self.config.iterations}"
            )
        return state

    @property
    def device(self) -> torch.device:
        return self.dataset.train_images.device

    def make_net(self) -> nn.Module:
        return convnet(self.dataset, self.options.width, self.options.depth)

    def _results(self) -> dict[str, Any]:
        """What of the students' accuracies an earlier process left; those of another number of iterations are void."""
        try:
            results = json.loads(self.results_file.read_text()) if self.results_file.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self.results_file}: expected accuracies as JSON; it is truncated or foreign") from error
        if results.get("iterations") != self.config.iterations:
            results.pop("distilled", None)
        return results

    def _log(self, record: dict[str, Any]) -> None:
        if self.first:
            append_line(self.metrics, record)

    def _forget_metrics(self, iteration: int, results: dict[str, Any]) -> None:
        """Drops the lines written after the last checkpoint, whose steps are taken, and logged, again."""
        epochs = dict(enumerate(completed(self.experts_file)))

        def keep(record: dict[str, Any]) -> bool:
            if record["phase"] == "experts":
                return record["epoch"] <= epochs.get(record["expert"], 0)
            return record["iteration"] <= iteration if record["phase"] == "distill" else record["set"] in results

        keep_lines(self.metrics, keep)

    def _ready_experts(self) -> ExpertStore:
        """Those of --experts, once they are known to be of this data set and network."""
        store = ExpertStore(self.experts_file)
        found = data_crc32(self.dataset.train_images, self.dataset.train_labels)
        if store.dataset not in (None, self.dataset.name) or store.data_crc32 not in (None, found):
            raise ValueError(
                f"{store.path}: expected experts of {self.dataset.name} with crc32 {found} of its images and labels, "
                f"got {store.dataset} with {store.data_crc32}"
            )
        self.config.check(self.dataset, self.net, store)
        return store

    def _train_experts(self) -> ExpertStore:
        options = self.options
        if self.first:
            experts = train_with_progress(
                *(self.make_net, self.dataset, self.experts_file, self.progress, self.stop),
                lambda record: self._log({"phase": "experts", **record}),
                num_experts=options.num_experts,
                epochs=options.train_epochs,
                lr=options.lr_expert,
                batch_size=options.batch_train,
                seed=self.config.seed,
                augment=DiffAugment(self.config.augment) if self.config.augment else None,
                **self.config.expert_options(options.train_epochs),
            )
            self.console.print(f"{len(experts)} experts trained for {options.train_epochs} epochs")
        if world()[1] > 1:
            torch.distributed.barrier()
        return ExpertStore(self.experts_file)

    def _distill(self, experts: ExpertStore | None, state: State | None) -> DistilledSet:
        total = self.config.iterations
        done = state.iteration if state is not None else 0
        task = self.progress.add_task("distil", total=total, completed=done, note="")

        told = False

        def on_step(state: State, record: dict[str, float]) -> None:
            nonlocal told
            self._log({"phase": "distill", **record})
            if "lr_below" in record and self.first and not told:
                told = True
                self.console.print(
                    f"iteration {record['iteration']}: the learnt rate would go from there to {record['lr_below']:.3g} "
                    f"and is kept at {record['lr']:.3g}, now and whenever it happens again: a smaller --lr-lr may help"
                )
            note = f"loss {record['loss']:.3f}, lr {record['lr']:.4f}"
            self.progress.update(task, completed=state.iteration, note=note)
            due = state.iteration == total or state.iteration % self.options.checkpoint_every == 0
            if self.first and (due or self.stop.requested):
                state.save(self.state_file, self.config)
            self.stop()

        distilled = distill(self.config, self.dataset, self.net, experts, state=state, on_step=on_step)
        if self.first:
            silent = _HOW + (_OF_EXPERTS if self.options.experts or not self.config.needs_experts else ())
            options = {k: v for k, v in _flat(self.options).items() if k not in silent}
            distilled.config |= {**options, "pydistill": __version__}
            distilled.save(self.folder / "distilled.safetensors")
            self.console.print(f"distilled in {total} iterations, learning rate {distilled.lr:.4f}")
            write_atomic(self.folder / "images.png", picture(distilled, self.config.ipc))
        return distilled

    def _test(self, distilled: DistilledSet, results: dict[str, Any]) -> None:
        """Fills ``results`` with the students' accuracies on each set; what is there already stays."""
        options, dataset, seed = self.options, self.dataset, self.config.seed
        synthetic = distilled.images.to(self.device), distilled.labels.to(self.device)
        whole = dataset.train_images, dataset.train_labels
        # every student on random real images gets a draw of its own
        draws = [
            dataset.sample(self.config.ipc, seeded_generator(seed, Stream.TEST_REAL_IMAGES, student))
            for student in range(options.students)
        ]
        random = tuple(torch.stack(each) for each in zip(*draws, strict=True))
        sets = {
            "random": (random, options.lr_student, options.student_epochs, 256),
            "distilled": (synthetic, distilled.lr, options.student_epochs, 256),
            "whole": (whole, options.lr_student, options.whole_epochs, options.batch_train),
        }
        for name, (training_set, lr, epochs, batch_size) in sets.items():
            if name in results or epochs == 0:
                continue
            images = training_set[0].shape[-4]
            steps = epochs * -(-images // batch_size) + -(-len(dataset.test_images) // 500)
            task = self.progress.add_task(f"students on {name}", total=options.students * steps, note="")

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
                label_kind=distilled.label_kind if name == "distilled" else "hard",
                augment=self.config.augmentation(),
                students=range(options.students),
                seed=seed,
                on_step=on_step,
            )
            self.progress.update(task, note=f"accuracy {mean(accuracies):.1%}")
            results[name] = {"accuracies": accuracies, "lr": lr, "epochs": epochs, "images": images}
            results["iterations"] = self.config.iterations
            # the line first: what is killed between the two drops it again, and never lacks it
            self._log({"phase": "evaluate", "set": name, **results[name]})
            write_atomic(self.results_file, as_json(results))

    def _table(self, results: dict[str, Any]) -> rich.table.Table:
        options = self.options
        title = f"{options.dataset}, ipc {self.config.ipc}, ConvNet-D{options.depth}-W{options.width}"
        table = accuracy_table(title, "training set", options.students)
        labels = {"random": "random real", "distilled": f"distilled ({options.method})", "whole": "whole set"}
        for name, label in labels.items():
            if row := results.get(name):
                add_row(table, label, row["images"], row["epochs"], row["lr"], row["accuracies"])
        return table
