"""CIFAR's python batches, which are pickles: read by an unpickler that admits only arrays and ordinary containers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydistill.data.sources import ArrayImages

__all__ = ["cifar10", "cifar100"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(folder: Path) -> tuple[ArrayImages, ArrayImages]:
    """The training and test images of CIFAR-10."""
    nested = folder / "cifar-10-batches-py"
    folder = nested if nested.is_dir() else folder
    batches = [_read_cifar_batch(folder / f"data_batch_{i}", 10) for i in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    test = _read_cifar_batch(folder / "test_batch", 10)
    return ArrayImages(images, labels, CIFAR10_CLASSES), ArrayImages(*test, CIFAR10_CLASSES)


def cifar100(folder: Path) -> tuple[ArrayImages, ArrayImages]:
    """The training and test images of CIFAR-100."""
    nested = folder / "cifar-100-python"
    folder = nested if nested.is_dir() else folder
    train, test = (_read_cifar_batch(folder / name, 100) for name in ("train", "test"))
    wanted = "CIFAR-100's meta file: a dict with 'fine_label_names', 100 of them"
    names = _read_cifar(folder / "meta", wanted).get("fine_label_names")
    if not isinstance(names, list) or len(names) != 100:
        raise ValueError(f"{folder / 'meta'}: expected {wanted}; got others")
    names = tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)
    return ArrayImages(*train, names), ArrayImages(*test, names)


def _read_cifar_batch(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    key = "labels" if classes == 10 else "fine_labels"
    wanted = f"a CIFAR-{classes} python batch: a dict with 'data', uint8 [N, 3072], and '{key}', "
    wanted += f"N integers in 0..{classes - 1}"
    fields = _read_cifar(path, wanted)
    data, labels = fields.get("data"), fields.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: expected {wanted}; got {got} for 'data'")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(label in range(classes) for label in labels):
        raise ValueError(f"{path}: expected {wanted}; got other '{key}' for its {len(data)} images")
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32))
    return images, torch.tensor(labels, dtype=torch.int64, device="cpu")


def _read_cifar(path: Path, wanted: str) -> dict[str, Any]:
    """One of CIFAR's pickled files, which are dicts."""
    try:
        with path.open("rb") as file:
            found = _ArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected {wanted}, found no file") from error
    except Exception as error:  # a foreign stream makes the unpickler raise almost anything
        raise ValueError(f"{path}: expected {wanted}; the file is truncated or foreign ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected {wanted}; got a {type(found).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what a file of arrays needs: numpy arrays, dtypes, scalars and containers; nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            core = np._core if hasattr(np, "_core") else np.core
            return getattr(core.multiarray, name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _decode_latin1
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _decode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 encodes bytes; the codecs module itself would admit decompression and more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes spelled in encoding {encoding!r}")
    return text.encode("latin1")
