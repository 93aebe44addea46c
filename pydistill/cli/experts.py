"""``pydistill experts``: trains experts into one file, or makes it from replay buffers."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import rich.console
import tyro
from torch import nn

from pydistill.augment import DiffAugment
from pydistill.cli.console import Bars, Stop
from pydistill.methods import METHODS
from pydistill.methods.distilling import completed, train_experts_with_progress
from pydistill.methods.folder import append_line, keep_lines, locked
from pydistill.methods.method import DatasetInputs, DatasetName, device_of
from pydistill.methods.runs import Interrupted
from pydistill.methods.settings import SETTINGS, SHAPES
from pydistill.methods.trajectory.matching import Matching
from pydistill.nn import NetName, make
from pydistill.trajectory.replay_buffers import replay_buffer_shapes
from pydistill.trajectory.store import ExpertStore

_TRAINING = ("num_experts", "epochs", "lr", "momentum", "weight_decay", "schedule", "batch_size", "seed", "augment")


@dataclass(frozen=True)
class Experts:
    """Train experts into one file, for pydistill distill --experts, or make the file from replay buffers.

    Options at None take the data set's preset. If interrupted at any moment, the same command continues the file and
    ends with the same bytes as an uninterrupted run; the file of another training is refused.
    """

    out: Path
    """The file that receives the experts; the loss and accuracy of each epoch go into the same name with .jsonl."""
    overwrite: bool = False
    """Start afresh, whatever is at --out."""
    dataset: DatasetName | None = None
    """What to train on, digits by default, which come with scikit-learn; the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files, as for pydistill distill."""
    image_size: int | None = None
    """Size in pixels to which digits (16) and image folders (32) are resized; for imported experts, of their images, by
    default the data set's."""
    net: NetName = "convnet"
    """The experts' architecture."""
    norm: Literal["instance", "batch", "group", "layer", "none"] | None = None
    """Normalisation of the experts' network; by default the method repositories', which is instance in the ConvNet."""
    width: int | None = None
    """Channels of the ConvNet; 128 in the papers. Also of mlp and vit."""
    depth: int | None = None
    """Blocks of the ConvNet: 3 for images of 28 or 32 pixels, 4 for 64. Also of vit."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the stored parameters; experts train in fp32."""
    replay_buffers: Annotated[tuple[Path, ...] | None, tyro.conf.arg(name="import")] = None
    """replay_buffer_*.pt of other code, to convert instead of training; --net and --norm say of which network, and no
    data set is read."""

    num_experts: int | None = None
    """Number of experts to train."""
    epochs: int | None = None
    """Epochs of each expert."""
    lr: float | None = None
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of SGD; an epoch continues the velocity of the one before."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    schedule: Literal["step", "cosine"] | None = None
    """Factor on the learning rate by epoch: a tenth in the second half, or half a cosine; none by default."""
    batch_size: int | None = None
    """Images per SGD step."""
    seed: int = 0
    """Seed of the initial parameters and the order of the images."""
    augment: str = ""
    """Differentiable siamese augmentation of the real images: color, crop, cutout, flip, scale, rotate, joined by _."""
    zca: bool = False
    """Train on ZCA-whitened images; with --import: the experts saw such images."""
    no_zca: bool = False
    """With --import: the experts saw images that were not whitened. Without either, matching them warns."""
    method: Literal["mtt", "ftd", "ast"] = "mtt"
    """Whose experts: mtt trains by plain SGD, ftd by GSAM, ast with momentum, a gradient penalty and loss factors."""
    device: str = "auto"
    """Where to compute, by torch's name; auto is cuda if available."""

    def resolved(self) -> Experts:
        """The same options with those at None taken from the preset."""
        dataset = self.dataset or "digits"
        setting = SETTINGS[dataset]
        options: dict[str, Any] = {"dataset": dataset, "num_experts": setting.num_experts}
        options |= {"width": setting.width, "depth": setting.depth} if self.net == "convnet" else {}
        options |= {"epochs": setting.train_epochs, "lr": setting.lr_expert, "batch_size": setting.batch_train}
        return dataclasses.replace(self, **{k: v for k, v in options.items() if getattr(self, k) is None})

    def training(self) -> dict[str, Any]:
        """The arguments of `train_experts`: the method's options, and those given in addition."""
        method = cast(type[Matching], METHODS[self.method])
        assert self.epochs is not None  # it is resolved
        options = method().expert_options(self.epochs)
        for name in (*_TRAINING, "dtype", "overwrite"):
            if name not in options or getattr(self, name) != getattr(Experts, name):
                options[name] = getattr(self, name)
        return options | {"augment": DiffAugment(self.augment) if self.augment else None}

    def run(self, console: rich.console.Console, stop: Stop) -> None:
        if not self.out.parent.is_dir() or self.out.is_dir():
            raise ValueError(f"--out: expected a file in a folder that is there, got {self.out}")
        if self.replay_buffers == ():
            raise ValueError("--import: expected a replay buffer at least, got none")
        if self.no_zca and not self.replay_buffers:
            raise ValueError("--no-zca: expected with --import only; nothing is whitened without --zca")
        lock = self.out.with_name(f".{self.out.name}.lock")
        with locked(lock, f"expected a file that no other process writes to, got {self.out}"):
            if self.replay_buffers:
                self._import(console)
            else:
                self.resolved()._train(console, stop)

    def _train(self, console: rich.console.Console, stop: Stop) -> None:
        assert self.dataset is not None  # it is resolved
        device = device_of(self.device)
        inputs = DatasetInputs(self.dataset, self.root, self.image_size)
        dataset = inputs.load(device, zca=self.zca, streams=True)
        shape = dataset.channels, dataset.num_classes, dataset.image_size
        make_net = partial(make, self.net, *shape, width=self.width, depth=self.depth, norm=self.norm)
        began, metrics = time.monotonic(), self.out.with_name(f"{self.out.name}.jsonl")
        epochs = {} if self.overwrite else dict(enumerate(completed(self.out)))
        begun = False

        def log(record: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:  # not before all checks have passed
                keep_lines(metrics, lambda record: record["epoch"] <= epochs.get(record["expert"], 0))
                begun = True
            append_line(metrics, record)

        try:
            with Bars(console) as bars:
                store = train_experts_with_progress(
                    make_net, dataset, self.out, progress=bars.bar, stop=stop, log=log, **self.training()
                )
        except Interrupted:
            console.print("stopped; the same command, without --overwrite, goes on")
            raise
        seconds = time.monotonic() - began
        console.print(f"{len(store)} experts trained for {store.epochs} epochs in {seconds:.0f} s: {self.out}")

    def _import(self, console: rich.console.Console) -> None:
        assert self.replay_buffers  # or there is nothing to import
        defaults = {f.name: f.default for f in dataclasses.fields(Experts)}
        if changed := [n for n in (*_TRAINING, "method", "root", "device") if getattr(self, n) != defaults[n]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"{flags}: expected none with --import, which trains nothing")
        if self.zca and self.no_zca:
            raise ValueError("--zca, --no-zca: expected one of them at most")
        store = ExpertStore.import_replay_buffers(
            self.replay_buffers,
            self._imported(replay_buffer_shapes(self.replay_buffers[0])),
            self.out,
            dtype=self.dtype,
            dataset=self.dataset,
            overwrite=self.overwrite,
            zca=(self.zca or None) if not self.no_zca else False,
        )
        console.print(f"{len(store)} experts of {store.epochs} epochs imported: {self.out}")

    def _imported(self, shapes: list[tuple[int, ...]]) -> nn.Module:
        """The network whose parameters have these shapes, as far as they and the options determine it."""
        channels, classes, side = SHAPES[self.dataset or "cifar10"]
        if len(shapes[0]) == 4:
            channels = shapes[0][1]
        if len(shapes[-1]) == 1:
            classes = shapes[-1][0]
        sizes, sides = {"width": self.width, "depth": self.depth}, [side]
        if self.net == "convnet" and len(shapes) > 1 and len(shapes[0]) == 4 and len(shapes[-2]) == 2:
            found = {"width": shapes[0][0], "depth": sum(len(shape) == 4 for shape in shapes)}
            sizes = {name: found[name] if given is None else given for name, given in sizes.items()}
            # any image size that gives the classifier this many features has the same parameters
            left = math.isqrt(shapes[-2][1] // max(found["width"], 1))
            sides.insert(0, (left << found["depth"]) - (4 if channels == 1 else 0))
        if self.image_size is not None:
            sides = [self.image_size]
        nets = []
        for side in sides:
            nets.append(make(self.net, channels, classes, max(side, 1), norm=self.norm, **sizes))
            if [tuple(p.shape) for p in nets[-1].parameters()] == shapes:
                return nets[-1]
        return nets[0]  # the import says what differs from it
