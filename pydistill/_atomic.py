"""Atomic writes: whoever reads, and whatever crashes, finds the old file or the new one whole. Needs no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["put_in_place", "write_atomic"]


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
