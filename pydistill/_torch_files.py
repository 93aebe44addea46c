"""Files written by ``torch.save`` elsewhere: checked before they are trusted, and read without running code.

``torch.load`` ignores the checksums in its archives, and reads a flipped bit as another number; here they are verified
first. Files without checksums (those of torch before 1.6, which are not archives, and those written after
``torch.serialization.set_crc32_options(False)``) are read as they are.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import threading
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydistill._arguments import no_file

__all__ = ["read_state_dict", "read_torch"]

_ARCHIVE = b"PK\3\4"
_AT_ONCE = 1 << 20  # bytes of a member in memory while its checksum is computed
_STATE_KEYS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
_PREFIXES = ("module.", "model.", "net.", "network.")
_MODULES = {"numpy": ("numpy.core.multiarray", "numpy._core.multiarray"), "pathlib": ("pathlib", "pathlib._local")}


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    return {}


def _harmless() -> list[Any]:
    """What checkpoints hold besides tensors, for `torch.serialization.safe_globals`: values, nothing that runs code.

    Of NumPy's types only those of numbers, whose pickled form cannot describe its own layout. A path becomes a pure
    one, which touches no disk and may be of either system; a defaultdict a dict.
    """
    rebuild: list[Any] = [np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]  # functions of NumPy's
    numbers = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
    found: list[Any] = [argparse.Namespace, types.SimpleNamespace, np.ndarray, np.dtype]
    found += {type(np.dtype(code)) for code in numbers}
    found += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    found += [(_plain_dict, "collections.defaultdict")]
    found += [(each, f"builtins.{each.__name__}") for each in (int, float, str, bool, list, dict, tuple)]
    found += [(f, f"{module}.{f.__name__}") for f in rebuild for module in _MODULES["numpy"]]
    paths = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}
    for system, path in paths.items():
        names = (f"{module}.{kind}{system}Path" for module in _MODULES["pathlib"] for kind in ("", "Pure"))
        found += [(path, name) for name in names]
    return found


_HARMLESS = _harmless()
_lock = threading.Lock()  # safe globals are process-wide


def read_torch(path: Path, wanted: str, *, mmap: bool = False, verified: bool = False) -> Any:
    """Reads a file that ``torch.save`` wrote, onto the CPU, by ``torch.load(weights_only=True)``.

    Besides what that admits, ``argparse.Namespace``, NumPy's numbers, arrays and dtypes, paths, dates and defaultdicts
    are read, and what the caller's program passed to ``torch.serialization.add_safe_globals``.

    Args:
        path: the file.
        wanted: what it should hold, for messages.
        mmap: leave the numbers in the file until they are used, if it is an archive.
        verified: whether the file's checksums have already been verified.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, damaged, or asks to import something else, which is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted}, {no_file(path, '')}")
    with path.open("rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE  # torch's own criterion
    if is_archive and not verified:
        try:
            _verify(path)
        except Exception as error:  # a damaged archive makes zipfile raise almost anything
            raise ValueError(f"{path}: expected {wanted}; it is truncated or damaged ({error})") from error
    try:
        with _lock:
            known = set(torch.serialization.get_safe_globals())  # leaving the context would remove these
            with torch.serialization.safe_globals([each for each in _HARMLESS if each not in known]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except Exception as error:  # a foreign stream makes the unpickler raise almost anything
        what = f"it is truncated, damaged or foreign ({_reason(error)})"
        raise ValueError(f"{path}: expected {wanted}; {what}") from error


def read_state_dict(path: Path, wanted: str, key: str | None = None) -> dict[str, Tensor]:
    """Reads a network's state from a checkpoint as written by training scripts.

    It is the whole file, or is under one of the usual keys, those of running averages last, or under ``key``. Prefixes
    of wrappers are removed from the names: "module." (DataParallel, averages), "_orig_mod." (torch.compile), and a
    "model.", "net." or "network." common to all of them.

    Raises:
        FileNotFoundError, ValueError: as for `read_torch`; or it has no state, or not under ``key``, or a number in it
            is not finite; says which.
    """
    content = read_torch(path, wanted)
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{path}: expected {wanted} under {key!r}; got {_described(content)}")
        content = content[key]
    while not _is_state(content):
        inner = next((content[each] for each in _STATE_KEYS if each in content), None) if _is_dict(content) else None
        if inner is None:
            raise ValueError(f"{path}: expected {wanted}: a state_dict; got {_described(content)}")
        content = inner
    state = {name.replace("_orig_mod.", ""): value for name, value in content.items() if name != "n_averaged"}
    while prefix := next((each for each in _PREFIXES if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got some that are not")
    return state


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.file_size]
        if not any(info.CRC for info in members):
            return
        for info in members:
            with archive.open(info) as member:
                while member.read(_AT_ONCE):
                    pass


def _reason(error: Exception) -> str:
    """Torch's message, without its advice to run the file's code."""
    text = str(error)
    name = re.search(r"GLOBAL (\S+)", text)
    if name is not None:
        return f"it asks for {name[1]}, which may run code; torch.serialization.add_safe_globals admits what you trust"
    found = re.search(r"WeightsUnpickler error: (.+)", text)
    return found[1] if found else text.partition("\n")[0] or type(error).__name__


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict) and len(content) > 0


def _is_state(content: Any) -> bool:
    return _is_dict(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _described(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict of {', '.join(map(str, list(content)[:8])) or 'nothing'}"
    return f"a {type(content).__name__}"
