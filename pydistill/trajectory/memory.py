"""How many of an unroll's steps keep what its backward pass needs, and the memory for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pydistill._arguments import check_whole

AUTO = 256 << 20  # bytes of kept steps that memory="auto" allows on the CPU


@dataclass(eq=False)
class KeptSteps:
    """How many of an unroll's last steps keep what the backward pass would otherwise compute again.

    Given as ``memory`` to several `pydistill.unroll`: the first decides, as by "auto"; all later ones keep as many,
    however much memory is free then.
    """

    number: int | None = None  # None: not decided yet

    def __post_init__(self) -> None:
        if self.number is not None:
            check_whole("number", self.number, 0)


Memory = Literal["auto"] | int | KeptSteps


def room_for_steps(memory: Memory, device: torch.device, least: int, advice: str = "") -> int:
    """Bytes that kept steps may take; ``least``: what the unroll takes without any, in which "auto" is not.

    Raises:
        ValueError: ``memory`` is less than that.
    """
    if isinstance(memory, int):
        if memory < least:
            raise ValueError(f"memory: expected at least {least} bytes for this unroll, got {memory}{advice}")
        return memory - least
    if device.type != "cuda":
        return AUTO
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch
    return (torch.cuda.mem_get_info(device)[0] + unused) // 4
