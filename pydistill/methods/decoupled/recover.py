"""Recover: images made by descending a squeezed network's loss, with its BatchNorm statistics as the prior.

    loss(x) = CE(net(view(x)), y) + r_bn * sum_l m_l (||mean_l - running_mean_l|| + r_var ||var_l - running_var_l||)

with the statistics of a batch's activations before BatchNorm layer l, m_1 = ``first`` and the others 1, by Adam with
betas (0.5, 0.9) and a cosine. SRe2L, CDA, DWA and INFER are this with another view, network, start or variable: one
file each beside this one.

The images are made in independent batches: what a batch draws depends on the seed and its number alone. So batches
may be made in any order, in any process, and the memory in use is one batch's, however many classes there are. A
finished batch is a file in the folder ``parts``, one in progress has a checkpoint there, and `merge` joins them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import MultiCrop
from pydistill.data import Dataset, DistilledSet, read_safetensors, write_safetensors
from pydistill.methods import ranks
from pydistill.methods.decoupled.squeeze import SetName, Teacher, files_of, load_images
from pydistill.methods.method import Inputs, Job, Method, OptionError, check_numbers
from pydistill.methods.picture import write_picture
from pydistill.methods.precision import Precision, Rounding, agree, check_precision, rounded
from pydistill.methods.training import half_cosine, restore_scaler, restored, scaler_state
from pydistill.nn import BNStatMatcher, freeze
from pydistill.ops import multi_crop
from pydistill.ops.multi_crop import MAX_SIZE
from pydistill.seeding import Stream, seeded_generator
from pydistill.select import representatives

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

__all__ = ["Batch", "RandomImages", "Recover", "check", "iterations_done", "merge", "real_images", "recover"]

_PART, _STATE = "recovered batch", "recovery under way"


@dataclass(frozen=True, eq=False)
class Batch:
    """Images made together: ``place[i]`` is the number of image i within its class, ``labels[i]``."""

    number: int
    place: Tensor  # int64 [B]
    labels: Tensor  # int64 [B]
    teacher: int = 0  # the number of the network
    moves: bool = True  # False: the images stay as they start


@dataclass(frozen=True)
class RecoverInputs(Inputs):
    """The squeezed networks."""

    teacher: tuple[Path, ...]
    """The squeezed network's file; infer takes several."""
    root: Path | None = None
    """Folder of the data set's files, where the method starts from real images."""
    workers: int | None = None
    """Processes that decode pictures; by default one for each core, up to 8."""
    checkpoint_every: int = 100
    """Iterations between two checkpoints of a batch."""
    network: str | None = None
    """package.module:function that makes your own network, whose weights are in the files of --teacher."""


