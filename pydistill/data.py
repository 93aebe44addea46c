"""Data sets, distilled files, and the atomic writes behind them.

`load` reads a whole data set into memory as normalised float32 images, the form in which every distillation method
takes it. `DistilledSet` is the product of a distillation: a small safetensors file that carries its own normalisation
and configuration. Nothing here writes pickles; CIFAR's own files are read by an unpickler that admits numpy arrays and
ordinary containers only.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pydistill.whitening import ZCA

__all__ = [
    "DATASETS",
    "EXPORT_HEADER",
    "REPOSITORY_NORMALISATION",
    "Dataset",
    "DistilledSet",
    "load",
    "put_in_place",
    "read_safetensors",
    "renormalise",
    "write_atomic",
    "write_safetensors",
]

EXPORT_HEADER = "distilled.json"  # of a folder that DistilledSet.export wrote
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "image-folder")
FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_MNIST_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# The mean and deviation by which the method repositories (VICO-UoE/DatasetCondensation and its descendants) and
# DD-Ranking normalise: for CIFAR-10 the deviation is not the one of its pixels, and so not the one of `load`.
REPOSITORY_NORMALISATION = {
    "fashion-mnist": ((0.2861,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image set in memory, normalised per channel with the mean and deviation of its training images.

    Attributes:
        name: which set it is, one of `DATASETS` when it comes from `load`.
        train_images: float32 ``[N, C, H, W]``, ``(pixel - mean) / std`` with pixels in ``[0, 1]``.
        train_labels: int64 ``[N]`` in ``[0, K)``.
        test_images: float32 ``[M, C, H, W]``, normalised with the *training* mean and deviation.
        test_labels: int64 ``[M]``.
        class_names: ``K`` names, in label order.
        mean: float32 ``[C]``, of the training pixels in ``[0, 1]``.
        std: float32 ``[C]``.
        zca: what the images are whitened by, as pixels, after which mean is zero and std one; or None.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    zca: ZCA | None = None

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of an image in pixels; the sets read here are square."""
        return self.train_images.shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with its images and labels on ``device``."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def pixels(self, images: Tensor) -> Tensor:
        """Images of the set's space as pixels, ``[..., C, H, W]``."""
        if self.zca is not None:
            return self.zca.to(images.device).inverse(images)
        return images * self.std.to(images)[:, None, None] + self.mean.to(images)[:, None, None]

    def whitened(self, eps: float = 0.1) -> Dataset:
        """The same set whitened by a `pydistill.whitening.ZCA` that is fitted on the pixels of its training images.

        Raises:
            ValueError: the set is whitened already, or as `ZCA.fit` does.
        """
        if self.zca is not None:
            raise ValueError(f"{self.name}: expected a set that is not whitened yet")
        train = self.pixels(self.train_images)
        zca = ZCA.fit(train, eps)
        return replace(
            self,
            train_images=zca(train),
            test_images=zca(self.pixels(self.test_images)),
            mean=torch.zeros_like(self.mean),
            std=torch.ones_like(self.std),
            zca=zca.to("cpu"),
        )

    def sample(
        self, ipc: int, generator: torch.Generator | None = None, preferred: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws ``ipc`` real training images of each class without replacement.

        Args:
            ipc: images per class, at least 1.
            generator: a CPU generator; the global one by default.
            preferred: bool ``[N]``, training images that are taken before any other of their class.

        Returns:
            Images ``[K * ipc, C, H, W]`` (a copy), classes in order, and their labels ``[K * ipc]``.

        Raises:
            ValueError: ``ipc`` is below 1, or a class has fewer training images than ``ipc``.
        """
        if ipc < 1:
            raise ValueError(f"ipc: expected at least 1 image per class, got {ipc}")
        chosen = []
        for label, name in enumerate(self.class_names):
            members = (self.train_labels == label).nonzero()[:, 0]
            if len(members) < ipc:
                raise ValueError(f"ipc: expected at most {len(members)}, the training images of {name!r}, got {ipc}")
            order = members[torch.randperm(len(members), generator=generator).to(members.device)]
            if preferred is not None:
                order = torch.cat([order[preferred[order]], order[~preferred[order]]])
            chosen.append(order[:ipc])
        index = torch.cat(chosen)
        return self.train_images[index].clone(), self.train_labels[index].clone()


def load(name: str, root: str | os.PathLike[str] | None = None, *, image_size: int | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: ``"digits"`` (scikit-learn's 8x8 digits, enlarged bilinearly to 16x16; every fifth image of each class is
            a test image), ``"fashion-mnist"`` (the four IDX files, gzipped or not), ``"cifar10"`` and ``"cifar100"``
            (the python batches) or ``"image-folder"`` (``root/train/<class>/*`` and ``root/test`` or ``root/val``,
            read by torchvision).
        root: the folder with the files. For Fashion-MNIST the default is where Debian's package puts it; digits take
            none; the other two need one.
        image_size: height and width in pixels to which an image folder's pictures are resized and cropped (default
            32), or to which the digits are enlarged (default 16); the other sets have a size of their own.

    Raises:
        ValueError: an unknown name, an argument that the set does not take, or a truncated or foreign file, named
            with what was expected in it.
        FileNotFoundError: a missing folder or file.
        RuntimeError: scikit-learn (digits) or torchvision (image folder) is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    if image_size is not None and name not in ("digits", "image-folder"):
        raise ValueError(f"image_size: expected none, {name} has a size of its own, got {image_size}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    if name == "digits":
        if root is not None:
            raise ValueError(f"root: expected none, digits come with scikit-learn, got {str(root)!r}")
        return _load_digits(image_size or 16)
    if root is None and name != "fashion-mnist":
        raise ValueError(f"root: expected the folder that holds the files of {name}, got None")
    folder = Path(root) if root is not None else FASHION_MNIST_ROOT
    if not folder.is_dir():
        raise FileNotFoundError(f"root: expected the folder that holds the files of {name}, found none at {folder}")
    if name == "fashion-mnist":
        return _load_fashion_mnist(folder)
    if name == "cifar10":
        return _load_cifar10(folder)
    if name == "cifar100":
        return _load_cifar100(folder)
    return _load_image_folder(folder, image_size or 32)


def _normalised(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
) -> Dataset:
    """Builds the data set from float32 pixels in [0, 1], [N, C, H, W], and int64 labels."""
    pixels = train[0]
    mean = pixels.mean(dim=(0, 2, 3), dtype=torch.float64)
    # Two passes over one channel at a time: the variance needs no second copy of the set.
    std = torch.stack([pixels[:, c].double().sub_(mean[c]).square_().mean().sqrt() for c in range(pixels.shape[1])])
    mean, std = mean.float(), std.clamp_min(1e-6).float()
    for images in (train[0], test[0]):
        images.sub_(mean[:, None, None]).div_(std[:, None, None])
    return Dataset(name, train[0], train[1], test[0], test[1], tuple(class_names), mean, std)


def _load_digits(image_size: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("digits need scikit-learn, which is not installed: pip install 'pydistill[demo]'") from error
    raw = load_digits()
    images = torch.from_numpy(np.ascontiguousarray(raw.images, dtype=np.float32))[:, None] / 16  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(np.ascontiguousarray(raw.target, dtype=np.int64))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero()[::5, 0]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return _normalised("digits", train, test, [str(digit) for digit in range(10)])


def _read_idx(folder: Path, stem: str, dims: int) -> np.ndarray:
    """Reads an IDX file of bytes: two zero bytes, the type 0x08, the rank, the sizes in big-endian int32, the data."""
    plain = folder / stem
    path = plain if plain.exists() else folder / f"{stem}.gz"
    if not path.exists():
        raise FileNotFoundError(f"{plain} or {path.name}: expected an IDX file of {dims} dimensions, found none")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, it is truncated or foreign ({error})") from error
    header = 4 + 4 * dims
    magic = bytes((0, 0, 8, dims))
    if len(raw) < header or raw[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of bytes in {dims} dimensions, which starts with {magic.hex(' ')}; "
            f"got {len(raw)} bytes that start with {raw[:4].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{dims}i", raw[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if min(shape) < 1 or len(raw) - header != expected:
        raise ValueError(
            f"{path}: expected {'x'.join(map(str, shape))} = {expected} bytes of data as its header says, "
            f"got {len(raw) - header}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _load_fashion_mnist(folder: Path) -> Dataset:
    parts = []
    for prefix in ("train", "t10k"):
        pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if pixels.shape[1:] != (28, 28):
            raise ValueError(f"{folder}: expected {prefix} images of 28x28, got {pixels.shape[1]}x{pixels.shape[2]}")
        if len(pixels) != len(labels):
            raise ValueError(f"{folder}: expected {len(pixels)} {prefix} labels as images, got {len(labels)}")
        if labels.max() > 9:
            raise ValueError(f"{folder}: expected {prefix} labels in 0..9, got {labels.max()}")
        images = torch.from_numpy(pixels.astype(np.float32))[:, None].div_(255)
        parts.append((images, torch.from_numpy(labels.astype(np.int64))))
    return _normalised("fashion-mnist", parts[0], parts[1], FASHION_MNIST_CLASSES)


def _decode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes; the codecs module itself would admit decompression and more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes spelled in encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what a file of arrays needs, numpy arrays, dtypes and scalars, and containers; nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray if hasattr(np, "_core") else np.core.multiarray, name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _decode_latin1
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_cifar(path: Path, wanted: str) -> dict[str, Any]:
    """One of CIFAR's pickled files, which are dicts."""
    try:
        with path.open("rb") as file:
            found = _ArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected {wanted}, found no file") from error
    except Exception as error:  # a foreign stream makes the unpickler raise almost anything
        raise ValueError(f"{path}: expected {wanted}; the file is truncated or foreign ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected {wanted}; got a {type(found).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}


def _read_cifar_batch(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    key = "labels" if classes == 10 else "fine_labels"
    wanted = f"a CIFAR-{classes} python batch: a dict with 'data', uint8 [N, 3072], and '{key}', "
    wanted += f"N integers in 0..{classes - 1}"
    fields = _read_cifar(path, wanted)
    data, labels = fields.get("data"), fields.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: expected {wanted}; got {got} for 'data'")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(label in range(classes) for label in labels):
        raise ValueError(f"{path}: expected {wanted}; got other '{key}' for its {len(data)} images")
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32).astype(np.float32)).div_(255)
    return images, torch.tensor(labels, dtype=torch.int64)


def _load_cifar10(folder: Path) -> Dataset:
    nested = folder / "cifar-10-batches-py"
    folder = nested if nested.is_dir() else folder
    batches = [_read_cifar_batch(folder / f"data_batch_{i}", 10) for i in range(1, 6)]
    train = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return _normalised("cifar10", train, _read_cifar_batch(folder / "test_batch", 10), CIFAR10_CLASSES)


def _load_cifar100(folder: Path) -> Dataset:
    nested = folder / "cifar-100-python"
    folder = nested if nested.is_dir() else folder
    train, test = (_read_cifar_batch(folder / name, 100) for name in ("train", "test"))
    wanted = "CIFAR-100's meta file: a dict with 'fine_label_names', 100 of them"
    names = _read_cifar(folder / "meta", wanted).get("fine_label_names")
    if not isinstance(names, list) or len(names) != 100:
        raise ValueError(f"{folder / 'meta'}: expected {wanted}; got others")
    names = tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)
    return _normalised("cifar100", train, test, names)


