"""Squeeze: the BatchNorm network that the decoupled methods recover images from, and the file that holds it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._arguments import check_choice
from pydistill._devices import to_device
from pydistill._torch_files import read_state_dict
from pydistill.augment import MultiCrop
from pydistill.data import Dataset, load, read_safetensors, stream, write_safetensors
from pydistill.data.loading import PICTURES
from pydistill.data.reading import check_workers, cores
from pydistill.data.streamed import batches_of
from pydistill.evaluate import accuracy
from pydistill.methods.method import DatasetName, Inputs, Job, Method, OptionError, check_dataset, check_numbers
from pydistill.methods.precision import Precision, check_precision, rounded
from pydistill.methods.training import OnEpoch, train
from pydistill.nn import ConvNet, ResNet18, ResNet50
from pydistill.nn.description import describe, from_description, is_untouched
from pydistill.seeding import Stream, seeded_generator, seeded_net

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.runs import Run

__all__ = [
    "NetworkName",
    "Squeeze",
    "Teacher",
    "build",
    "files_of",
    "import_weights",
    "load_images",
    "squeeze",
    "untrained",
]

NetworkName = Literal["convnet", "resnet18", "resnet50"]
SetName = DatasetName
_KIND = "teacher"
_BUILT_OF = ("network", "channels", "image_size", "width", "depth")  # of a teacher's config
_IMAGENET: dict[str, Any] = {
    "name": "imagenet-1k",
    "image_size": 224,
    "class_names": [f"class {number}" for number in range(1000)],
    "mean": torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32, device="cpu"),
    "std": torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32, device="cpu"),
}


def build(network: NetworkName, channels: int, num_classes: int, image_size: int, width: int, depth: int) -> nn.Module:
    """A network with BatchNorm: `ConvNet`, or `ResNet18` or `ResNet50`, with the CIFAR stem below 128 pixels."""
    if network == "convnet":
        return ConvNet(channels, num_classes, width, depth, image_size, norm="batch")
    nets = {"resnet18": ResNet18, "resnet50": ResNet50}
    check_choice("network", network, ("convnet", *nets))
    return nets[network](num_classes, channels, "imagenet" if image_size >= 128 else "cifar", width)


def files_of(teacher: Any) -> tuple[Path, ...]:
    """The files of one or several squeezed networks; ValueError if there is none."""
    files = (teacher,) if isinstance(teacher, (str, os.PathLike)) else tuple(teacher)
    if not files:
        raise OptionError("teacher", "expected the file of a squeezed network at least, got none")
    return tuple(Path(file) for file in files)


def load_images(
    name: str,
    root: str | os.PathLike[str] | None,
    image_size: int | None,
    *,
    workers: int | None = None,
    space: tuple[Tensor, Tensor] | None = None,
) -> Dataset:
    """A data set by its name in the presets, in the requested size; pictures in folders and packed sets are streamed.

    Args:
        name, root, image_size: of the set.
        workers: processes that decode what is streamed; by default one for each core, up to 8.
        space: mean and deviation by which what is streamed is normalised; by default its own, for ImageNet the usual.
    """
    if name in PICTURES or (root is not None and Path(root).is_file()):
        workers = min(cores(), 8) if workers is None else workers
        check_workers(workers)
        if space is None and name == _IMAGENET["name"]:
            space = _IMAGENET["mean"], _IMAGENET["std"]
        sized = image_size if name in PICTURES else None
        return stream(name, root, image_size=sized, workers=workers, space=space)
    return load(name, root, image_size=image_size if name == "digits" else None)


@dataclass(frozen=True)
class SqueezeInputs(Inputs):
    """The real images, or weights from elsewhere."""

    dataset: SetName = "digits"
    """The real images."""
    root: Path | None = None
    """Folder of the data set's files, or what pack made of it."""
    image_size: int | None = None
    """Size in pixels to which digits (16), image folders (32) and the two ImageNets (64, 224) are resized."""
    workers: int | None = None
    """Processes that decode pictures; by default one for each core, up to 8."""
    weights: Path | None = None
    """A torch checkpoint to use instead of training; imagenet-1k then needs no images."""
    weights_key: str | None = None
    """Key of the weights in the checkpoint, such as model_ema; by default the first of the usual names."""

    @classmethod
    def for_method(cls, method: Any, **given: Any) -> Self:
        check_dataset(given.get("dataset", "digits"))
        return super().for_method(method, **given)


