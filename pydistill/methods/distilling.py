"""The run of methods that distil images for training students: experts, distillation, students."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pydistill import __version__
from pydistill.augment import DiffAugment
from pydistill.data import Dataset, write_atomic
from pydistill.evaluate import evaluate
from pydistill.methods.folder import as_json
from pydistill.methods.method import DatasetInputs, Job, OptionError, check_numbers
from pydistill.methods.outer import State, distill
from pydistill.methods.picture import write_picture
from pydistill.methods.ranks import wait_for_ranks
from pydistill.methods.settings import convnet, setting_of
from pydistill.seeding import Stream, seeded_generator, seeded_net
from pydistill.trajectory.experts import data_crc32, train_experts
from pydistill.trajectory.store import ExpertStore
from pydistill.trajectory.train import EVAL_BATCH

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.config import Config
    from pydistill.methods.runs import Run
    from pydistill.methods.trajectory.matching import Matching

__all__ = ["OF_EXPERTS", "DistillInputs", "DistillJob", "completed", "train_experts_with_progress"]

_HOW = ("root", "experts", "device", "checkpoint_every")  # how a run was done, not what it made
OF_EXPERTS = ("num_experts", "train_epochs", "lr_expert")  # what a file of experts replaces


@dataclass(frozen=True)
class DistillInputs(DatasetInputs):
    """The data set, the networks, the experts and the students."""

    width: int = 128
    """Channels of the ConvNet; 128 in the papers."""
    depth: int = 3
    """Blocks of the ConvNet: 3 for images of 28 or 32 pixels, 4 for 64."""

    experts: Path | None = None
    """A file of pydistill experts to match, instead of training them in this run."""
    num_experts: int = 100
    """Number of experts to train, for methods that match trajectories."""
    train_epochs: int = 50
    """Epochs of each expert, for methods that match trajectories."""
    lr_expert: float = 0.01
    """Learning rate of the experts, for methods that match trajectories."""
    batch_train: int = 256
    """Real images per SGD step, of experts and of students."""

    students: int = 5
    """Fresh students for each accuracy."""
    student_epochs: int = 1000
    """Passes of a student over a distilled or random set."""
    whole_epochs: int = 50
    """Passes of a student over the whole training set; 0 omits that row."""
    lr_student: float = 0.01
    """Learning rate of students on real images; on distilled ones they take the learnt rate."""
    checkpoint_every: int = 25
    """Iterations between checkpoints."""

    @classmethod
    def for_method(cls, method: Any, **given: Any) -> Self:
        setting = setting_of(given.get("dataset", "digits"))
        if method.needs_experts:
            setting = replace(setting, train_epochs=max(method.epochs_needed()[0], setting.train_epochs))
        return super().for_method(method, **asdict(setting) | given)

    def stored(self) -> dict[str, Any]:
        paths = {name: getattr(self, name) for name in ("root", "experts")}
        return asdict(self) | {name: str(Path(p).absolute()) if p else None for name, p in paths.items()}


class DistillJob(Job):
    """Trains experts if the method needs them, distils, and tests students on the result and on real images."""

    made = ("images.png", "distilled.safetensors")

    def __init__(self, config: Config, inputs: DistillInputs, device: torch.device):
        counts = (
            "students",
            "checkpoint_every",
            "student_epochs",
            "num_experts",
            "train_epochs",
            "batch_train",
            "width",
            "depth",
        )
        least = {**dict.fromkeys(counts, 1), "whole_epochs": 0, "lr_student": 0.0, "lr_expert": 0.0}
        check_numbers(inputs, OptionError, **least)
        if inputs.experts is None and config.needs_experts:
            needed, why = cast("Matching", config).epochs_needed()
            if inputs.train_epochs < needed:
                reason = f"expected at least {needed} ({why}), got {inputs.train_epochs}"
                raise OptionError("train_epochs", reason)
        self.config, self.inputs, self.device = config, inputs, device
        self.results: dict[str, Any] = {}
        self.data = self.dataset = inputs.load(device, zca=config.zca, streams=config.streams)
        self.title = self.dataset.name
        self.net = seeded_net(self.make_net, config.seed, device=device)
        self.dataset.sample(config.ipc)  # refuses more than there are
        config.check_precision(self.dataset, self.net)
        config.check_start(self.dataset, self.net)
        self.experts = None if inputs.experts is None else self._ready_experts(Path(inputs.experts))
        self.state: State | None = None

    def stored(self) -> dict[str, Any]:
        return {"method": self.config.name, "config": asdict(self.config), **self.inputs.stored()}

    def make_net(self) -> nn.Module:
        return convnet(self.dataset, self.inputs.width, self.inputs.depth)

    def opened(self, run: Run) -> None:
        self.experts_file = run.folder / "experts.store" if self.inputs.experts is None else Path(self.inputs.experts)
        self.state_file, self.results_file = run.folder / "state.safetensors", run.folder / "results.json"
        self._trained = dict(enumerate(completed(self.experts_file)))
        if self.state_file.exists():
            self.state = State.load(self.state_file, self.config, self.device)
            if (done := self.state.iteration) > self.config.iterations:
                raise OptionError("iterations", f"expected at least {done}, already done, got {self.config.iterations}")
        try:
            self.results = json.loads(self.results_file.read_text()) if self.results_file.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self.results_file}: expected accuracies as JSON; it is truncated or foreign") from error
        if self.results.get("iterations") != self.config.iterations:  # accuracies on another result do not count
            self.results.pop("distilled", None)

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        if record["phase"] == "experts":
            return record["epoch"] <= self._trained.get(record["expert"], 0)
        done = 0 if self.state is None else self.state.iteration
        return record["iteration"] <= done if record["phase"] == "distill" else record["set"] in self.results

    def phases(self) -> Sequence[Callable[[Run], None]]:
        trains = self.experts is None and self.config.needs_experts
        return (*((self.train_experts,) if trains else ()), self.distil, self.test)

    def _ready_experts(self, path: Path) -> ExpertStore:
        """The experts in a file, once they are known to be of this data set and network."""
        store = ExpertStore(path)
        found = data_crc32(self.dataset.train_images, self.dataset.train_labels)
        if store.dataset not in (None, self.dataset.name) or store.data_crc32 not in (None, found):
            raise ValueError(
                f"{store.path}: expected experts of {self.dataset.name} with crc32 {found} of its images and labels, "
                f"got {store.dataset} with {store.data_crc32}"
            )
        self.config.check(self.dataset, self.net, store)
        return store

    def train_experts(self, run: Run) -> None:
        inputs, config = self.inputs, self.config
        if run.first:
            experts = train_experts_with_progress(
                self.make_net,
                self.dataset,
                self.experts_file,
                progress=run.progress,
                stop=run.stop,
                log=lambda record: run.log({"phase": "experts", **record}),
                num_experts=inputs.num_experts,
                epochs=inputs.train_epochs,
                lr=inputs.lr_expert,
                batch_size=inputs.batch_train,
                seed=config.seed,
                augment=DiffAugment(config.augment) if config.augment else None,
                **config.expert_options(inputs.train_epochs),
            )
            run.tell(f"{len(experts)} experts trained for {inputs.train_epochs} epochs")
        wait_for_ranks()
        self.experts = ExpertStore(self.experts_file)

    def distil(self, run: Run) -> None:
        config, total = self.config, self.config.iterations
        advance = run.progress("distil", total, 0 if self.state is None else self.state.iteration)
        told = False

        def on_step(state: State, record: dict[str, float]) -> None:
            nonlocal told
            if run.first:
                run.log({"phase": "distill", **record})
            if "lr_below" in record and not told:
                told = True
                run.tell(
                    f"iteration {record['iteration']}: the learnt rate would go from there to {record['lr_below']:.3g} "
                    f"and is kept at {record['lr']:.3g}, now and whenever it happens again: a smaller --lr-lr may help"
                )
            advance(note=f"loss {record['loss']:.3f}, lr {record['lr']:.4f}")
            due = state.iteration == total or state.iteration % self.inputs.checkpoint_every == 0
            if run.first and (due or run.stopping):
                state.save(self.state_file, config)
            run.stop()

        self.distilled = distill(config, self.dataset, self.net, self.experts, state=self.state, on_step=on_step)
        if run.first:
            self._keep(run)

    def _keep(self, run: Run) -> None:
        distilled, config = self.distilled, self.config
        silent = _HOW + (OF_EXPERTS if self.inputs.experts or not config.needs_experts else ())
        options = {**asdict(config), "method": config.name, **self.inputs.stored()}
        distilled.config |= {k: v for k, v in options.items() if k not in silent} | {"pydistill": __version__}
        distilled.save(run.folder / "distilled.safetensors")
        run.tell(f"distilled in {config.iterations} iterations, learning rate {distilled.lr:.4f}")
        write_picture(run, distilled, config.ipc)

    def test(self, run: Run) -> None:
        """The students' accuracies on each set; existing ones stay."""
        if not run.first:
            return
        inputs, dataset, seed, distilled = self.inputs, self.dataset, self.config.seed, self.distilled
        # every student on random real images gets its own draw
        draws = [
            dataset.sample(self.config.ipc, seeded_generator(seed, Stream.TEST_REAL_IMAGES, student))
            for student in range(inputs.students)
        ]
        drawn, classes = (torch.stack(each) for each in zip(*draws, strict=True))
        synthetic = distilled.images.to(self.device), distilled.labels.to(self.device)
        whole = dataset.train_images, dataset.train_labels
        sets = {
            "random": ((drawn, classes), inputs.lr_student, inputs.student_epochs, 256),
            "distilled": (synthetic, distilled.lr, inputs.student_epochs, 256),
            "whole": (whole, inputs.lr_student, inputs.whole_epochs, inputs.batch_train),
        }
        for name, (training_set, lr, epochs, batch_size) in sets.items():
            if name in self.results or epochs == 0:
                continue
            images = training_set[0].shape[-4]
            steps = epochs * -(-images // batch_size) + -(-len(dataset.test_images) // EVAL_BATCH)
            advance = run.progress(f"students on {name}", inputs.students * steps)

            def on_step(advance: Callable[[], None] = advance) -> None:
                advance()
                run.stop()

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
                students=range(inputs.students),
                seed=seed,
                on_step=on_step,
            )
            advance(0, f"accuracy {mean(accuracies):.1%}")
            self.results[name] = {"accuracies": accuracies, "lr": lr, "epochs": epochs, "images": images}
            self.results["iterations"] = self.config.iterations
            # the log line first: a run killed between the two drops it on resuming, and never lacks it
            run.log({"phase": "evaluate", "set": name, **self.results[name]})
            write_atomic(self.results_file, as_json(self.results))