def _load_image_folder(folder: Path, image_size: int) -> Dataset:
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ImportError as error:
        raise RuntimeError("image-folder needs torchvision, which is not installed: pip install torchvision") from error
    tests = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        raise FileNotFoundError(f"root: expected train/<class>/* and test/<class>/* (or val) in {folder}")
    to_pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), *to_pixels])
    parts, classes = [], []
    for part in (folder / "train", tests[0]):
        try:
            pictures = ImageFolder(str(part), transform)
            loaded = [picture for picture, _ in pictures]
        except (OSError, SyntaxError) as error:  # pillow raises either for a file that is not a whole picture
            raise ValueError(f"{part}: expected a folder of pictures for each class: {error}") from error
        parts.append((torch.stack(loaded), torch.tensor(pictures.targets, dtype=torch.int64)))
        classes.append(pictures.classes)
    if classes[0] != classes[1]:
        differing = sorted(set(classes[0]) ^ set(classes[1]))
        raise ValueError(f"root: expected the same classes for training and test in {folder}, {differing} differ")
    return _normalised("image-folder", parts[0], parts[1], classes[0])


def renormalise(images: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """Takes normalised images from one mean and deviation to another; ``images`` themselves where both are equal.

    Equivalent to ``(images * before_std + before_mean - after_mean) / after_std`` per channel.

    Args:
        images: ``[N, C, H, W]``.
        before, after: a mean and a deviation ``[C]`` each, of pixels in ``[0, 1]``.
    """
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return images
    # in one factor and one shift, from float64: what returns is then the same up to one rounding
    (mean, std), (new_mean, new_std) = ([each.double() for each in pair] for pair in (before, after))
    factor, shift = std / new_std, (mean - new_mean) / new_std
    return images * factor.to(images)[:, None, None] + shift.to(images)[:, None, None]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a reader, or a crash at any moment, sees the old file or the new one whole.

    The bytes go to a temporary file in the same folder, are synced to the disk, and are renamed over ``path``.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result should be as readable as any other file of this user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        put_in_place(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def put_in_place(source: Path, target: Path) -> None:
    """Renames a file that has been synced over another in the same folder; lasting when it returns."""
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], kind: str, config: dict[str, Any], **more: Any
) -> None:
    """Writes tensors to a safetensors file, atomically, with a JSON object under ``pydistill`` in its metadata.

    The object has ``kind``, ``version``, ``config`` and what ``more`` adds. Equal content gives equal bytes.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors puts several in an order that changes from process to process.
    header = {"pydistill": json.dumps({"kind": kind, "version": 1, "config": config, **more})}
    write_atomic(path, safetensors_bytes(content, header))


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_safetensors` wrote: the tensors, and the object with the configuration under ``config``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not a safetensors file, or is marked as something else than ``kind``.
    """
    path, wanted = Path(path), f"a pydistill file of kind {kind!r}, version 1"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted}, found no file")
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected {wanted}; it is truncated or no safetensors file ({error})") from error
    try:
        header = json.loads(entries["pydistill"])
        found, version, config = header["kind"], header["version"], header["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected {wanted}; its metadata lacks that ({error!r})") from error
    if (found, version) != (kind, 1) or not isinstance(config, dict):
        raise ValueError(f"{path}: expected {wanted}; got {found!r}, version {version}")
    return tensors, header