@dataclass(frozen=True)
class Recover(Method):
    """Hyper-parameters that the methods share; the defaults are SRe2L's for CIFAR."""

    group: ClassVar[str] = "decoupled"
    inputs: ClassVar[type[Inputs]] = RecoverInputs
    shared: ClassVar[bool] = True
    starts_real: ClassVar[bool] = False
    takes_several: ClassVar[bool] = False  # squeezed networks
    shares: ClassVar[tuple[str, ...]] = ("crop",)
    start = "random"  # no field, except in methods that start from real images

    ipc: int = 10
    """Images per class."""
    iterations: int = 1000
    """Steps of Adam on each batch."""
    batch_size: int = 100
    """Images that are made together and share their statistics."""
    lr: float = 0.25
    """Initial learning rate of Adam."""
    r_bn: float = 0.01
    """Weight of the BatchNorm statistics."""
    first: float = 10.0
    """Factor on the weight of the BatchNorm statistics in the first layer."""
    r_var: float = 1.0
    """Weight of the variances among the BatchNorm statistics, where means have 1."""
    crop: float = 1.0
    """The least share of the area that a crop shows, one crop for the whole batch; 1: no crops."""
    flip: float = 0.0
    """Probability of mirroring a batch."""
    jitter: int = 4
    """Most pixels by which a batch is rolled, down and to the right."""
    seed: int = 0
    """Seed of all random draws."""
    precision: Precision = "auto"
    """What images are recovered in: ieee (also called fp32), bf16, or on a GPU fp16, tf32 (tf32-conv, tf32-matmul:
    convolutions or matrix products alone). auto is, on a GPU, what torch's switches say when the run begins, which it
    keeps: tf32-conv by torch's default; on the CPU ieee, unless torch's switches say otherwise."""

    def unused(self, inputs: RecoverInputs) -> dict[str, str]:
        return {} if self.starts_real else {"root": f": {self.name} starts from noise"}

    def job(self, inputs: RecoverInputs, device: torch.device) -> RecoverJob:
        return RecoverJob(self, inputs, device)

    def __post_init__(self) -> None:
        numbers = [f.name for f in fields(self) if type(getattr(self, f.name)) in (int, float)]
        check_numbers(self, **dict.fromkeys(numbers, 0) | {"ipc": 1, "batch_size": 1})
        check_precision(self.precision)
        if self.flip > 1:
            raise ValueError(f"flip: expected at most 1, got {self.flip}")
        for name in self.shares:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {getattr(self, name)}")
        if self.jitter > MAX_SIZE:
            raise ValueError(f"jitter: expected at most {MAX_SIZE} pixels, got {self.jitter}")

    def per_class(self, num_classes: int, num_teachers: int) -> tuple[int, int]:
        """How many images of a class are made, and from how many real ones where the method starts from those."""
        return self.ipc, self.ipc

    def batches(self, num_classes: int, num_teachers: int) -> list[Batch]:
        """All classes' first images, then their second, ... in runs of ``batch_size``."""
        positions = torch.arange(self.ipc * num_classes, device="cpu")
        parts = positions.split(self.batch_size)
        return [Batch(i, part // num_classes, part % num_classes) for i, part in enumerate(parts)]

    def lowest_crop(self, iteration: int) -> float:
        """The least share of the area that the crop of an iteration shows."""
        return self.crop

    def view(self, teacher: Teacher, batch: Batch, iteration: int) -> Tensor:
        """The record of an iteration's crop, flip and roll, the same for the whole batch."""
        scale = (self.lowest_crop(iteration), 1.0)
        crop = MultiCrop(teacher.shape[1], scale=scale, flip=self.flip, roll=self.jitter, shared=True)
        generator = seeded_generator(self.seed, Stream.RECOVER_CROPS, batch.number, iteration)
        return crop.draw((len(batch.labels), *teacher.shape), generator)

    def network(self, teacher: Teacher, batch: Batch, starts: Callable[[Batch], Tensor]) -> nn.Module:
        """The frozen network that a batch is recovered from."""
        return freeze(teacher.net)

    def variables(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What Adam optimises, and the fixed images it is added to, unless it is the images themselves."""
        return images, None


@dataclass(frozen=True)
class RandomImages(Recover):
    """No method: real images as they are, as a baseline for the others."""

    name: ClassVar[str] = "random"
    about: ClassVar[str] = "real images as they are, to compare with"
    paper: ClassVar[str] = ""
    presets: ClassVar[dict[str, dict[str, Any]]] = {name: {} for name in get_args(SetName)}
    starts_real: ClassVar[bool] = True

    start: Literal["random", "kmeans"] = "random"
    """Which real images: drawn at random, or those nearest to the centres of each class's logits."""

    def unused(self, inputs: RecoverInputs) -> dict[str, str]:
        optimised = ("iterations", "lr", "r_bn", "first", "r_var", "crop", "flip", "jitter")
        return dict.fromkeys((*optimised, "checkpoint_every"), ": real images are taken as they are")

    def batches(self, num_classes: int, num_teachers: int) -> list[Batch]:
        return [replace(batch, moves=False) for batch in super().batches(num_classes, num_teachers)]


def real_images(config: Recover, dataset: Dataset, teachers: Sequence[Teacher]) -> Tensor:
    """The real images ``[K, n, C, H, W]`` from which a method starts.

    Drawn by its seed, or with ``start="kmeans"`` those nearest to the centres of each class's logits.
    """
    count = config.per_class(dataset.num_classes, len(teachers))[1]
    generator = seeded_generator(config.seed, Stream.REAL_START)
    if config.start == "kmeans":
        device = _device(teachers)
        with torch.no_grad():
            logits = torch.cat([teachers[0].net(x.to(device)).cpu() for x in dataset.train_images.split(500)])
        chosen = representatives(logits, dataset.train_labels.cpu(), count, generator)
        images = dataset.train_images[chosen.to(dataset.train_images.device)]
    else:
        images, _ = dataset.sample(count, generator)
    return images.unflatten(0, (dataset.num_classes, count))


def recover(
    config: Recover,
    teachers: Sequence[Teacher],
    folder: str | os.PathLike[str],
    *,
    real: Tensor | None = None,
    rank: int = 0,
    world: int = 1,
    checkpoint_every: int = 100,
    before_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Makes this rank's share of the batches, each into a file of ``folder / "parts"``; existing files stay.

    Interrupted or killed at any moment, it continues from the last checkpoint when called again, to the same bits (with
    as many threads: torch's own convolutions promise no more).

    Args:
        config: the method.
        teachers: networks with BatchNorm; all methods but INFER take one. The work is done on their device.
        folder: where the files go.
        real: from `real_images`, for methods that start from real images.
        rank, world: which share of the batches this process makes: every ``world``-th from ``rank`` on.
        checkpoint_every: iterations between two checkpoints of a batch, and between two calls of ``on_step``.
        before_checkpoint: called with ``batch``, ``iteration`` and ``loss`` before each checkpoint is written: log
            lines beyond `iterations_done` are of steps that will be taken again.
        on_step: called with the same after it; an exception from it ends the run, which can be continued.

    Raises:
        ValueError: teachers of different classes or images, one without BatchNorm or with it in training mode, missing
            or unexpected real images, or files of another run in ``folder``.
        FloatingPointError: a loss that is not finite.
    """
    check(config, teachers, real)
    parts = Path(folder) / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    device = _device(teachers)
    config = config.on(device)
    for batch in config.batches(teachers[0].num_classes, len(teachers))[rank::world]:
        path = parts / f"{batch.number:05d}.safetensors"
        if not path.exists():
            start = real if config.starts_real else None
            with rounded(config.precision, device) as rounding:
                options = (checkpoint_every, before_checkpoint, on_step)
                images = _make(config, teachers, batch, start, parts, rounding, *options)
            tensors = {"images": images, "labels": batch.labels, "place": batch.place}
            write_safetensors(path, tensors, _PART, stored(config, teachers))
        _state_path(parts, batch).unlink(missing_ok=True)


def merge(config: Recover, teachers: Sequence[Teacher], folder: str | os.PathLike[str]) -> DistilledSet:
    """The images of all batches, sorted by class; the whole set is in memory.

    Raises:
        ValueError: a batch's file is missing, damaged, of other images, or of a run with other options; it is named.
    """
    first, config = teachers[0], config.on(_device(teachers))
    per_class, _ = config.per_class(first.num_classes, len(teachers))
    images = torch.empty(first.num_classes, per_class, *first.shape, dtype=torch.float32, device="cpu")
    for batch in config.batches(first.num_classes, len(teachers)):
        path = Path(folder) / "parts" / f"{batch.number:05d}.safetensors"
        if not path.exists():
            raise ValueError(f"{path}: expected the images of batch {batch.number}, found no file")
        tensors = _read(path, _PART, config, teachers)
        for name, wanted in (("labels", batch.labels), ("place", batch.place)):
            if name not in tensors or not torch.equal(tensors[name], wanted):
                raise ValueError(f"{path}: expected the images of batch {batch.number}; their {name} are others")
        if tensors["images"].shape != (len(batch.labels), *first.shape):
            raise ValueError(f"{path}: images: expected {[len(batch.labels), *first.shape]}, got others")
        images[batch.labels, batch.place] = tensors["images"]
    settings = {"method": config.name, "dataset": first.config["dataset"], "class_names": list(first.class_names)}
    labels = torch.arange(first.num_classes, device="cpu").repeat_interleave(per_class)
    return DistilledSet(images.flatten(0, 1), labels, 0.01, first.mean, first.std, {**settings, **asdict(config)})


def iterations_done(config: Recover, teachers: Sequence[Teacher], folder: str | os.PathLike[str], batch: int) -> int:
    """How many of a batch's iterations the files in ``folder`` hold; ValueError for a file that is not of this run."""
    path = Path(folder) / "parts" / f"{batch:05d}.safetensors"
    if path.exists():
        return config.iterations
    state = path.with_suffix(".state")
    return int(_read(state, _STATE, config, teachers)["iteration"]) if state.exists() else 0


def stored(config: Recover, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """The options that determine the result, as the files keep them."""
    config = config.on(_device(teachers))
    return {"method": config.name, **asdict(config), "teachers": [teacher.config for teacher in teachers]}


def _device(teachers: Sequence[Teacher]) -> torch.device:
    return next(teachers[0].net.parameters()).device


def _make(
    config: Recover,
    teachers: Sequence[Teacher],
    batch: Batch,
    real: Tensor | None,
    parts: Path,
    rounding: Rounding,
    checkpoint_every: int,
    before_checkpoint: Callable[[dict[str, Any]], None] | None,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> Tensor:
    """One batch's images, ``[B, C, H, W]`` on the CPU."""
    teacher = teachers[batch.teacher]
    device = _device(teachers)
    low, high = (bound.to(device) for bound in teacher.bounds())
    side, steps = teacher.shape[1], config.iterations if batch.moves else 0

    def starts(of: Batch) -> Tensor:
        if real is None:
            shape = (len(of.labels), *teacher.shape)
            return torch.randn(
                shape,
                generator=seeded_generator(config.seed, Stream.NOISE_START, of.number),
                dtype=torch.float32,
                device="cpu",
            ).to(device)
        return real[of.labels, of.place % real.shape[1]].to(device)

    x, fixed = config.variables(starts(batch))
    if not steps:
        return (x if fixed is None else fixed + x).clamp(low, high).cpu()
    labels = batch.labels.to(device)
    optimizer = torch.optim.Adam([x], lr=config.lr, betas=(0.5, 0.9), fused=rounding.fused)
    scaler = rounding.scaler()
    checkpoint, done = _state_path(parts, batch), 0
    if checkpoint.exists():
        tensors = _read(checkpoint, _STATE, config, teachers)
        done = int(tensors["iteration"])
        x.copy_(tensors["x"])
        names = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[x] = {name: restored(optimizer, name, tensors[name], x) for name in names}
        restore_scaler(scaler, tensors)
    net = config.network(teacher, batch, starts)
    matcher = BNStatMatcher(net, w_var=config.r_var, first=config.first)
    x.requires_grad_()
    for iteration in range(done, steps):
        shown = config.view(teacher, batch, iteration)
        images, base = (x, None) if fixed is None else (fixed, x)
        view = multi_crop(images, to_device(shown, device), side, base=base)
        # the fastest layout for a frozen network
        logits = rounding(net, view.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels) + config.r_bn * matcher.loss()
        (x.grad,) = torch.autograd.grad(scaler.scale(loss), x)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * half_cosine(iteration, steps)
        scaler.step(optimizer)
        scaler.update()
        if fixed is None:
            with torch.no_grad():
                torch.clamp(x, low, high, out=x)
        if (iteration + 1) % checkpoint_every == 0 or iteration + 1 == steps:
            if not math.isfinite(value := float(loss.detach())):
                where = f"batch {batch.number} is {value} in iteration {iteration + 1}"
                raise FloatingPointError(f"the loss of {where}: a smaller lr than {config.lr} may help")
            record = {"batch": batch.number, "iteration": iteration + 1, "loss": value}
            if before_checkpoint is not None:
                before_checkpoint(record)
            state = {"x": x, "iteration": torch.tensor(iteration + 1, device="cpu"), **optimizer.state[x]}
            write_safetensors(checkpoint, state | scaler_state(scaler), _STATE, stored(config, teachers))
            if on_step is not None:
                on_step(record)
    matcher.remove()
    x = x.detach()
    return (x if fixed is None else fixed + x).clamp(low, high).cpu()


def _state_path(parts: Path, batch: Batch) -> Path:
    return parts / f"{batch.number:05d}.state"


def _read(path: Path, kind: str, config: Recover, teachers: Sequence[Teacher]) -> dict[str, Tensor]:
    tensors, header = read_safetensors(path, kind)
    wanted = stored(config, teachers)
    kept = {"precision": "auto", **header["config"]}  # which older files do not name
    if agree(kept["precision"], wanted["precision"]):
        kept["precision"] = wanted["precision"]
    if kept != wanted:
        different = sorted(key for key in wanted if kept.get(key) != wanted[key])
        raise ValueError(f"{path}: expected a file of this run; its {', '.join(different) or 'options'} differ")
    return tensors


def check(config: Recover, teachers: Sequence[Teacher], real: Tensor | None) -> None:
    """Raises for what `recover` refuses before it begins."""
    if not teachers:
        raise ValueError("teachers: expected at least one, got none")
    if len(teachers) > 1 and not config.takes_several:
        raise ValueError(f"teachers: expected one for {config.name}, got {len(teachers)}")
    first = teachers[0]
    for teacher in teachers:
        if (teacher.num_classes, teacher.shape) != (first.num_classes, first.shape):
            wanted = f"{first.num_classes} classes and images of {list(first.shape)} as the first's"
            raise ValueError(f"teachers: expected {wanted}, got {teacher.num_classes} and {list(teacher.shape)}")
        BNStatMatcher(teacher.net).remove()  # raises for a network without BatchNorm, or with it in training mode
    check_precision(config.precision, _device(teachers))
    if not config.starts_real:
        return
    count = config.per_class(first.num_classes, len(teachers))[1]
    shape = [first.num_classes, count, *first.shape]
    if real is None or list(real.shape) != shape:
        got = "none" if real is None else list(real.shape)
        raise ValueError(f"real: expected the images {shape} from which {config.name} starts, got {got}")


class RecoverJob(Job):
    """Makes a set of images from squeezed networks: distilled.safetensors. The ranks share the batches."""

    title, made = "recover", ("distilled.safetensors",)

    def __init__(self, config: Recover, inputs: RecoverInputs, device: torch.device):
        check_numbers(inputs, OptionError, checkpoint_every=1)
        self.config, self.inputs, self.results = config, inputs, {}
        self.teachers = [Teacher.load(path, device, network=inputs.network) for path in files_of(inputs.teacher)]
        about, self.real = self.teachers[0].config, None
        if config.starts_real:
            space = self.teachers[0].mean, self.teachers[0].std
            options: dict[str, Any] = {"workers": inputs.workers, "space": space}
            data = load_images(about["dataset"], inputs.root, about["image_size"], **options)
            self.data, self.real = data, real_images(config, data, self.teachers)
        check(config, self.teachers, self.real)

    def stored(self) -> dict[str, Any]:
        return {"command": "recover", **stored(self.config, self.teachers)}

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        return record["iteration"] <= iterations_done(self.config, self.teachers, run.folder, record["batch"])

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.recover, self.merge

    def recover(self, run: Run) -> None:
        config, teachers, every = self.config, self.teachers, self.inputs.checkpoint_every
        rank, size = ranks.world()
        share = config.batches(teachers[0].num_classes, len(teachers))[rank::size]
        advance = run.progress("recover", len(share) * config.iterations)

        def before_checkpoint(record: dict[str, Any]) -> None:
            run.log({"phase": "recover", **record})
            advance((record["iteration"] - 1) % every + 1, f"loss {record['loss']:.4f}")

        recover(
            config,
            teachers,
            run.folder,
            real=self.real,
            rank=rank,
            world=size,
            checkpoint_every=every,
            before_checkpoint=before_checkpoint,
            on_step=lambda _: run.stop(),
        )
        ranks.wait_for_ranks()

    def merge(self, run: Run) -> None:
        per_class = self.config.per_class(self.teachers[0].num_classes, len(self.teachers))[0]
        if run.first:
            distilled = merge(self.config, self.teachers, run.folder)
            distilled.save(run.folder / "distilled.safetensors")
            write_picture(run, distilled, per_class)
        self.results["images"] = per_class * self.teachers[0].num_classes
