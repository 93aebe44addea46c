"""Atomic writes: a reader, or a crash, finds either the old file or the complete new one. Needs no torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["PathLike", "check_replaceable", "naming", "put_in_place", "replacing", "sync", "write_atomic"]

PathLike = str | os.PathLike[str]


def write_atomic(path: PathLike, data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a reader, or a crash at any moment, finds the old or the complete new file.

    The bytes go to a temporary file in the same folder, which is synced to disk and renamed to ``path``.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            sync(file)
        # mkstemp makes files private; a result should be as readable as any other file of this user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        put_in_place(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Adds the name of ``path`` to a system error that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def replacing(path: Path, ending: str = "partial") -> Iterator[Path]:
    """Yields a file name for the block to write and sync, which then replaces ``path`` unless the block raises.

    The name is the same for all attempts, so that killed ones leave one file at most.
    """
    partial = path.with_name(f".{path.name}.{ending}")
    try:
        with naming(path):
            yield partial
            put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(source: Path, target: Path) -> None:
    """Renames a synced file to replace another in the same folder; durable when it returns."""
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(file: IO[bytes]) -> None:
    """Flushes what was written to ``file`` to disk."""
    file.flush()
    os.fsync(file.fileno())


def check_replaceable(path: Path, overwrite: bool) -> None:
    """FileExistsError for a file at ``path``, unless ``overwrite``, and for a folder."""
    if overwrite and path.is_dir():
        raise FileExistsError(f"{path}: expected a file to make or to replace, it is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: it exists already, and is replaced with overwrite=True only")
