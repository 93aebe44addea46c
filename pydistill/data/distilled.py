"""The product of a distillation, and the files in which it is stored and exchanged."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill._atomic import write_atomic
from pydistill._torch_files import read_torch
from pydistill.data.dataset import Dataset
from pydistill.data.files import read_safetensors, write_safetensors
from pydistill.data.normalisation import renormalise
from pydistill.ops.convnet_step import LabelKind
from pydistill.whitening import ZCA

__all__ = ["EXPORT_HEADER", "DistilledSet"]

EXPORT_HEADER = "distilled.json"  # in a folder that DistilledSet.export wrote


@dataclass(eq=False)
class DistilledSet:
    """A distilled data set: what a distillation produces and students are trained on.

    Attributes:
        images: float32 ``[N, C, H, W]``, in normalised space: a pixel is ``images * std + mean``.
        labels: int64 ``[N]``, or float32 ``[N, K]`` soft labels.
        lr: the learning rate that was learnt along with the images, for plain SGD students.
        mean: float32 ``[C]``, of the real training pixels in ``[0, 1]``.
        std: float32 ``[C]``.
        config: what made it, as values that JSON can hold.
        label_kind: ``"hard"`` for int64 labels, ``"logits"`` or ``"probs"`` for soft ones.
        zca: the whitening of the images, or None.

    Raises:
        ValueError: the shapes, dtypes and ``label_kind`` do not agree.
    """

    images: Tensor
    labels: Tensor
    lr: float
    mean: Tensor
    std: Tensor
    config: dict[str, Any] = field(default_factory=dict)
    label_kind: LabelKind = "hard"
    zca: ZCA | None = None

    def __post_init__(self) -> None:
        for name in ("images", "labels", "mean", "std"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(getattr(self, name)).__name__}")
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise ValueError(f"images: expected float32 [N, C, H, W], got {_describe(self.images)}")
        count, channels = self.images.shape[:2]
        check_choice("label_kind", self.label_kind, ("hard", "logits", "probs"))
        if self.label_kind == "hard":
            right, wanted = self.labels.ndim == 1 and self.labels.dtype == torch.int64, f"int64 [{count}]"
        else:
            right, wanted = self.labels.ndim == 2 and self.labels.dtype == torch.float32, f"float32 [{count}, K]"
        if not right or len(self.labels) != count:
            raise ValueError(f"labels: expected {wanted} for {self.label_kind} labels, got {_describe(self.labels)}")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.shape != (channels,) or value.dtype != torch.float32:
                raise ValueError(f"{name}: expected float32 [{channels}], got {_describe(value)}")
        if not isinstance(self.lr, float):
            raise ValueError(f"lr: expected a float, got {type(self.lr).__name__}")
        if self.zca is not None and self.zca.mean.shape != self.images.shape[1:]:
            shape = list(self.images.shape[1:])
            raise ValueError(f"zca: expected a whitening of images {shape}, got one of {list(self.zca.mean.shape)}")

    def pixels(self) -> Tensor:
        """The images as pixels clamped to ``[0, 1]``, ``[N, C, H, W]``."""
        if self.zca is not None:
            return self.zca.inverse(self.images).clamp(0, 1)
        return (self.images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    def normalise(self, images: Tensor, dataset: Dataset) -> Tensor:
        """Converts images from ``dataset``'s space, which is not whitened, to the space of this set."""
        if self.zca is not None:
            return self.zca.to(images.device)(dataset.pixels(images))
        return renormalise(images, (dataset.mean, dataset.std), (self.mean, self.std))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, atomically, with the configuration as JSON in its metadata."""
        tensors = {"images": self.images, "labels": self.labels, "mean": self.mean, "std": self.std}
        tensors["lr"] = torch.tensor(self.lr, dtype=torch.float64, device="cpu")
        if self.zca is not None:
            tensors |= {f"zca_{name}": tensor for name, tensor in self.zca.tensors().items()}
        write_safetensors(path, tensors, "distilled", self.config, label_kind=self.label_kind)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DistilledSet:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, foreign, or lacks a tensor; says which and what was expected.
        """
        tensors, header = read_safetensors(path, "distilled")
        missing = {"images", "labels", "lr", "mean", "std"} - tensors.keys()
        if missing:
            raise ValueError(f"{path}: expected images, labels, lr, mean and std; {', '.join(sorted(missing))} missing")
        lr = tensors.pop("lr")
        if lr.numel() != 1:
            raise ValueError(f"{path}: lr: expected one number, got {_describe(lr)}")
        fields = {name: tensors[name] for name in ("images", "labels", "mean", "std")}
        zca = {name.removeprefix("zca_"): tensor for name, tensor in tensors.items() if name.startswith("zca_")}
        try:
            whitening = ZCA(**zca) if zca else None
            label_kind = header.get("label_kind", "hard")
            return cls(lr=float(lr), config=header["config"], label_kind=label_kind, zca=whitening, **fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def renormalised(self, mean: Tensor, std: Tensor) -> DistilledSet:
        """The same pixels under another mean and deviation, float32 ``[C]`` each; ValueError for a whitened set."""
        if self.zca is not None:
            raise ValueError("zca: expected a set that is not whitened, which no mean and deviation make another of")
        images = renormalise(self.images, (self.mean, self.std), (mean, std))
        return replace(self, images=images, mean=mean, std=std)

    def export(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the set as the method repositories save theirs (MTT, DATM) and DD-Ranking reads it, by ``torch.save``.

        ``images.pt`` holds the images, ``[N, C, H, W]`` in normalised space, ``labels.pt`` the labels and ``lr.pt`` the
        learning rate, a tensor of no dimensions; ``zca.pt`` the whitening of a whitened set. What those files cannot
        hold, the mean and deviation of the space, the kind of labels and the configuration, is in ``distilled.json``
        beside them.

        Other code assumes that the images are in the space of its own test images: `renormalised` by
        `REPOSITORY_NORMALISATION` makes them so. DD-Ranking's hard labels are the classes in order, an equal number of
        images each, whatever ``labels.pt`` says.

        Args:
            folder: created if missing.
            overwrite: replace an earlier export.

        Raises:
            FileExistsError: one of the files exists, and ``overwrite`` is not given.
        """
        folder = Path(folder)
        tensors: dict[str, Tensor | dict[str, Tensor]] = {
            "images": self.images,
            "labels": self.labels,
            "lr": torch.tensor(self.lr, dtype=torch.float64, device="cpu"),
        }
        about = folder / EXPORT_HEADER
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder, it is a file")
        for path in (about, *(folder / f"{name}.pt" for name in tensors)):
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path}: expected no file there, which overwrite=True replaces")
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # the description of the tensors exists only while all of them do
        (folder / "zca.pt").unlink(missing_ok=True)
        if self.zca is not None:
            tensors["zca"] = self.zca.tensors()
        for name, content in tensors.items():
            buffer = io.BytesIO()
            torch.save(content.detach().cpu().clone() if isinstance(content, Tensor) else content, buffer)
            write_atomic(folder / f"{name}.pt", buffer.getvalue())
        header = {"mean": self.mean.tolist(), "std": self.std.tolist(), "label_kind": self.label_kind}
        write_atomic(about, (json.dumps(header | {"config": self.config}, indent=2) + "\n").encode())

    @classmethod
    def import_tensors(
        cls,
        folder: str | os.PathLike[str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        lr: float | None = None,
        label_kind: LabelKind | None = None,
    ) -> DistilledSet:
        """Reads a folder that `export`, a method repository (MTT, FTD, DATM) or a baseline of DD-Ranking has filled.

        It has ``images.pt``, ``labels.pt`` and possibly ``lr.pt``, or the same with ``_best`` before the dot. They are
        read by ``torch.load(weights_only=True)``, which runs no code, after verifying the checksums of their archives.
        Arguments take precedence over what the folder says.

        Args:
            folder: contains the files.
            mean, std: one number per channel, of the space that the images are in; by default from ``distilled.json``.
            lr: learning rate of the students; by default from ``lr.pt``.
            label_kind: "hard", "logits" or "probs"; by default from ``distilled.json``, else "hard" for integers.

        Raises:
            FileNotFoundError: the images or the labels are missing.
            ValueError: a file is truncated, damaged or holds something else, such as non-finite numbers or classes
                below 0; says which and what was expected. Or the mean and deviation, the learning rate, or the kind of
                floating-point labels are not known.
        """
        folder = Path(folder)
        ending = "" if (folder / "images.pt").exists() or not (folder / "images_best.pt").exists() else "_best"
        images, labels = (_read_tensor(folder / f"{name}{ending}.pt") for name in ("images", "labels"))
        header = _read_export_header(folder / EXPORT_HEADER) if not ending else {}
        mean, std = (header.get(key) if given is None else given for key, given in (("mean", mean), ("std", std)))
        if mean is None or std is None:
            raise ValueError(f"mean, std: expected those of the images' normalised space, which {folder} does not say")
        if lr is None:
            rate = folder / f"lr{ending}.pt"
            if not rate.exists():
                raise ValueError(f"lr: expected a learning rate, {rate} is not there")
            tensor = _read_tensor(rate)
            if tensor.numel() != 1:
                raise ValueError(f"{rate}: expected one number, got {_describe(tensor)}")
            lr = float(tensor)
        if label_kind is None:
            label_kind = header.get("label_kind") if labels.is_floating_point() else "hard"
        if label_kind is None:
            raise ValueError(f"label_kind: expected 'logits' or 'probs', {folder} does not say which its labels are")
        centre, spread = (torch.tensor(each, dtype=torch.float32, device="cpu") for each in (mean, std))
        labels = labels.float() if labels.is_floating_point() else labels.long()
        if label_kind == "hard" and labels.numel() and labels.min() < 0:
            place = folder / f"labels{ending}.pt"
            raise ValueError(f"{place}: expected classes from 0 on, got {int(labels.min())}")
        whitening = _read_whitening(folder / "zca.pt") if (folder / "zca.pt").exists() else None
        try:
            config = header.get("config", {})
            return cls(images.float(), labels, float(lr), centre, spread, config, label_kind, whitening)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


def _read_tensor(path: Path) -> Tensor:
    wanted = "a tensor that torch.save wrote"
    tensor = read_torch(path, wanted)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: expected {wanted}; got a {type(tensor).__name__}")
    _check_finite(path, tensor)
    return tensor.detach()


def _read_whitening(path: Path) -> ZCA:
    wanted = "mean, matrix and inverse_matrix of a ZCA, as DistilledSet.export writes them"
    tensors = read_torch(path, wanted)
    names = {"mean", "matrix", "inverse_matrix"}
    is_whitening = isinstance(tensors, dict) and tensors.keys() == names
    if not is_whitening or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError(f"{path}: expected {wanted}; got something else")
    for tensor in tensors.values():
        _check_finite(path, tensor)
    try:
        return ZCA(**tensors)
    except ValueError as error:
        raise ValueError(f"{path}: expected {wanted}; {error}") from error


def _check_finite(path: Path, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: expected finite numbers, got some that are not")


def _read_export_header(path: Path) -> dict[str, Any]:
    """What `DistilledSet.export` wrote beside its tensors; nothing if there is no such file."""
    if not path.exists():
        return {}
    try:
        header = json.loads(path.read_text())
        for name in ("mean", "std"):
            header[name] = [float(each) for each in header[name]]
        if not isinstance(header["label_kind"], str) or not isinstance(header["config"], dict):
            raise TypeError("label_kind or config")
    except (KeyError, TypeError, ValueError) as error:
        wanted = "mean, std, label_kind and config as JSON, as DistilledSet.export writes them"
        raise ValueError(f"{path}: expected {wanted}; it is truncated or foreign ({error!r})") from error
    return header


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
