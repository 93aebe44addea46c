"""Plain-torch forms of the primitives that the decoupled pipeline is written on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.data import read_safetensors, write_atomic, write_safetensors


def freeze(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


class BNStatMatcher:
    def __init__(self, model, *, w_mean=1.0, w_var=1.0, first=1.0):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            raise ValueError("model: expected BatchNorm layers, found none")
        for m in norms:
            if m.training:
                raise ValueError("model: expected BatchNorm in eval mode, got one in training mode")
        self.w_mean, self.w_var, self.first = w_mean, w_var, first
        self.losses: dict[int, Tensor] = {}
        self.handles = [m.register_forward_hook(self._hook(i)) for i, m in enumerate(norms)]

    def _hook(self, i):
        def hook(module, inputs, output):
            x = inputs[0]
            dims = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x, dims, unbiased=False)
            norm = torch.linalg.vector_norm
            loss = self.w_mean * norm(mean - module.running_mean) + self.w_var * norm(var - module.running_var)
            self.losses[i] = loss * (self.first if i == 0 else 1.0)

        return hook

    def loss(self) -> Tensor:
        return torch.stack([self.losses[i] for i in sorted(self.losses)]).sum()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class MultiCrop:
    out_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    roll: int = 0
    mix: str | None = None
    alpha: float = 1.0
    shared: bool = False

    def draw(self, shape, generator=None) -> Tensor:
        B, _, H, W = shape
        rows = 1 if self.shared else B

        def u():
            return float(torch.rand((), generator=generator))

        found = []
        for _ in range(rows):
            top, left, h, w = 0, 0, H, W
            for _ in range(10):
                area = H * W * (self.scale[0] + (self.scale[1] - self.scale[0]) * u())
                lo, hi = (math.log(r) for r in self.ratio)
                ratio = math.exp(lo + (hi - lo) * u())
                tw, th = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < tw <= W and 0 < th <= H:
                    top, left, h, w = int(u() * (H - th + 1)), int(u() * (W - tw + 1)), th, tw
                    break
            flip = float(u() < self.flip)
            found.append([top, left, h, w, flip, int(u() * (self.roll + 1)), int(u() * (self.roll + 1))])
        record = torch.tensor(found, dtype=torch.float32).expand(B, -1)
        partner = torch.arange(B).float()
        lam, box = 1.0, [0.0] * 4
        if self.mix is not None:
            partner = torch.randperm(B, generator=generator).float()
            lam = u() if self.alpha == 1 else float(torch.distributions.Beta(self.alpha, self.alpha).sample())
            if self.mix == "cutmix":
                s, side = math.sqrt(1 - lam), self.out_size
                cy, cx, r = int(u() * side), int(u() * side), int(side * s) // 2
                box = [max(cy - r, 0), min(cy + r, side), max(cx - r, 0), min(cx + r, side)]
                lam = 1.0
        more = torch.tensor([[lam, *box]]).expand(B, -1)
        return torch.cat([record, partner[:, None], more], 1)


def multi_crop(images: Tensor, record: Tensor, out_size: int, *, base: Tensor | None = None) -> Tensor:
    x = images if base is None else images + base
    if len(record) and bool((record[:, :7] == record[:1, :7]).all()):
        y = _one(x, record[0], out_size)
    else:
        y = torch.cat([_one(x[i : i + 1], r, out_size) for i, r in enumerate(record)])
    partner = record[:, 7].long()
    lam = record[0, 8].item()
    if lam < 1:
        y = lam * y + (1 - lam) * y[partner]
    t, b, le, r = (int(v) for v in record[0, 9:13])
    if b > t and r > le:
        mask = torch.zeros(out_size, out_size, dtype=torch.bool)
        mask[t:b, le:r] = True
        y = torch.where(mask, y[partner], y)
    return y


def _one(x, r, size):
    top, left, h, w, flip, dy, dx = (int(v) for v in r[:7])
    y = x[:, :, top : top + h, left : left + w]
    if (h, w) != (size, size):
        y = F.interpolate(y, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    if flip:
        y = y.flip(3)
    return torch.roll(y, (dy, dx), (2, 3)) if dy or dx else y


def kd_divergence(student: Tensor, target: Tensor, *, kind="fkl", T=1.0, scale_T2=True, reduction="batchmean"):
    return F.kl_div((student / T).log_softmax(1), (target / T).softmax(1), reduction=reduction)


def crop_schedule(kind, iteration, iterations, milestone, *, lowest=0.08):
    at = iteration / (milestone * iterations) if milestone else 1.0
    if at >= 1:
        return lowest
    falling = {"step": 1.0, "linear": 1 - at, "cosine": (1 + math.cos(math.pi * at)) / 2}[kind]
    return lowest + (1 - lowest) * falling


def mixed(values: Tensor, record: Tensor, size: int) -> Tensor:
    """Labels of mixed views: ``values`` [B, ...] of the images, mixed as the record mixes the images."""
    partner = record[:, 7].long()
    box = record[:, 9:13]
    lam = record[:, 8] * (1 - (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / size**2)
    lam = lam.reshape(-1, *[1] * (values.dim() - 1)).to(values)
    return lam * values + (1 - lam) * values[partner]


class SoftLabels:
    def __init__(self, logits: Tensor, records: Tensor, temperature: float):
        self.logits, self.records, self.temperature = logits, records, temperature

    def loss(self, logits: Tensor) -> Tensor:
        return kd_divergence(logits, self.logits.float(), T=self.temperature, scale_T2=False)


class SoftLabelStore:
    """A folder of one file a batch."""

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, header
        self.metadata = header["metadata"]
        self.epochs, self.num_images, self.num_classes = (
            header[name] for name in ("epochs", "num_images", "num_classes")
        )

    @classmethod
    def create(cls, path, **header) -> SoftLabelStore:
        Path(path).mkdir(parents=True)
        write_atomic(Path(path) / "header.json", json.dumps(header).encode())
        return cls(Path(path), header)

    @classmethod
    def open(cls, path) -> SoftLabelStore:
        return cls(Path(path), json.loads((Path(path) / "header.json").read_text()))

    def _file(self, epoch: int, indices: Tensor) -> Path:
        return self.path / f"{epoch:05d}-{int(indices.min()):07d}.safetensors"

    def has(self, epoch: int, indices: Tensor) -> bool:
        return self._file(epoch, indices).exists()

    def write(self, epoch, indices, logits, records) -> None:
        tensors = {"indices": indices, "logits": logits.half(), "records": records.contiguous()}
        write_safetensors(self._file(epoch, indices), tensors, "soft labels", {"epoch": epoch})

    def read(self, epoch: int, indices: Tensor) -> SoftLabels:
        path = self._file(epoch, indices)
        if not path.exists():
            raise ValueError(f"{self.path}: expected the labels of epoch {epoch}, they are missing")
        tensors, _ = read_safetensors(path, "soft labels")
        if not torch.equal(tensors["indices"], indices):
            raise ValueError(f"{path}: expected the labels of images {indices.tolist()}, got others")
        return SoftLabels(tensors["logits"], tensors["records"], self.header["temperature"])

    @classmethod
    def merge(cls, paths, path) -> SoftLabelStore:
        headers = [cls.open(p).header for p in paths]
        if any(h != headers[0] for h in headers):
            raise ValueError(f"{path}: expected parts of one store")
        whole = cls.create(path, **headers[0])
        for part in paths:
            for file in sorted(Path(part).glob("*.safetensors")):
                write_atomic(whole.path / file.name, file.read_bytes())
        return whole
