"""Label projectors: a small file beside a frozen encoder that makes soft labels while a student trains.

HeLlO ("Heavy Labels Out! Dataset Distillation with Label Space Lightening", Yu et al., ICCV 2025) stores no labels: a
student's augmented images go through a public encoder (CLIP), low-rank factors beside its weights and a linear head
that starts at the embeddings of the classes' names, all fitted to weak teachers of the data set.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._renamed import renamed
from pydistill.data import read_safetensors, write_safetensors
from pydistill.labels.lora import add_lora, lora_logits

__all__ = ["Projector", "feature_distance", "open_clip_encoder"]

_KIND = "label projector"


class Projector(nn.Module):
    """Images to soft labels: a frozen encoder with low-rank factors, and a head of factors for each of M teachers.

    ``forward`` gives the mean of the teachers' logits ``[B, C]``, ``logits`` each teacher's ``[M, B, C]``; training
    mode leaves the encoder in evaluation mode. `save` writes the factors and the head, not the encoder.

    Args:
        encoder: images to features ``[B, d]``; copied, and frozen except for the factors.
        class_embeddings: ``[C, d]``, of the classes' names by CLIP's text tower, or anything else that points towards
            the class; rows are normalised and multiplied by ``T``.
        rank: of the encoder's factors; 0: none.
        head_rank: of the head's factors.
        teachers: M.
        T: length of the head's rows. Features are normalised too, so initially logits are at most this.

    Raises:
        ValueError: embeddings that are not a matrix or not finite, a rank or a count that is too small.
    """

    W: Tensor

    @renamed(temperature="T")
    def __init__(
        self,
        encoder: nn.Module,
        class_embeddings: Tensor,
        *,
        rank: int = 8,
        head_rank: int = 128,
        teachers: int = 1,
        T: float = 10.0,
    ):
        super().__init__()
        if class_embeddings.dim() != 2 or not class_embeddings.isfinite().all():
            raise ValueError(f"class_embeddings: expected finite [C, d], got {list(class_embeddings.shape)}")
        for name, value, least in (("rank", rank, 0), ("head_rank", head_rank, 1), ("teachers", teachers, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 < T < math.inf:
            raise ValueError(f"T: expected a positive finite number, got {T}")
        self.config = {"rank": rank, "head_rank": head_rank, "teachers": teachers, "temperature": T}
        self.encoder = add_lora(encoder, rank) if rank else copy.deepcopy(encoder).requires_grad_(False).eval()
        C, d = class_embeddings.shape
        self.register_buffer("W", T * F.normalize(class_embeddings.detach(), dim=1))
        self.A = nn.Parameter(
            torch.randn(teachers, head_rank, d, dtype=torch.float32, device="cpu").to(self.W) / d**0.5
        )
        self.B = nn.Parameter(torch.zeros(teachers, C, head_rank, device="cpu").to(self.W))

    def train(self, mode: bool = True) -> Projector:
        super().train(mode)
        self.encoder.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """``[B, d]``, of length one."""
        features = self.encoder(images)
        if features.dim() != 2 or features.shape[1] != self.W.shape[1]:
            wanted = f"features [B, {self.W.shape[1]}] as class_embeddings has"
            raise ValueError(f"encoder: expected {wanted}, got {list(features.shape)}")
        return F.normalize(features, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return lora_logits(self.features(images), self.W, self.A, self.B, reduction="mean")

    def logits(self, images: Tensor) -> Tensor:
        return lora_logits(self.features(images), self.W, self.A, self.B)

    def loss(self, images: Tensor, targets: Tensor, labels: Tensor, ce_weight: float = 1.0) -> Tensor:
        """The fitting loss: the mean over teachers of ``mse(f_m(x), targets[m]) + ce_weight * ce(f_m(x), labels)``.

        Args:
            images: ``[B, C, H, W]``.
            targets: ``[M, B, C]``, logits of the weak teachers on the same images.
            labels: int64 ``[B]``.
            ce_weight: weight of the cross entropy.

        Raises:
            ValueError: targets of another shape.
        """
        found = self.logits(images)
        if targets.shape != found.shape:
            raise ValueError(f"targets: expected {list(found.shape)}, got {list(targets.shape)}")
        cross_entropy = F.cross_entropy(found.flatten(0, 1), labels.repeat(len(found)))
        return F.mse_loss(found, targets) + ce_weight * cross_entropy

    def factors(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors and the head in memory: what `save` writes, without the header."""
        return sum(t.numel() * t.element_size() for t in (*self.factors().values(), self.W))

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, **config: Any) -> int:
        """Writes factors and head to a safetensors file, atomically; as ``dtype`` if given. Returns its bytes."""
        tensors = {**self.factors(), "W": self.W}
        kept = {name: t.detach().to(dtype or t.dtype) for name, t in tensors.items()}
        write_safetensors(path, kept, _KIND, {**self.config, **config})
        return Path(path).stat().st_size

    @classmethod
    def load(cls, path: str | os.PathLike[str], encoder: nn.Module) -> Projector:
        """Reads what `save` wrote, for the encoder that it was fitted to.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another kind, or its factors are of another encoder.
        """
        tensors, header = read_safetensors(path, _KIND)
        names = {"rank": "rank", "head_rank": "head_rank", "teachers": "teachers", "T": "temperature"}
        parameter = next(encoder.parameters())
        W = tensors.pop("W").to(parameter)
        found = cls(encoder, W, **{name: header["config"][kept] for name, kept in names.items()})
        found.W.copy_(W)
        own = found.factors()
        if own.keys() != tensors.keys() or any(own[name].shape != t.shape for name, t in tensors.items()):
            raise ValueError(f"{path}: expected factors of this encoder's layers; they are of another encoder")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return found.eval()


def feature_distance(encoder: nn.Module, images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """``mse(E(p), E(up(down(p))))``: how much of what the encoder sees is lost when images are stored smaller.

    HeLlO's update of its images lowers it. ``down`` is antialiased bilinear interpolation to ``size``, ``up`` bilinear
    interpolation back.

    Args:
        encoder: images to features.
        images: ``[B, C, H, W]``.
        size: the smaller height and width in pixels.
    """
    down = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    up = F.interpolate(down, size=images.shape[2:], mode="bilinear")
    return F.mse_loss(encoder(images), encoder(up))


def open_clip_encoder(model: Any, tokenize: Any, class_names: list[str]) -> tuple[nn.Module, Tensor]:
    """The image tower of an open_clip model as a module, and the embeddings ``[C, d]`` of "a photo of a <name>".

    Args:
        model: of ``open_clip.create_model``, or anything with ``visual`` and ``encode_text``.
        tokenize: of ``open_clip.get_tokenizer``.
        class_names: C names.
    """
    with torch.no_grad():
        embeddings = model.encode_text(tokenize([f"a photo of a {name}" for name in class_names]))
    return model.visual, embeddings
