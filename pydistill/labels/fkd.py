"""Reads the labels that the code of SRe2L and its descendants (CDA, DWA, LPLD) saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from pydistill._atomic import PathLike, check_replaceable, replacing
from pydistill._renamed import renamed
from pydistill._torch_files import read_torch
from pydistill.labels._reader import Format
from pydistill.labels.records import CROP_BYTES, crop_record
from pydistill.labels.store import SoftLabelStore

__all__ = ["import_fkd"]

_FAITHFUL: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_BATCH = "a batch of FKD labels: [coords, flip, mix_index, lam, bbox, logits] that torch.save wrote"


@renamed(temperature="T")
def import_fkd(
    folder: PathLike,
    path: PathLike,
    *,
    image_size: int = 224,
    out_size: int = 224,
    seed: int = 42,
    order: Sequence[Sequence[int]] | None = None,
    format: Format | None = None,
    k: int = 10,
    T: float = 20.0,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> SoftLabelStore:
    """Makes a store from the ``epoch_{e}/batch_{b}.tar`` files that SRe2L's ``generate_soft_label.py`` saves.

    Those files do not say which images they are of: their readers redraw the same permutations, by torch's
    ``RandomSampler`` with the seed of the relabelling (``--fkd-seed``), and so does this. Crops, flips, mixup and
    cutmix become records of `pydistill.ops.multi_crop`, which `SoftLabels.crops` returns; their sources are places
    in a batch, so batches stay together: see `SoftLabelStore.batches`. (That code resizes 8-bit images by PIL, which
    rounds; multi_crop resizes tensors.) Files are read one at a time, by ``torch.load(weights_only=True)``, after
    verifying the checksums of their archives.

    Args:
        folder: contains the folders of the epochs.
        path: the store to make, atomically.
        image_size: height and width of the images; the files' crops are fractions of it.
        out_size: height and width that crops are resized to (``--input-size``); cutmix boxes refer to it.
        seed: of the permutations.
        order: the images of each epoch in the order of its labels, instead of those of the seed.
        format: None keeps every bit of the files' logits: "fp32", "fp16" or "bf16", as they are saved. The others lose
            some, as `SoftLabelStore.gradient_error` says.
        k, T, metadata, overwrite: as of `SoftLabelStore.create`. SRe2L trains at temperature 20, where the
            gradient comes from all classes: the top 10 of 1,000 keep next to nothing of it.

    Returns:
        The store, open for reading; its metadata also say that it was imported, and with which seed.

    Raises:
        FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
        FileNotFoundError: an epoch or a batch is missing; names it.
        ValueError: a file is truncated, foreign, damaged, does not fit the first, or has logits of more bits; names it.
            Then no store is made.
    """
    folder, path = Path(folder), Path(path)
    check_replaceable(path, overwrite)
    epochs, batches = _count(folder, "epoch_{}"), _count(folder / "epoch_0", "batch_{}.tar")
    first, last = (_load(folder / "epoch_0" / f"batch_{b}.tar") for b in (0, batches - 1))
    (batch_size, num_classes), rest = first[-1].shape, len(last[-1])
    num_images = batch_size * (batches - 1) + rest
    dtype = first[-1].dtype
    if format is None and dtype not in _FAITHFUL:
        raise ValueError(
            f"{folder / 'epoch_0' / 'batch_0.tar'}: logits: expected float32, float16 or bfloat16, got {dtype}"
        )
    with (
        replacing(path, "import") as partial,
        SoftLabelStore.create(
            partial,
            num_images=num_images,
            num_classes=num_classes,
            epochs=epochs,
            format=format or _FAITHFUL[dtype],
            k=k,
            T=T,
            record_bytes=CROP_BYTES * (1 if first[2] is None else 2),
            batch_size=batch_size,
            metadata={**(metadata or {}), "imported": "fkd", "seed": None if order is not None else seed},
            overwrite=True,
        ) as store,
    ):
        for epoch, images in enumerate(_orders(num_images, epochs, seed) if order is None else order):
            here = folder / f"epoch_{epoch}"
            if (found := _count(here, "batch_{}.tar")) != batches:
                raise ValueError(f"{here}: expected {batches} batches as epoch_0 has, got {found}")
            for batch in range(batches):
                file = here / f"batch_{batch}.tar"
                ids = np.asarray(images[batch * batch_size : (batch + 1) * batch_size])
                logits, records = _convert(file, len(ids), num_classes, image_size, out_size)
                if format is None and logits.dtype != dtype:
                    raise ValueError(f"{file}: logits: expected {dtype} as the first file has, got {logits.dtype}")
                try:
                    store.write(epoch, ids, logits, records)
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from error
        store.check_complete()
    return SoftLabelStore(path)


def _count(folder: Path, name: str) -> int:
    """How many there are, numbered from 0; FileNotFoundError for a gap."""
    found = len(list(folder.glob(name.format("*"))))
    for number in range(max(found, 1)):
        if not (folder / name.format(number)).exists():
            raise FileNotFoundError(f"{folder / name.format(number)}: expected labels of FKD, found nothing there")
    return found


def _orders(num_images: int, epochs: int, seed: int) -> Any:
    sampler = RandomSampler(range(num_images), generator=torch.Generator().manual_seed(seed))
    return (list(sampler) for _ in range(epochs))


def _load(file: Path) -> list[Any]:
    content = read_torch(file, _BATCH)
    if not isinstance(content, list) or len(content) != 6:
        raise ValueError(f"{file}: expected {_BATCH}; got something else")
    coords, flip, logits = content[0], content[1], content[5]
    if not all(isinstance(each, Tensor) for each in (coords, flip, logits)) or logits.dim() != 2 or not len(logits):
        raise ValueError(f"{file}: expected {_BATCH}; got something else")
    return content


def _convert(file: Path, n: int, num_classes: int, image_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """Logits, and records of one part, or of two where images are mixed."""
    coords, flip, mix_index, lam, bbox, logits = _load(file)
    shapes = {"coords": (coords, (n, 4)), "flip": (flip, (n,)), "logits": (logits, (n, num_classes))}
    if mix_index is not None:
        shapes["mix_index"] = (mix_index, (n,))
    for name, (tensor, wanted) in shapes.items():
        if tensor.shape != wanted:
            raise ValueError(f"{file}: {name}: expected {list(wanted)}, got {list(tensor.shape)}")
    crops = (coords * image_size).round()
    if (crops < 0).any() or (crops[:, 2:] < 1).any() or (crops[:, :2] + crops[:, 2:] > image_size).any():
        raise ValueError(f"{file}: coords: expected crops of images of {image_size}, got some that are not inside")
    parts = [crop_record(crops, flip, torch.arange(n, device="cpu"), out_size)]
    if mix_index is not None:
        if not ((mix_index >= 0) & (mix_index < n)).all():
            raise ValueError(f"{file}: mix_index: expected places in a batch of {n}, got {mix_index.tolist()!r:.60}")
        # mixup paints the partner over the whole image, cutmix over a box: rows and columns, first to last + 1
        alpha, box = (1 - float(lam), None) if bbox is None else (1.0, tuple(int(bbox[i]) for i in (0, 2, 1, 3)))
        parts.append(crop_record(crops[mix_index], flip[mix_index], mix_index, out_size, alpha, box))
    return logits, torch.stack(parts, 1)
