"""Pictures in shards: WebDataset's tar files, and the parquet and arrow files of the Hugging Face hub.

Tars are read by Python's tarfile and not by webdataset, which gives its samples in one order only, and has no way to
the pictures of a class. Parquet and arrow files are read by pyarrow, which is there where datasets is.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydistill.data.pictures import EXTENSIONS
from pydistill.data.sources import Names, PictureSource

__all__ = ["ArrowImages", "TarImages", "shard_splits"]

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # of a member's name, as webdataset splits it
_SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|test)(?=[^a-z]|$)")
_IMAGES, _LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")  # names of columns


class TarImages(PictureSource):
    """The pictures in WebDataset's shards: members ``KEY.jpg`` (or another picture) and ``KEY.cls``, or a ``KEY.json``
    with ``label``.

    The headers of all members are read at once; a picture is then read from its place alone.

    Args:
        paths: the shards.
        size: height and width in pixels to which pictures are resized and cropped.

    Raises:
        ValueError: a shard ends within a record, is no tar file, or has a picture without a label; it is named.
    """

    def __init__(self, paths: Sequence[Path], size: int):
        super().__init__(size)
        self.paths = tuple(paths)
        places, labels, names = array("q"), array("q"), []
        for number, path in enumerate(self.paths):
            for key, (place, label) in _samples(path).items():
                if place is None or label is None:
                    there, missing = ("a picture", "label") if label is None else ("a label", "picture")
                    raise ValueError(
                        f"{path}: {key}: expected a picture and its .cls or .json; got {there}, no {missing}"
                    )
                places.extend((number, *place))
                labels.append(label)
                names.append(key)
        self._places = torch.tensor(places, dtype=torch.int64, device="cpu").view(-1, 3)  # shard, offset, length
        self.labels, self._names = torch.tensor(labels, dtype=torch.int64, device="cpu"), Names(names)
        self.class_names = _numbered(self, None)

    def crc32(self) -> int:
        return zlib.crc32(self._names.crc32().to_bytes(4, "little"), super().crc32())

    def name(self, index: int) -> str:
        return f"{self.paths[int(self._places[index, 0])]}: {self._names[index]}"

    def _encoded(self, index: int) -> bytes:
        shard, offset, length = self._places[index].tolist()
        with self.paths[shard].open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length)


def _samples(path: Path) -> dict[str, list[Any]]:
    """The place (offset, length) of the picture and the label of each key; None for what is missing."""
    found: dict[str, list[Any]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # the list of all members that it keeps
                match = _KEY.fullmatch(member.name)
                if not member.isfile() or match is None:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                key, ending = match[1], match[2].lower()
                if f".{ending}" in (*EXTENSIONS, ".gif"):
                    found.setdefault(key, [None, None])[0] = member.offset_data, member.size
                elif ending in ("cls", "json"):
                    file.seek(member.offset_data)
                    label = _label(file.read(member.size), ending)
                    if label is not None:
                        found.setdefault(key, [None, None])[1] = label
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, EOFError) as error:
        wanted = "a whole tar file of WebDataset"
        raise ValueError(f"{path}: expected {wanted}; it ends within a record or is foreign ({error})") from error
    return found


def _label(content: bytes, ending: str) -> int | None:
    try:
        label = int(content) if ending == "cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return None
    return label if isinstance(label, int) else None


class ArrowImages(PictureSource):
    """The pictures in parquet or arrow files as the Hugging Face hub has them: columns ``image`` and ``label``.

    Parquet is read by row groups, of 100 pictures or so: a pass in order reads each once, one in random order a whole
    group for every picture. `pack` such a set before it is trained on.

    Args:
        paths: the files, all of one kind.
        size: height and width in pixels to which pictures are resized and cropped.

    Raises:
        ValueError: a file is truncated or foreign, lacks a column, or has pictures without labels; it is named.
        RuntimeError: pyarrow is not installed.
    """

    def __init__(self, paths: Sequence[Path], size: int):
        super().__init__(size)
        self.paths = tuple(paths)
        labels: list[np.ndarray] = []
        starts, names, before = [], None, 0
        for number, path in enumerate(self.paths):
            file = self._open(number)
            columns = file.schema.names
            self._image, self._label = (next((c for c in some if c in columns), "") for some in (_IMAGES, _LABELS))
            if not self._image or not self._label:
                wanted = f"columns of pictures ({', '.join(_IMAGES)}) and labels ({', '.join(_LABELS)})"
                raise ValueError(f"{path}: expected {wanted}, got {', '.join(columns)}")
            found = np.concatenate([file.read(group, self._label).to_numpy() for group in range(len(file.rows))])
            if not np.issubdtype(found.dtype, np.integer) or (len(found) and found.min() < 0):
                got = f"{found.dtype}" if not np.issubdtype(found.dtype, np.integer) else f"{found.min()}"
                raise ValueError(f"{path}: {self._label}: expected classes from 0 on, got {got}")
            starts += [(before + start, number, group) for group, start in enumerate(np.cumsum([0, *file.rows[:-1]]))]
            labels.append(found.astype(np.int64))
            before += len(found)
            names = names or _class_names(file.schema, self._label)
        self._groups = np.array(starts, np.int64)  # first picture, file and group, of each group
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.class_names = _numbered(self, names)

    def name(self, index: int) -> str:
        start, number, group = self._groups[self._group_of(index)].tolist()
        return f"{self.paths[number]}: picture {index - start} of group {group}"

    def _group_of(self, index: int | np.ndarray) -> Any:
        return np.searchsorted(self._groups[:, 0], index, side="right") - 1

    def _order(self, indices: np.ndarray) -> np.ndarray:
        return np.argsort(self._group_of(indices), kind="stable")

    def _encoded(self, index: int) -> bytes:
        found = int(self._group_of(index))
        kept = self.__dict__.get("_column")
        if kept is None or kept[:2] != (os.getpid(), found):
            _, number, group = self._groups[found].tolist()
            kept = self.__dict__["_column"] = os.getpid(), found, self._open(number).read(group, self._image)
        value = kept[2][index - int(self._groups[found, 0])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"{self.name(index)}: expected the bytes of a picture, got {type(content).__name__}")
        return content

    def _open(self, number: int) -> _ArrowFile:
        """A file, opened by this process; the last one stays open."""
        kept = self.__dict__.get("_last")
        if kept is None or kept[:2] != (os.getpid(), number):
            kept = self.__dict__["_last"] = (os.getpid(), number, _ArrowFile(self.paths[number]))
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_column")}


class _ArrowFile:
    """A parquet file, or an arrow file of either kind: the rows of each group, and a column of a group."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise RuntimeError(
                "parquet and arrow files need pyarrow, which is not installed: pip install pyarrow"
            ) from error
        try:
            if path.suffix == ".parquet":
                file = parquet.ParquetFile(path)
                self.schema = file.schema_arrow
                self.rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self._read: Callable[[int, str], Any] = lambda group, name: file.read_row_group(
                    group, [name], use_threads=False
                ).column(name)
            else:
                mapped = pyarrow.memory_map(str(path))
                magic = mapped.read(6)
                mapped.seek(0)
                reader = pyarrow.ipc.open_file(mapped) if magic == b"ARROW1" else pyarrow.ipc.open_stream(mapped)
                table = reader.read_all()
                self.schema, self.rows = table.schema, [len(table)]
                self._read = lambda group, name: table.column(name)
        except (pyarrow.ArrowException, OSError) as error:
            wanted = "a whole parquet or arrow file of the Hugging Face hub"
            raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign ({error})") from error

    def read(self, group: int, name: str) -> Any:
        return self._read(group, name)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """The names that datasets keeps with a column of classes."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _numbered(source: PictureSource, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of a source's classes, or their numbers."""
    count = int(source.labels.max()) + 1 if len(source) else 0
    return tuple(names) if names is not None and len(names) >= count else tuple(map(str, range(count)))