@dataclass(frozen=True)
class Squeeze(Method):
    """How a network is trained on real images: SGD with momentum and a cosine, on crops, flips and shifts.

    The defaults are SRe2L's for CIFAR: ResNet-18, 200 epochs, learning rate 0.1.
    """

    name: ClassVar[str] = "squeeze"
    about: ClassVar[str] = "train a network on the real images, or take weights from elsewhere"
    paper: ClassVar[str] = "Yin, Xing, Shen, NeurIPS 2023"
    group: ClassVar[str] = "decoupled"
    inputs: ClassVar[type[Inputs]] = SqueezeInputs

    network: NetworkName = "resnet18"
    """convnet is the ConvNet of the condensation papers with BatchNorm."""
    width: int = 64
    """Channels of the (first) stage."""
    depth: int = 3
    """Blocks of convnet."""
    epochs: int = 200
    """Passes over the real images."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    crop: float = 0.25
    """The least share of an image's area that a random crop shows; 1: no crops."""
    flip: float = 0.5
    """Probability of a mirrored image."""
    seed: int = 0
    """Seed of the initial parameters and all random draws."""
    precision: Precision = "auto"
    """What the network is trained in: ieee (also called fp32), bf16, or on a GPU fp16, tf32 (tf32-conv, tf32-matmul:
    convolutions or matrix products alone). auto is, on a GPU, what torch's switches say when the run begins, which it
    keeps: tf32-conv by torch's default; on the CPU ieee, unless torch's switches say otherwise."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"network": "convnet", "width": 32, "epochs": 10, "lr": 0.05, "crop": 0.5, "flip": 0.0},
        "fashion-mnist": {"network": "convnet", "width": 32, "epochs": 3, "lr": 0.1, "crop": 0.5},
        "cifar10": {},
        "cifar100": {},
        "tiny-imagenet": {"epochs": 50, "lr": 0.2, "weight_decay": 1e-4, "crop": 0.08},
        "imagenet-1k": {"epochs": 90, "batch_size": 256, "weight_decay": 1e-4, "crop": 0.08},
    }

    def unused(self, inputs: SqueezeInputs) -> dict[str, str]:
        unused = {} if self.network == "convnet" else {"depth": f" with network={self.network}"}
        if inputs.dataset in ("fashion-mnist", "cifar10", "cifar100"):
            unused["image_size"] = f": {inputs.dataset} has a size of its own"
        if inputs.weights is not None:
            training = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "crop", "flip", "seed")
            unused |= dict.fromkeys(training, " with weights=FILE, which is not trained")
        return unused

    def job(self, inputs: SqueezeInputs, device: torch.device) -> SqueezeJob:
        return SqueezeJob(self, inputs, device)

    def __post_init__(self) -> None:
        check_numbers(self, width=1, depth=1, epochs=1, batch_size=1, lr=0.0, momentum=0, weight_decay=0, seed=0)
        check_precision(self.precision)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected a share above 0 and at most 1, got {self.crop}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")


@dataclass(eq=False)
class Teacher:
    """A trained network in evaluation mode, and the space of images it sees.

    Attributes:
        net: gives logits ``[N, K]`` of images ``[N, C, image_size, image_size]``.
        mean, std: float32 ``[C]``: a pixel in ``[0, 1]`` is ``image * std + mean``.
        class_names: ``K`` names.
        config: ``network``, ``width``, ``depth``, ``channels``, ``image_size``, ``dataset``, and how it was made; for a
            network that `build` does not make, at least ``channels``, ``image_size`` and ``dataset``.
    """

    net: nn.Module
    mean: Tensor
    std: Tensor
    class_names: tuple[str, ...]
    config: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of its images."""
        side = self.config["image_size"]
        return self.config["channels"], side, side

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of an image, ``[C, 1, 1]`` each: pixels 0 and 1."""
        low, high = -self.mean / self.std, (1 - self.mean) / self.std
        return low[:, None, None], high[:, None, None]

    def save(self, path: str | os.PathLike[str], *, network: str | None = None) -> None:
        """Writes a safetensors file, atomically.

        The file says which network it is if ``config`` does (`build`) or if it is a ``Sequential`` of torch's layers.
        Any other has to be given to `load`, as no file can hold its code; ``network``, such as
        "package.module:function", is a note for the reader on what makes that network.
        """
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {"mean": self.mean, "std": self.std}
        about: dict[str, Any] = {"class_names": list(self.class_names)}
        if not self._is_built():
            about["custom"] = {"layers": describe(self.net), "network": network, "class": type(self.net).__qualname__}
        write_safetensors(path, tensors, _KIND, self.config, **about)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        network: nn.Module | Callable[[], nn.Module] | str | None = None,
    ) -> Teacher:
        """Reads what `save` wrote. Nothing that the file names is imported.

        Args:
            path: the file.
            device: where to put the network.
            network: what receives the weights, if the file does not say: a module, a function that makes one, or
                "package.module:function", which is imported.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, its weights are of another network, or ``network`` is needed and not given.
        """
        tensors, header = read_safetensors(path, _KIND)
        config, custom = header["config"], header.get("custom")
        if network is None and custom is not None and custom["layers"] is None:
            noted = f", by its maker's note {custom['network']!r}" if custom["network"] else ""
            wanted = "the module that its weights are of, or what makes it"
            raise ValueError(f"{path}: network: expected {wanted}: a {custom['class']}{noted}; got None")
        given = None if network is None else _given(network)
        state = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        try:
            names, mean, std = tuple(header["class_names"]), tensors["mean"], tensors["std"]
            if given is not None:
                net = given
                net.load_state_dict(state)
            elif custom is None:
                net = build(**{name: config[name] for name in _BUILT_OF}, num_classes=len(names))
                net.load_state_dict(state)
            else:
                net = from_description(custom["layers"])
                net.load_state_dict(state, assign=True)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a whole teacher as squeeze writes it; {error}") from error
        return cls(net.eval().to(device), mean, std, names, config)

    def _is_built(self) -> bool:
        """Whether `build` makes exactly this network from ``config``."""
        try:
            with torch.device("meta"):
                made = build(**{name: self.config[name] for name in _BUILT_OF}, num_classes=self.num_classes)
        except (KeyError, TypeError, ValueError):
            return False
        types = [[type(module) for module in net.modules()] for net in (made, self.net)]
        return types[0] == types[1] and repr(made) == repr(self.net) and all(map(is_untouched, self.net.modules()))


def _given(network: nn.Module | Callable[[], nn.Module] | str) -> nn.Module:
    if isinstance(network, str):
        module, _, name = network.partition(":")
        if not name:
            raise ValueError(f"network: expected 'package.module:function', got {network!r}")
        try:
            made = getattr(importlib.import_module(module), name)
        except (AttributeError, ImportError) as error:
            raise ValueError(f"network: expected 'package.module:function', got {network!r} ({error})") from error
    else:
        made = network
    net = made if isinstance(made, nn.Module) else made()
    if not isinstance(net, nn.Module):
        raise TypeError(f"network: expected a module or a function that makes one, got {type(net).__name__}")
    return net


def untrained(config: Squeeze, dataset: Dataset | None) -> Teacher:
    """The teacher before its training, for a data set's images, or ImageNet-1K's for None; ValueError if none fits."""
    space = _IMAGENET if dataset is None else _space(dataset)
    device = torch.device("cpu") if dataset is None else dataset.train_images.device
    names, mean, std = space["class_names"], space["mean"], space["std"]
    options = {"channels": len(mean), "num_classes": len(names), "image_size": space["image_size"]}
    make = partial(build, config.network, width=config.width, depth=config.depth, **options)
    about = {**asdict(config), "channels": len(mean), "image_size": space["image_size"], "dataset": space["name"]}
    return Teacher(seeded_net(make, config.seed, Stream.TEACHER, device=device), mean, std, tuple(names), about)


def _space(dataset: Dataset) -> dict[str, Any]:
    names = ("name", "image_size", "class_names", "mean", "std")
    return {name: getattr(dataset, name) for name in names}


def squeeze(
    config: Squeeze, dataset: Dataset, *, state: dict[str, Tensor] | None = None, on_epoch: OnEpoch | None = None
) -> Teacher:
    """Trains a network with BatchNorm on a data set's real images, by cross-entropy; raises as `train` does.

    Args:
        config: the network and its training.
        dataset: real images; the work is done on their device.
        state, on_epoch: as `pydistill.methods.training.train` takes them.
    """
    config = config.on(dataset.train_images.device)
    teacher = untrained(config, dataset)
    images, labels = dataset.train_images, dataset.train_labels
    side = dataset.image_size
    crop = MultiCrop(side, scale=(config.crop, 1.0), flip=config.flip)
    with rounded(config.precision, images.device) as rounding:
        net = rounding.laid_out(teacher.net)
        optimizer = torch.optim.SGD(
            net.parameters(),
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=rounding.fused,
        )

        def batches(epoch: int) -> Iterator[tuple[int, Any]]:
            generator = seeded_generator(config.seed, Stream.TEACHER_BATCHES, epoch)
            order = torch.randperm(len(images), generator=generator, device="cpu").split(config.batch_size)
            for index, real in zip(order, batches_of(images, order), strict=True):
                record = crop.draw(real.shape, generator)
                x, y = crop(real, record), labels[to_device(index, labels.device)]
                yield 1, lambda x=x, y=y: F.cross_entropy(rounding(net, x), y)

        options: dict[str, Any] = {"epochs": config.epochs, "steps": -(-len(images) // config.batch_size)}
        train(net.train(), optimizer, batches, **options, state=state, scaler=rounding.scaler(), on_epoch=on_epoch)
    teacher.net.eval()
    return teacher


def import_weights(
    config: Squeeze, path: str | os.PathLike[str], dataset: Dataset | None = None, *, key: str | None = None
) -> Teacher:
    """A teacher with the weights of a torch checkpoint, such as torchvision's; no code in it is run.

    Args:
        config: the network.
        path: the file: a ``state_dict``, or a training script's dict that has one under "state_dict",
            "model_state_dict", "model", "net" or the like, beside whatever describes the training. The prefixes of
            DataParallel ("module.") and torch.compile ("_orig_mod.") are removed from its keys. The checksums of the
            archive are verified; a file of torch before 1.6 has none.
        dataset: whose images the network sees; None: ImageNet-1K as torchvision's networks see it, 224 pixels a side.
        key: the key of the weights in the file, such as "ema", if not the first that are found.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint or is damaged, its keys and shapes are not those of
            ``config.network``, or a number in it is not finite.
    """
    wanted = f"the weights of a {config.network}"
    weights = read_state_dict(Path(path), wanted, key)
    teacher = untrained(config, dataset)
    try:
        teacher.net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected {wanted}; {error}") from error
    teacher.net.eval()
    return teacher


class SqueezeJob(Job):
    """Trains a network with BatchNorm, or takes weights from elsewhere: teacher.safetensors."""

    title, made = "squeeze", ("teacher.safetensors",)

    def __init__(self, config: Squeeze, inputs: SqueezeInputs, device: torch.device):
        self.config, self.inputs, self.results = config, inputs, {}
        if inputs.weights is None and inputs.weights_key is not None:
            raise OptionError("weights_key", f"expected with weights=FILE only, got {inputs.weights_key!r}")
        imagenet = inputs.weights is not None and inputs.dataset == "imagenet-1k"
        if not imagenet:
            data = load_images(inputs.dataset, inputs.root, inputs.image_size, workers=inputs.workers)
        self.data = None if imagenet else data.to(device)
        if inputs.weights is not None:
            self.teacher = import_weights(config, inputs.weights, self.data, key=inputs.weights_key)
        else:
            check_precision(config.precision, device)
            untrained(config, self.data)  # refuses images that are too small for the network

    def stored(self) -> dict[str, Any]:
        inputs = self.inputs
        config = asdict(self.config)
        return {"command": "squeeze", "config": config, "dataset": inputs.dataset, "image_size": inputs.image_size}

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return (*(() if self.inputs.weights is not None else (self.train,)), self.keep)

    def train(self, run: Run) -> None:
        assert self.data is not None  # where there are no weights
        with run.epochs("squeeze", self.config.epochs) as (state, on_epoch):
            self.teacher = squeeze(self.config, self.data, state=state, on_epoch=on_epoch)

    def keep(self, run: Run) -> None:
        self.teacher.save(run.folder / "teacher.safetensors")
        if self.data is not None:
            self.results["accuracy"] = accuracy(self.teacher.net, self.data.test_images, self.data.test_labels)
