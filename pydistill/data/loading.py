"""Data sets read whole from the files in which they are distributed."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pydistill._arguments import check_choice, check_whole
from pydistill.data.cifar import cifar10, cifar100
from pydistill.data.dataset import Dataset, StreamedDataset, normalised_dataset
from pydistill.data.folders import folder_splits
from pydistill.data.packed import PackedImages
from pydistill.data.shards import shard_splits
from pydistill.data.sources import ArrayImages, ImageSource
from pydistill.data.streamed import StreamedImages, held, mean_and_std

__all__ = ["DATASETS", "PICTURES", "in_memory", "load", "open_sources", "stream"]

PICTURES = {"image-folder": 32, "tiny-imagenet": 64, "imagenet-1k": 224}  # sets of pictures, and their usual size
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", *PICTURES)
FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_MNIST_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load(name: str, root: str | os.PathLike[str] | None = None, *, image_size: int | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: ``"digits"`` (scikit-learn's 8x8 digits, enlarged bilinearly to 16x16; every fifth image of each class is
            a test image), ``"fashion-mnist"`` (the four IDX files, gzipped or not), ``"cifar10"`` and ``"cifar100"``
            (the python batches), or a set of pictures: ``"image-folder"``, ``"tiny-imagenet"`` or ``"imagenet-1k"``
            (``root/train/<class>/*`` and ``root/test`` or ``root/val``, by the rules of torchvision's ``ImageFolder``;
            Tiny-ImageNet as it is unzipped; WebDataset's tar shards; or the parquet and arrow files of the Hugging Face
            hub. `read_picture` says what becomes of a picture).
        root: the folder with the files, or a file that `pack` made of them. For Fashion-MNIST the default is where
            Debian's package puts it; digits take none; the others need one.
        image_size: height and width in pixels to which pictures are resized and cropped (default 32 for image folders,
            64 and 224 for the two ImageNets), or to which the digits are enlarged (default 16); the other sets have a
            fixed size.

    Raises:
        ValueError: an unknown name, an argument that the set does not take, or a truncated or foreign file; says
            which and what was expected.
        FileNotFoundError: a missing folder or file.
        RuntimeError: scikit-learn (digits) or Pillow (image folder) is not installed.
    """
    check_choice("name", name, DATASETS)
    if name != "digits":
        return in_memory(name, open_sources(name, root, image_size=image_size))
    _check_size(image_size)
    if root is not None:
        raise ValueError(f"root: expected none, digits come with scikit-learn, got {str(root)!r}")
    return _load_digits(image_size or 16)


def open_sources(
    name: str, root: str | os.PathLike[str] | None = None, *, image_size: int | None = None
) -> tuple[ImageSource, ImageSource]:
    """The training and test images of a set, without reading pictures.

    Args:
        name: as for `load`, but for digits, which are not 8-bit images.
        root: as for `load`.
        image_size: height and width in pixels of pictures.

    Raises:
        ValueError, FileNotFoundError: as for `load`.
    """
    check_choice("name", name, DATASETS[1:])
    _check_size(image_size)
    if root is None and name != "fashion-mnist":
        raise ValueError(f"root: expected the folder that holds the files of {name}, got None")
    folder = Path(root) if root is not None else FASHION_MNIST_ROOT
    if folder.is_file():
        return _open_packed(name, folder, image_size)
    if image_size is not None and name not in PICTURES:
        raise ValueError(f"image_size: expected none, {name} has a size of its own, got {image_size}")
    if not folder.is_dir():
        raise FileNotFoundError(f"root: expected the folder that holds the files of {name}, found none at {folder}")
    if name in PICTURES:
        size = image_size or PICTURES[name]
        return shard_splits(folder, size) or folder_splits(folder, size)
    return {"fashion-mnist": _fashion_mnist, "cifar10": cifar10, "cifar100": cifar100}[name](folder)


def in_memory(name: str, sources: tuple[ImageSource, ImageSource]) -> Dataset:
    """The whole training and test images as a data set."""
    train, test = ((_as_pixels(source, name in PICTURES), source.labels) for source in sources)
    return normalised_dataset(name, train, test, sources[0].class_names)


def stream(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    workers: int = 0,
    space: tuple[Tensor, Tensor] | None = None,
) -> StreamedDataset:
    """The data set that `load` gives, whose images are read on demand: its memory does not depend on their number.

    Args:
        name, root, image_size: as for `open_sources`.
        workers: processes that decode; see `StreamedImages`.
        space: mean and deviation to normalise by, float32 ``[C]`` each; by default those of the training images, for
            which a set that is not packed is read once.

    Raises:
        ValueError, FileNotFoundError: as for `load`; a damaged picture only when it is read.
    """
    train, test = open_sources(name, root, image_size=image_size)
    if space is None:
        train = held(train, workers)
        space = mean_and_std(train, workers)
    images = [StreamedImages(source, *space, workers=workers) for source in (train, test)]
    return StreamedDataset(name, images[0], train.labels, images[1], test.labels, train.class_names, *space)  # type: ignore[arg-type]


def _as_pixels(source: ImageSource, are_pictures: bool) -> Tensor:
    """All images of a source, float32 in [0, 1]."""
    images = torch.empty((len(source), *source.shape), dtype=torch.float32, device="cpu")
    for index in torch.arange(len(source), device="cpu").split(256):
        images[index] = torch.from_numpy(source.read(index)).float()
    return images.mul_(1 / 255) if are_pictures else images.div_(255)  # as they have been made so far, to the bit


def _open_packed(name: str, path: Path, image_size: int | None) -> tuple[ImageSource, ImageSource]:
    packed = PackedImages(path)
    if packed.name != name and not {packed.name, name} <= PICTURES.keys():
        raise ValueError(f"{path}: expected a packed {name}, got a packed {packed.name}")
    if image_size not in (None, packed.shape[1]):
        raise ValueError(f"image_size: expected {packed.shape[1]}, to which {path} was packed, got {image_size}")
    return packed.train, packed.test


def _check_size(image_size: int | None) -> None:
    if image_size is not None:
        check_whole("image_size", image_size, 1)


def _load_digits(image_size: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("digits need scikit-learn, which is not installed: pip install 'pydistill[demo]'") from error
    raw = load_digits()
    images = torch.from_numpy(np.ascontiguousarray(raw.images, dtype=np.float32))[:, None] / 16  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(np.ascontiguousarray(raw.target, dtype=np.int64))
    is_test = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(10):
        is_test[(labels == label).nonzero()[::5, 0]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return normalised_dataset("digits", train, test, [str(digit) for digit in range(10)])


def _fashion_mnist(folder: Path) -> tuple[ArrayImages, ArrayImages]:
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
        images = torch.from_numpy(pixels)[:, None]
        parts.append(ArrayImages(images, torch.from_numpy(labels.astype(np.int64)), FASHION_MNIST_CLASSES))
    return parts[0], parts[1]


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
    return np.frombuffer(bytearray(raw), np.uint8, offset=header).reshape(shape)  # writable, as torch wants it