@dataclass(eq=False)
class DistilledSet:
    """A distilled data set: what a distillation makes and a student is trained on.

    Attributes:
        images: float32 ``[N, C, H, W]``, in normalised space: a pixel is ``images * std + mean``.
        labels: int64 ``[N]``, or float32 ``[N, K]`` soft labels.
        lr: the learning rate that was learnt along with the images, for plain SGD students.
        mean: float32 ``[C]``, of the real training pixels in ``[0, 1]``.
        std: float32 ``[C]``.
        config: what made it, as JSON-able values.
        label_kind: ``"hard"`` for int64 labels, ``"logits"`` or ``"probs"`` for soft ones.
        zca: what the images are whitened by, or None.

    Raises:
        ValueError: the shapes, the dtypes and ``label_kind`` do not agree.
    """

    images: Tensor
    labels: Tensor
    lr: float
    mean: Tensor
    std: Tensor
    config: dict[str, Any] = field(default_factory=dict)
    label_kind: str = "hard"
    zca: ZCA | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise ValueError(f"images: expected float32 [N, C, H, W], got {_describe(self.images)}")
        count, channels = self.images.shape[:2]
        if self.label_kind not in ("hard", "logits", "probs"):
            raise ValueError(f"label_kind: expected 'hard', 'logits' or 'probs', got {self.label_kind!r}")
        if self.label_kind == "hard":
            right, wanted = self.labels.ndim == 1 and self.labels.dtype == torch.int64, f"int64 [{count}]"
        else:
            right, wanted = self.labels.ndim == 2 and self.labels.dtype == torch.float32, f"float32 [{count}, K]"
        if not right or len(self.labels) != count:
            raise ValueError(f"labels: expected {wanted} for {self.label_kind} labels, got {_describe(self.labels)}")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.shape != (channels,) or value.dtype != torch.float32:
                raise ValueError(f"{name}: expected float32 [{channels}], got {_describe(value)}")
        if not isinstance(self.lr, float):
            raise ValueError(f"lr: expected a float, got {type(self.lr).__name__}")

    def pixels(self) -> Tensor:
        """The images as pixels clamped to ``[0, 1]``, ``[N, C, H, W]``."""
        if self.zca is not None:
            return self.zca.inverse(self.images).clamp(0, 1)
        return (self.images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    def normalise(self, images: Tensor, dataset: Dataset) -> Tensor:
        """Takes images of ``dataset``'s space, which is not whitened, to the space of this set."""
        if self.zca is not None:
            return self.zca.to(images.device)(dataset.pixels(images))
        return renormalise(images, (dataset.mean, dataset.std), (self.mean, self.std))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, atomically, with the configuration as JSON in its metadata."""
        tensors = {"images": self.images, "labels": self.labels, "mean": self.mean, "std": self.std}
        tensors["lr"] = torch.tensor(self.lr, dtype=torch.float64)
        if self.zca is not None:
            tensors |= {f"zca_{name}": tensor for name, tensor in self.zca.tensors().items()}
        write_safetensors(path, tensors, "distilled", self.config, label_kind=self.label_kind)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DistilledSet:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, foreign, or lacks a tensor, named with what was expected.
        """
        tensors, header = read_safetensors(path, "distilled")
        missing = {"images", "labels", "lr", "mean", "std"} - tensors.keys()
        if missing:
            raise ValueError(f"{path}: expected images, labels, lr, mean and std; {', '.join(sorted(missing))} missing")
        lr = tensors.pop("lr")
        if lr.numel() != 1:
            raise ValueError(f"{path}: lr: expected one number, got {_describe(lr)}")
        fields = {name: tensors[name] for name in ("images", "labels", "mean", "std")}
        zca = {name.removeprefix("zca_"): tensor for name, tensor in tensors.items() if name.startswith("zca_")}
        try:
            fields["zca"] = ZCA(**zca) if zca else None
            return cls(lr=float(lr), config=header["config"], label_kind=header.get("label_kind", "hard"), **fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def renormalised(self, mean: Tensor, std: Tensor) -> DistilledSet:
        """The same pixels under another mean and deviation, float32 ``[C]`` each; ValueError for a whitened set."""
        if self.zca is not None:
            raise ValueError("zca: expected a set that is not whitened, which no mean and deviation make another of")
        images = renormalise(self.images, (self.mean, self.std), (mean, std))
        return replace(self, images=images, mean=mean, std=std)

    def export(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the set as the method repositories save theirs (MTT, DATM) and DD-Ranking reads it, by ``torch.save``.

        ``images.pt`` holds the images, ``[N, C, H, W]`` in normalised space, ``labels.pt`` the labels and ``lr.pt`` the
        learning rate, a tensor of no dimensions; ``zca.pt`` the whitening of a whitened set. What those files cannot
        say, the mean and deviation of the space, the kind of labels and the configuration, is in ``distilled.json``
        beside them.

        Other code takes the images to be in the space of its own test images: `renormalised` by
        `REPOSITORY_NORMALISATION` makes them so. DD-Ranking's hard labels are the classes in order, an equal number of
        images each, whatever ``labels.pt`` says.

        Args:
            folder: made where it is not there.
            overwrite: take the place of an earlier export.

        Raises:
            FileExistsError: one of the files is there, and ``overwrite`` is not given.
        """
        folder = Path(folder)
        tensors = {"images": self.images, "labels": self.labels, "lr": torch.tensor(self.lr, dtype=torch.float64)}
        about = folder / EXPORT_HEADER
        for path in (about, *(folder / f"{name}.pt" for name in tensors)):
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path}: expected no file there, since nothing said to overwrite it")
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # what describes the tensors is there only while all of them are
        (folder / "zca.pt").unlink(missing_ok=True)
        if self.zca is not None:
            tensors["zca"] = self.zca.tensors()
        for name, content in tensors.items():
            buffer = io.BytesIO()
            torch.save(content if name == "zca" else content.detach().cpu().clone(), buffer)
            write_atomic(folder / f"{name}.pt", buffer.getvalue())
        header = {"mean": self.mean.tolist(), "std": self.std.tolist(), "label_kind": self.label_kind}
        write_atomic(about, (json.dumps(header | {"config": self.config}, indent=2) + "\n").encode())

    @classmethod
    def import_tensors(
        cls,
        folder: str | os.PathLike[str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        lr: float | None = None,
        label_kind: str | None = None,
    ) -> DistilledSet:
        """Reads a folder that `export`, a method repository (MTT, FTD, DATM) or a baseline of DD-Ranking has filled.

        It has ``images.pt``, ``labels.pt`` and possibly ``lr.pt``, or the same with ``_best`` before the dot. They are
        read by ``torch.load(weights_only=True)``, which runs no code. What is given here goes before what the folder
        says.

        Args:
            folder: with the files.
            mean, std: one number per channel, of the space that the images are in; by default from ``distilled.json``.
            lr: learning rate of the students; by default from ``lr.pt``.
            label_kind: "hard", "logits" or "probs"; by default from ``distilled.json``, else "hard" for integers.

        Raises:
            FileNotFoundError: the images or the labels are missing.
            ValueError: a file is truncated or holds something else, named with what was expected; or nothing says what
                the mean and deviation, the learning rate, or the kind of floating-point labels are.
        """
        folder = Path(folder)
        ending = "" if (folder / "images.pt").exists() or not (folder / "images_best.pt").exists() else "_best"
        images, labels = (_read_tensor(folder / f"{name}{ending}.pt") for name in ("images", "labels"))
        header = _read_export_header(folder / EXPORT_HEADER) if not ending else {}
        mean, std = (header.get(key) if given is None else given for key, given in (("mean", mean), ("std", std)))
        if mean is None or std is None:
            raise ValueError(f"mean, std: expected those of the images' normalised space, which {folder} does not say")
        if lr is None:
            rate = folder / f"lr{ending}.pt"
            if not rate.exists():
                raise ValueError(f"lr: expected a learning rate, {rate} is not there")
            tensor = _read_tensor(rate)
            if tensor.numel() != 1:
                raise ValueError(f"{rate}: expected one number, got {_describe(tensor)}")
            lr = float(tensor)
        if label_kind is None:
            label_kind = header.get("label_kind") if labels.is_floating_point() else "hard"
        if label_kind is None:
            raise ValueError(
                f"label_kind: expected 'logits' or 'probs', which {folder} does not say of its soft labels"
            )
        space = (torch.tensor(each, dtype=torch.float32) for each in (mean, std))
        labels = labels.float() if labels.is_floating_point() else labels.long()
        try:
            zca = folder / "zca.pt"
            whitening = ZCA(**torch.load(zca, weights_only=True)) if zca.exists() else None
            return cls(images.float(), labels, float(lr), *space, header.get("config", {}), label_kind, whitening)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


def _read_tensor(path: Path) -> Tensor:
    wanted = "a tensor that torch.save wrote"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted}, found no file")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign stream makes the unpickler raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected {wanted}; the file is truncated or foreign ({reason})") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: expected {wanted}; got a {type(tensor).__name__}")
    return tensor.detach()


def _read_export_header(path: Path) -> dict[str, Any]:
    """What `DistilledSet.export` wrote beside its tensors; nothing where there is no such file."""
    if not path.exists():
        return {}
    try:
        header = json.loads(path.read_text())
        for name in ("mean", "std"):
            header[name] = [float(each) for each in header[name]]
        if not isinstance(header["label_kind"], str) or not isinstance(header["config"], dict):
            raise TypeError("label_kind or config")
    except (KeyError, TypeError, ValueError) as error:
        wanted = "mean, std, label_kind and config as JSON, as DistilledSet.export writes them"
        raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign ({error!r})") from error
    return header


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
