"""Arguments that are one of a few names, a whole number or the path of a file: what is said of any other."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """ValueError, with what the caller may have meant, for a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{argument}: {not_one_of(choices, value)}")


def not_one_of(choices: Collection[str], value: object) -> str:
    """What was expected, what came, and what is most like it."""
    names = [*choices]
    if len(names) > 4:
        expected = f"one of {', '.join(names)}"
    else:
        expected = " or ".join([", ".join(map(repr, names[:-1])), repr(names[-1])] if names[1:] else map(repr, names))
    return f"expected {expected}, got {value!r}{meant(value, names)}"


def meant(value: object, choices: Collection[str]) -> str:
    """``"; did you mean NAME?"`` for the choice most like a value, or nothing if none is like it."""
    plain = {_plain(name): name for name in choices}
    near = difflib.get_close_matches(_plain(value), plain, 1) if isinstance(value, str) else []
    return f"; did you mean {plain[near[0]]}?" if near else ""


def check_whole(argument: str, value: object, least: int | None = None) -> None:
    """TypeError for what is not an int, ValueError for one below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")


def check_image_shape(shape: object) -> None:
    """For ``[B, C, H, W]``, as an argument ``shape``."""
    if not isinstance(shape, Sequence) or len(shape) != 4 or not all(isinstance(size, int) for size in shape):
        got = list(shape) if isinstance(shape, (tuple, list)) else f"a {type(shape).__name__}"
        raise ValueError(f"shape: expected that of images, [B, C, H, W], got {got}")


def no_file(path: Path, name: str) -> str:
    """What is where a file was expected, which is called ``name`` in the folder of a run."""
    if not path.is_dir():
        return "found no file"
    return "found a folder" + (f"; did you mean {path / name}?" if (path / name).is_file() else "")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
