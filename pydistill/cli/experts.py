"""``pydistill experts``: trains experts into one file, or makes it of replay buffers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.console
import rich.progress
import tyro

from pydistill.augment import DiffAugment
from pydistill.cli.console import Interrupted, Stop, append_line, keep_lines, progress_bars
from pydistill.cli.folder import locked
from pydistill.cli.settings import SETTINGS, DatasetName, convnet, load_for
from pydistill.data import Dataset
from pydistill.methods import METHODS
from pydistill.nn import ConvNet
from pydistill.trajectory.experts import train_experts
from pydistill.trajectory.store import ExpertStore

_TRAINING = ("num_experts", "epochs", "lr", "momentum", "weight_decay", "schedule", "batch_size", "seed", "augment")


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
    augment: str = ""
    """Differentiable siamese augmentation of the real images: color, crop, cutout, flip, scale, rotate, joined by _."""
    zca: bool = False
    """Train on ZCA-whitened images."""
    method: Literal["mtt", "ftd", "ast"] = "mtt"
    """Whose experts: mtt trains by plain SGD, ftd by GSAM, ast with momentum, a gradient penalty and loss factors."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    def resolved(self) -> Experts:
        """The same options with those at None taken from the preset."""
        setting = SETTINGS[self.dataset]
        options = {"width": setting.width, "depth": setting.depth, "num_experts": setting.num_experts}
        options |= {"epochs": setting.train_epochs, "lr": setting.lr_expert, "batch_size": setting.batch_train}
        return dataclasses.replace(self, **{k: v for k, v in options.items() if getattr(self, k) is None})

    def training(self) -> dict[str, Any]:
        """What `train_experts` is told: the method's options, and those that were given beside them."""
        options = METHODS[self.method]().expert_options(self.epochs)
        for name in (*_TRAINING, "dtype", "overwrite"):
            if name not in options or getattr(self, name) != getattr(Experts, name):
                options[name] = getattr(self, name)
        return options | {"augment": DiffAugment(self.augment) if self.augment else None}

    def run(self, console: rich.console.Console, stop: Stop) -> None:
        config = self.resolved()
        if not config.out.parent.is_dir() or config.out.is_dir():
            raise ValueError(f"--out: expected a file in a folder that is there, got {config.out}")
        dataset = load_for(config)

        def make_net() -> ConvNet:
            return convnet(dataset, config.width, config.depth)

        lock = config.out.with_name(f".{config.out.name}.lock")
        with locked(lock, f"--out: expected a file that no other process writes to, got {config.out}"):
            if config.replay_buffers:
                self._import(config, dataset, make_net(), console)
            else:
                config._train(dataset, make_net, console, stop)

    def _import(self, config: Experts, dataset: Dataset, net: ConvNet, console: rich.console.Console) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(Experts)}
        if changed := [name for name in _TRAINING if getattr(self, name) != defaults[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"{flags}: expected none with --import, which trains nothing")
        options = {"dtype": config.dtype, "dataset": dataset.name, "overwrite": config.overwrite}
        store = ExpertStore.import_replay_buffers(config.replay_buffers, net, config.out, **options)
        console.print(f"{len(store)} experts of {store.epochs} epochs imported: {config.out}")

    def _train(
        self, dataset: Dataset, make_net: Callable[[], ConvNet], console: rich.console.Console, stop: Stop
    ) -> None:
        began, metrics = time.monotonic(), self.out.with_name(f"{self.out.name}.jsonl")
        epochs = {} if self.overwrite else dict(enumerate(completed(self.out)))
        begun = False

        def log(record: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:  # not before all that may be refused has been
                keep_lines(metrics, lambda record: record["epoch"] <= epochs.get(record["expert"], 0))
                begun = True
            append_line(metrics, record)

        try:
            with progress_bars(console) as progress:
                store = train_with_progress(*(make_net, dataset, self.out, progress, stop, log), **self.training())
        except Interrupted:
            console.print("stopped; the same command, without --overwrite, goes on")
            raise
        seconds = time.monotonic() - began
        console.print(f"{len(store)} experts trained for {store.epochs} epochs in {seconds:.0f} s: {self.out}")


def train_with_progress(
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
    done = 0 if overwrite else sum(completed(path)) * steps
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


def completed(path: Path) -> list[int]:
    """Whole epochs of the experts in a file; no experts when there is no file."""
    if not path.exists():
        return []
    with ExpertStore(path) as store:
        return store.completed
