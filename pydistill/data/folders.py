"""Pictures in folders, one for each class."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pydistill.data.pictures import EXTENSIONS
from pydistill.data.sources import Names, PictureSource

__all__ = ["FolderImages", "folder_splits"]

_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: a line for each picture in val/images, its class second


class FolderImages(PictureSource):
    """The pictures in a folder that has one for each class, found and ordered as torchvision's ``ImageFolder`` does.

    Args:
        folder: its subfolders are the classes, in order of their names; pictures may lie deeper.
        size: height and width in pixels to which pictures are resized and cropped.

    Raises:
        ValueError: there are no folders of classes, one is without pictures, or a link in it leads back; it is named.
    """

    def __init__(self, folder: Path, size: int):
        super().__init__(size)
        self.folder = folder
        self.class_names = _classes(folder)
        if not self.class_names:
            loose = sum(each.name.lower().endswith(EXTENSIONS) for each in os.scandir(folder))
            wanted = f"a folder of pictures for each class: {folder.name}/<class>/*"
            raise ValueError(
                f"{folder}: expected {wanted}; got none, and {loose} pictures: sort them into such folders"
            )
        self._names = Names(self._walk(labels := array("q")))
        self.labels = torch.from_numpy(np.frombuffer(labels, np.int64))
        counts = self.labels.bincount(minlength=len(self.class_names)).tolist()
        if empty := [name for name, count in zip(self.class_names, counts, strict=True) if not count]:
            wanted = f"pictures ({', '.join(EXTENSIONS)}) in the folder of each class"
            raise ValueError(f"{folder}: expected {wanted}, got none in {_some(empty)}: add some, or remove it")

    @classmethod
    def annotated(cls, folder: Path, class_names: Sequence[str], size: int) -> FolderImages:
        """The pictures in ``folder / "images"`` whose classes a file beside it lists, as in Tiny-ImageNet's val.

        Raises:
            ValueError: a line has no class of ``class_names``.
        """
        source = cls.__new__(cls)
        PictureSource.__init__(source, size)
        source.folder, source.class_names = folder, tuple(class_names)
        numbers, names, labels = {name: label for label, name in enumerate(class_names)}, [], []
        for number, line in enumerate((folder / _ANNOTATIONS).read_text().splitlines(), 1):
            name, _, rest = line.partition("\t")
            if (found := rest.split("\t")[0]) not in numbers:
                wanted = f"a picture and its class, one of train's {len(class_names)}, separated by a tab"
                raise ValueError(f"{folder / _ANNOTATIONS}: line {number}: expected {wanted}; got {line[:80]!r}")
            names.append(os.path.join("images", name))
            labels.append(numbers[found])
        source._names, source.labels = Names(names), torch.tensor(labels, dtype=torch.int64, device="cpu")
        return source

    def _walk(self, labels: array[int]) -> Iterator[str]:
        """The names of all pictures, one class at a time; adds to ``labels``."""
        for label, name in enumerate(self.class_names):
            for parent, files in sorted(_below(self.folder / name)):
                inside = os.path.relpath(parent, self.folder)
                for file in sorted(files):
                    if file.lower().endswith(EXTENSIONS):
                        labels.append(label)
                        yield os.path.join(inside, file)

    def crc32(self) -> int:
        return zlib.crc32(self._names.crc32().to_bytes(4, "little"), super().crc32())

    def name(self, index: int) -> str:
        return self._encoded(index)

    def _encoded(self, index: int) -> str:
        return os.path.join(self.folder, self._names[index])


def folder_splits(root: Path, size: int) -> tuple[FolderImages, FolderImages]:
    """The training and test pictures below a folder: ``train`` with ``test`` or ``val``, or Tiny-ImageNet unzipped.

    A ``test`` without any of the classes, like ImageNet's of pictures whose classes are secret, is passed over for
    ``val``.

    Raises:
        FileNotFoundError: ``train`` is not there, or neither ``test`` nor ``val``.
        ValueError: as for `FolderImages`; or training and test have different classes, which are named.
    """
    others = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not others:
        there = [name for name in ("train", "test", "val") if (root / name).is_dir()]
        wanted = "train/<class>/* and test/<class>/* (or val)"
        raise FileNotFoundError(f"root: expected {wanted} in {root}, got {' and '.join(there) or 'none of them'}")
    if (root / "val" / _ANNOTATIONS).is_file():
        train = FolderImages(root / "train", size)
        return train, FolderImages.annotated(root / "val", train.class_names, size)
    classes = set(_classes(root / "train"))
    held_out = next((folder for folder in others if classes & set(_classes(folder))), others[-1])
    train, test = FolderImages(root / "train", size), FolderImages(held_out, size)
    if train.class_names != test.class_names:
        sides = ("train", set(train.class_names)), (held_out.name, set(test.class_names))
        only = [
            f"{_some(sorted(mine - theirs))} only in {name}"
            for (name, mine), (_, theirs) in (sides, sides[::-1])
            if mine - theirs
        ]
        raise ValueError(f"root: expected the same classes in train and {held_out.name} of {root}, {'; '.join(only)}")
    return train, test


def _below(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from one on, and its files. Links are followed; ValueError for one that leads back, without end."""
    for parent, inside, files in os.walk(folder, followlinks=True):
        for link in (Path(parent, name) for name in inside if os.path.islink(os.path.join(parent, name))):
            if link.resolve() in [above.resolve() for above in link.parents]:
                raise ValueError(f"{link}: expected a link to other folders, it leads back to one that it is in")
        yield parent, files


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


def _some(names: Sequence[str]) -> str:
    """Names for a message, the first five."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