def shard_splits(root: Path, size: int) -> tuple[PictureSource, PictureSource] | None:
    """The training and test pictures of the shards in a folder, in its ``data``, or in folders named like a split.

    A shard's name, or that of its folder, has ``train``, or ``val``, ``valid``, ``validation`` or ``test`` in it; of
    these the validation shards are taken where there are any.

    Returns:
        None if there are no shards.

    Raises:
        FileNotFoundError: there are no shards of training, or none to test with.
        ValueError: as for `TarImages` and `ArrowImages`; or classes are on one side only.
    """
    folders = [root, *(root / name for name in ("data", "train", "validation", "valid", "val", "test"))]
    files = sorted(
        Path(entry) for folder in folders if folder.is_dir() for entry in os.scandir(folder) if entry.is_file()
    )
    kinds: tuple[tuple[str, type[TarImages] | type[ArrowImages]], ...]
    kinds = ((".tar", TarImages), (".parquet", ArrowImages), (".arrow", ArrowImages))
    for ending, kind in kinds:
        shards: dict[str, list[Path]] = {}
        for path in files:
            if path.suffix == ending and (
                found := _SPLIT.findall(path.name.lower()) or _SPLIT.findall(path.parent.name)
            ):
                shards.setdefault("val" if found[-1].startswith("val") else found[-1], []).append(path)
        if not shards:
            continue
        held_out = shards.get("val") or shards.get("test")
        if "train" not in shards or held_out is None:
            wanted = f"shards *train*{ending} and *val*{ending} (or *test*)"
            raise FileNotFoundError(f"root: expected {wanted} in {root}, got those of {' and '.join(shards)} only")
        train, test = kind(shards["train"], size), kind(held_out, size)
        for there, missing, where in ((train, test, held_out), (test, train, shards["train"])):
            if only := sorted(set(there.labels.tolist()) - set(missing.labels.tolist())):
                more = f" and {len(only) - 5} more" if len(only) > 5 else ""
                classes = f"{', '.join(map(str, only[:5]))}{more}"
                raise ValueError(f"root: expected the same classes in all of {root}; {classes} not in {where[0]} ...")
        test.class_names = train.class_names
        return train, test
    return None
