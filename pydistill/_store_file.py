"""Files of a fixed size that are written in place and read on demand. Needs no torch: workers import it.

All kinds start alike, with little-endian integers, and are sparse until they are written to::

    prefix    magic, version, length and crc32 of the header
    header    JSON; "flags", if any, name features that a reader must know
    ...       laid out by the kind

They are read through a memory map, of which only copies are handed out. If a file becomes shorter while it is read,
as when another is copied over it, touching the map kills the process (SIGBUS); so the file's size is checked before
each read, and a proper error raised. A file truncated during a read, between that check and the end of the copy, is
not caught.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pydistill._arguments import no_file
from pydistill._atomic import PathLike, replacing, sync

__all__ = ["StoreFile", "check_of", "round_up"]

_PREFIX = struct.Struct("<8sIII")
_File = TypeVar("_File", bound="StoreFile")


class StoreFile:
    """A file of some kind. The kind is a subclass, which sets the names below, defines `_layout` and extends `_open`.

    Attributes:
        path: the file.
        header: the content of its header.
        version: of the file.
    """

    _kind: str  # with its article
    _magic: bytes  # 8 of them
    _version: int  # that is written
    _oldest = 1  # that can be read
    _flags: frozenset[str] = frozenset()  # that are known
    _fields: Mapping[str, Callable[[Any], bool]]  # a check for each field of the header
    _size: int  # of the file in bytes; set by `_layout`
    _fixed_at: int  # offset of what a kind writes only once; set by `_layout`
    _bytes: np.ndarray | None = None  # the whole file, uint8: its map, freed with the last reference to it

    path: Path
    header: dict[str, Any]
    version: int

    def __init__(self, path: PathLike, *, writable: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            name = f"{self._kind.split()[1]}s.store"  # as runs call it
            raise FileNotFoundError(f"{self.path}: expected {self._kind}, {no_file(self.path, name)}")
        self._file = self.path.open("r+b" if writable else "rb")
        self._writable = writable
        try:
            if writable:
                self._lock()
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Checks prefix, header and size, and maps the file."""
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(_PREFIX.size)
        magic, version, length, checksum = _PREFIX.unpack(prefix.ljust(_PREFIX.size, b"\0"))
        if magic != self._magic:
            got = f"{size} bytes that start with {prefix[:8].hex(' ') or 'nothing'}"
            raise ValueError(f"{self.path}: expected {self._kind}, which starts with {self._magic.hex(' ')}; got {got}")
        if not self._oldest <= version <= self._version:
            known = " or ".join(map(str, range(self._oldest, self._version + 1)))
            newer = ", which a newer pydistill reads" if version > self._version else ""
            raise ValueError(f"{self.path}: expected {self._kind} of version {known}, got {version}{newer}")
        text = self._file.read(min(length, size))
        if len(text) != length:
            raise ValueError(f"{self.path}: expected a header of {length} bytes, it is truncated to {len(text)}")
        if zlib.crc32(text) != checksum:
            raise ValueError(f"{self.path}: its header is damaged: expected crc32 {checksum}, got {zlib.crc32(text)}")
        self.version, self.header = version, self._current(json.loads(text), version)
        if unknown := [flag for flag in self.header.get("flags", []) if flag not in self._flags]:
            raise ValueError(f"{self.path}: has {', '.join(map(repr, unknown))}, which a newer pydistill reads")
        for name, is_right in self._fields.items():
            if not is_right(self.header.get(name, ...)):
                raise ValueError(f"{self.path}: its header has no right {name}, got {self.header.get(name)!r}")
        self._layout(_PREFIX.size + length)
        if size != self._size:
            what = "truncated" if size < self._size else "longer than it says"
            raise ValueError(f"{self.path}: expected {self._size} bytes as its header says, it is {what}: {size}")
        self._bytes = np.ndarray(size, np.uint8, mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ))

    def _current(self, header: dict[str, Any], version: int) -> dict[str, Any]:
        """The header of a file of some version, converted to the newest."""
        return header

    def _layout(self, start: int) -> None:
        """Computes `_size` and all offsets from the header; the data after it begins at ``start``."""
        raise NotImplementedError

    @classmethod
    def _make(cls, path: Path, header: dict[str, Any], fixed: bytes = b"") -> None:
        """Makes an empty file, atomically, replacing an existing one; ``fixed`` goes to `_fixed_at`."""
        text = json.dumps(header, allow_nan=False).encode()
        sizes = cls.__new__(cls)
        sizes.version, sizes.header = cls._version, header
        sizes._layout(_PREFIX.size + len(text))
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(_PREFIX.pack(cls._magic, cls._version, len(text), zlib.crc32(text)) + text)
            if fixed:
                file.seek(sizes._fixed_at)
                file.write(fixed)
            file.truncate(sizes._size)
            sync(file)

    def close(self) -> None:
        """Closes the file, which cannot be read afterwards; a second call does nothing."""
        self._bytes = None
        self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._writable:
            raise ValueError(f"{self.path}: a store that is open for writing stays in its process: open it again")
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        StoreFile.__init__(self, state["path"])

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, at: int, count: int) -> np.ndarray:
        """Bytes of the file, uint8, a copy; ValueError if it has become too short."""
        self._check_open()
        self._check_reaches(at + count)
        assert self._bytes is not None
        return self._bytes[at : at + count].copy()

    def _check_reaches(self, stop: int) -> None:
        """ValueError if the file has become shorter than ``stop``; call it before touching anything up to there."""
        size = os.fstat(self._file.fileno()).st_size
        if size < stop:
            raise ValueError(f"{self.path}: expected {self._size} bytes as it had, it was cut to {size} since")

    def _write(self, at: int, data: bytes | np.ndarray) -> None:
        self._file.seek(at)
        self._file.write(data if isinstance(data, bytes) else data.data)

    def _sync(self) -> None:
        sync(self._file)

    def _lock(self) -> None:
        """Locks the file until it is closed or the process dies."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: expected a store that nobody writes to, another process does") from error

    def _check_open(self) -> None:
        if self._bytes is None:
            raise ValueError(f"{self.path}: the store is closed")

    def _check_writable(self) -> None:
        if not self._writable:
            raise ValueError(f"{self.path}: the store is open for reading only")


def check_of(entries: np.ndarray) -> np.ndarray:
    """The required last field of table entries, which tells them from missing or half-written ones."""
    names = entries.dtype.names
    assert names is not None
    return ~np.bitwise_xor.reduce([entries[name] for name in names[:-1]])


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
