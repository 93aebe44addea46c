"""The folder that a run fills: checked before it is made, written by one process at a time, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from pydistill._atomic import naming
from pydistill.data import write_atomic
from pydistill.methods.method import OptionError

__all__ = ["Folder", "append_line", "as_json", "keep_lines", "kept_lines", "locked", "options_in"]

_LOCK = ".lock"


class Folder:
    """The folder of a run. Making the object writes nothing; the folder's contents are read only while it is `held`.

    Args:
        path: a folder that is new or empty; with ``kept`` that of a run.
        kept: the options of the run that is there, from `options_in`, to continue it.
        resumable: whether the run that is begun can be continued.
        first: whether this process writes; one of torchrun's ranks does.

    Raises:
        ValueError: a folder that is not new or empty, or not a folder.
    """

    def __init__(self, path: Path, kept: dict[str, Any] | None, *, resumable: bool = True, first: bool = True):
        self.path, self.resumable, self.first = path, resumable, first
        self._kept = kept
        if path.exists() and not path.is_dir():
            raise OptionError("out", f"expected a folder, {path} is a file")
        if first and kept is None:
            self._check_empty()

    def _check_empty(self) -> None:
        if self.path.exists() and any(each.name != _LOCK for each in self.path.iterdir()):
            more = "; resume=True goes on with a run" if self.resumable else ""
            raise OptionError("out", f"expected a new or empty folder, {self.path} is not empty{more}")

    def check_same(self, options: dict[str, Any], free: Collection[str] = ()) -> None:
        """ValueError if the run to resume differs from ``options`` in one that is not named in ``free``."""
        if self._kept is None:
            return
        self._refuse_other(self._kept, _plain(options), free)

    def check_given(self, options: dict[str, Any], free: Collection[str] = ()) -> None:
        """`check_same` for the options that the run's folder has by name; first checks which method's run it is."""
        if self._kept is None:
            return
        made = self._kept.get("command", self._kept.get("method"))
        steps = {"squeeze", "recover", "relabel", "post-train"}
        wanted = options["method"] if options["method"] in steps or made not in steps else "recover"
        if made is not None and made != wanted:
            raise OptionError("out", f"expected a run of {wanted} to go on with, {self.path} has one of {made}")
        known = {name: value for name, value in self._kept.items() if name in options and name != "method"}
        given = _plain(options)
        self._refuse_other(known, {name: given[name] for name in known}, free)

    def check_files(self, files: dict[str, Any]) -> None:
        """ValueError for other files than the run's, as far as those are still there: they may have been moved."""
        if self._kept is None:
            return
        for name, now in files.items():
            if name not in self._kept or (before := self._kept[name]) == now:
                continue
            if not all(Path(path).exists() for path in ([before] if isinstance(before, str) else before or ())):
                continue
            raise OptionError(name, f"expected {before} as the run in {self.path} has, got {now}")

    def check_data(self, marks: dict[str, Any] | None) -> None:
        """ValueError for other real images than the run began with, by their `Dataset.marks`."""
        before = None if self._kept is None else self._kept.get("data")
        if not before or marks is None:  # a run of an earlier version
            return
        for part, now in marks.items():
            then = before[part]
            same = all(now[name] == then[name] for name in ("images", "labels_crc32"))
            if not same or any(abs(a - b) > 1e-3 for a, b in zip(now["means"], then["means"], strict=True)):
                wanted = f"the {then['images']} images of {part} that the run in {self.path} began with"
                raise OptionError("root", f"expected {wanted}, got {now['images']} others")

    def _refuse_other(self, kept: dict[str, Any], given: dict[str, Any], free: Collection[str]) -> None:
        for name, (before, now) in _differences(kept, given).items():
            if name not in free:
                raise OptionError(name, f"expected {before} as the run in {self.path} has, got {now}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Locks the folder for this process, which is required before its files are read or written.

        Raises:
            ValueError: another process writes to it, or has filled it in the meantime.
        """
        if not self.first:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / _LOCK, f"expected a folder that no other process writes to, got {self.path}"):
            if self._kept is None:
                self._check_empty()
            yield

    def begin(self, options: dict[str, Any] | None) -> None:
        """Stores ``options`` as the run's, once all checks have passed; removes what killed writers left."""
        if not self.first:
            return
        for left in self.path.rglob(".*.tmp"):
            left.unlink()
        if options is not None:
            write_atomic(self.path / "config.json", as_json(_plain(options)))


def options_in(folder: Path, of: str) -> dict[str, Any]:
    """The options of the run in a folder, as `Folder.begin` stored them.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are truncated or foreign.
    """
    path, wanted = folder / "config.json", f"the options of a run of {of}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted} to go on with, found no file")
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign ({error})") from error
    if not isinstance(kept, dict):
        raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign (got {kept!r})")
    return kept


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options after a round trip through JSON."""
    return json.loads(json.dumps(options))


def _differences(kept: Any, given: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ, by the innermost name."""
    if not isinstance(kept, dict) or not isinstance(given, dict):
        return {} if kept == given else {name: (kept, given)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*given, *(key for key in kept if key not in given)]:
        found |= _differences(kept.get(key), given.get(key), key)
    return found


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock file ``path`` inside the block; it is removed afterwards, and released if the process is killed.

    Raises:
        ValueError: another process holds it; ``refusal`` says what was expected of ``out``.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OptionError("out", f"{refusal}: another does") from None
        except OSError as error:
            warnings.warn(f"{path.parent}: this file system has no locks ({error}): start one run in it", stacklevel=2)
        # its last holder may have removed the file between the two lines above
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def append_line(path: Path, record: dict[str, Any]) -> None:
    with naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def kept_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> bytes:
    """A file of JSON lines, without the records that ``keep`` rejects and without a killed process's partial line."""
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            kept += [line + "\n"] if keep(json.loads(line)) else []
    return "".join(kept).encode()


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Reduces a file of JSON lines, if it exists, to its `kept_lines`."""
    if path.exists():
        write_atomic(path, kept_lines(path, keep))
