"""How every kernel of this folder is launched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

MOST = 2**31 - 1  # programs along a grid's first axis, the only one that is used: the others end at 65,535


def run_programs(
    kernel: Any, programs: int, device: torch.device, arguments: Mapping[str, Any], **options: Any
) -> None:
    """Run ``programs`` programs of a kernel, which tell themselves apart by ``tl.program_id(0)``, on ``device``.

    ``options`` are the compiler's, such as ``num_warps``. Raises ``ValueError`` for more programs than a GPU runs.
    """
    if programs > MOST:
        raise ValueError(f"{kernel.fn.__name__}: a GPU runs at most 2^31 - 1 programs at once, this needs {programs}")
    if programs:
        # Triton launches on the current device; its interpreter needs none
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options)
