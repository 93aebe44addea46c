"""Tensors in safetensors files that say what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pydistill._atomic import write_atomic

__all__ = ["read_safetensors", "write_safetensors"]


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], kind: str, config: dict[str, Any], **more: Any
) -> None:
    """Writes tensors to a safetensors file, atomically, with a JSON object under ``pydistill`` in its metadata.

    The object has ``kind``, ``version``, ``config`` and what ``more`` adds. Equal content gives equal bytes.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors puts several in an order that changes from process to process.
    header = {"pydistill": json.dumps({"kind": kind, "version": 1, "config": config, **more})}
    write_atomic(path, safetensors_bytes(content, header))


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_safetensors` wrote: the tensors, and the object with the configuration under ``config``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not a safetensors file, or is marked as something else than ``kind``.
    """
    path, wanted = Path(path), f"a pydistill file of kind {kind!r}, version 1"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted}, found no file")
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected {wanted}; it is truncated or no safetensors file ({error})") from error
    try:
        header = json.loads(entries["pydistill"])
        found, version, config = header["kind"], header["version"], header["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected {wanted}; its metadata lacks that ({error!r})") from error
    if (found, version) != (kind, 1) or not isinstance(config, dict):
        raise ValueError(f"{path}: expected {wanted}; got {found!r}, version {version}")
    return tensors, header