def train_experts_with_progress(
    make_net: Callable[[], nn.Module],
    dataset: Dataset,
    path: Path,
    *,
    progress: Callable[[str, int, int], Callable[..., None]],
    stop: Callable[[], None],
    log: Callable[[dict[str, Any]], None],
    num_experts: int,
    epochs: int,
    batch_size: int,
    overwrite: bool = False,
    **options: Any,
) -> ExpertStore:
    """`train_experts` with ``progress`` as of `Run.progress`, ``stop`` after each step, ``log`` after each epoch."""
    steps = -(-len(dataset.train_images) // batch_size)
    done = 0 if overwrite else sum(completed(path)) * steps
    advance = progress("experts", num_experts * epochs * steps, done)

    def on_step() -> None:
        advance()
        stop()

    def on_epoch(record: dict[str, Any]) -> None:
        log(record)
        advance(0, f"accuracy {record['accuracy']:.1%}")

    return train_experts(
        make_net,
        dataset.train_images,
        dataset.train_labels,
        path,
        num_experts=num_experts,
        epochs=epochs,
        batch_size=batch_size,
        overwrite=overwrite,
        dataset=dataset.name,
        on_step=on_step,
        on_epoch=on_epoch,
        **options,
    )


def completed(path: Path) -> list[int]:
    """Complete epochs of each expert in a file; no experts if there is no file."""
    if not path.exists():
        return []
    with ExpertStore(path) as store:
        return store.completed
