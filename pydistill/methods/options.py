"""What the hyper-parameters of the methods are checked by."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["check_numbers"]


def check_numbers(options: Any, *, flags: bool = False, **least: float) -> None:
    """ValueError for a field below its least value or not finite; a least value of 0.0 asks for a positive number.

    Args:
        options: has the fields.
        flags: name a field in the message as the command line does.
        least: by field; an int is the least value itself.
    """
    for name, low in least.items():
        value = getattr(options, name)
        positive = isinstance(low, float)
        if not (low < value if positive else low <= value) or not value < math.inf:
            shown = f"--{name.replace('_', '-')}" if flags else name
            number = "" if isinstance(value, int) else "a finite number of "
            wanted = "a positive finite number" if positive else f"{number}at least {low}"
            raise ValueError(f"{shown}: expected {wanted}, got {value}")
