"""How every kernel of this folder is launched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

WARPS = 4  # of a program, unless a launch says otherwise: Triton's default
AMD_WARP = 64  # threads; 32 on some, of which more programs would run


def most_programs(num_warps: int) -> int:
    """Along a grid's first axis, the only one that is used: on NVIDIA the others end at 65,535, AMD counts threads."""
    return (2**32 - 1) // (num_warps * AMD_WARP) if torch.version.hip else 2**31 - 1


def run_programs(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Mapping[str, Any],
    *,
    num_warps: int = WARPS,
    **options: Any,
) -> None:
    """Run ``programs`` programs of a kernel, which tell themselves apart by ``tl.program_id(0)``, on ``device``.

    ``num_warps`` and ``options`` are the compiler's. Raises ``ValueError`` for more programs than a GPU runs.
    """
    most = most_programs(num_warps)
    if programs > most:
        raise ValueError(f"{kernel.fn.__name__}: a GPU runs at most {most} programs at once, this needs {programs}")
    if programs:
        # Triton launches on the current device; its interpreter needs none
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](**arguments, num_warps=num_warps, **options)
