"""Tensors in self-describing safetensors files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill._arguments import no_file
from pydistill._atomic import write_atomic

__all__ = ["read_safetensors", "write_safetensors"]


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], kind: str, config: dict[str, Any], **more: Any
) -> None:
    """Writes tensors to a safetensors file, atomically, with a JSON object under ``pydistill`` in its metadata.

    The object has ``kind``, ``version``, ``config``, what ``more`` adds, and ``crc32`` of all that and of the tensors,
    for which safetensors itself has no checksum. Equal content gives equal bytes.
    """
    from safetensors.torch import save  # here, so that all but files works where only torch and NumPy are

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors writes several in an order that differs between processes.
    about = {"kind": kind, "version": 1, "config": config, **more}
    header = {"pydistill": json.dumps(about | {"crc32": _crc32(about, content)})}
    write_atomic(path, save(content, header))


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_safetensors` wrote: the tensors, and the object with the configuration under ``config``.

    A file without a checksum, as written by earlier versions, is read as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, is not a safetensors file, or is marked as something other than
            ``kind``.
    """
    from safetensors import SafetensorError, safe_open

    path, wanted = Path(path), f"a pydistill file of kind {kind!r}, version 1"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {wanted}, {no_file(path, f'{kind}.safetensors')}")
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
    checksum = header.pop("crc32", None)
    if checksum is not None and checksum != (got := _crc32(header, tensors)):
        raise ValueError(f"{path}: expected {wanted}; it is damaged: expected crc32 {checksum}, got {got}")
    return tensors, header


def _crc32(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    checksum = zlib.crc32(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
