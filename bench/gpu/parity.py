"""Each operator on each of a device's backends against the CPU in float64: values, and gradients of a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..case import relative_error
from .session import Line, Wrong, worst

BOUND = 1e-4  # relative, of float32


@dataclass(frozen=True)
class Use:
    """``call(*differentiable, *constants, backend=)`` of an operator."""

    call: Callable[..., Any]
    differentiable: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uses() -> dict[str, Use]:
    from pydistill import ops
    from pydistill.augment import DiffAugment, MultiCrop

    random = torch.Generator().manual_seed(0)
    record = DiffAugment("color_crop_cutout_flip_scale_rotate").draw((9, 3, 17, 15), random)
    crops = MultiCrop(20).draw((5, 3, 37, 35), random)
    rows = [(0, 3, 50), (150, 1, 31)]
    sparse = torch.tensor([[0, 4], [1, 2], [36, 0]]), torch.tensor([[0.7, 0.2], [0.5, 0.3], [0.9, 0.05]]).double()
    heads = _drawn(2, 3, 37, 20), _drawn(2, 3, 37, 20, seed=1)
    of_teacher = _drawn(2, 3, 37, 20, seed=2), _drawn(2, 3, 37, 20, seed=3)
    return {
        "instance_norm_relu_avg_pool": Use(
            ops.instance_norm_relu_avg_pool, (_drawn(5, 37, 18, 14), 1 + 0.1 * _drawn(37), 0.1 * _drawn(37, seed=1))
        ),
        "soft_cross_entropy": Use(
            lambda x, y, **o: ops.soft_cross_entropy(x, y, label_kind="logits", **o),
            (_drawn(33, 100), _drawn(33, 100, seed=1)),
        ),
        "kd_divergence": Use(
            lambda x, z, **o: ops.kd_divergence(x, z.to(x), kind="jsd", T=2.0, **o),
            (_drawn(33, 100),),
            (_drawn(33, 100, seed=1),),
        ),
        "sparse_label_loss": Use(
            lambda x, i, v, **o: ops.sparse_label_loss(x, i, v.to(x), **o), (_drawn(3, 37),), sparse
        ),
        "bn_stat_match": Use(ops.bn_stat_match, (_drawn(6, 37, 50), _drawn(37), _drawn(37, seed=1).abs())),
        "attention_map": Use(
            lambda x, **o: torch.cat(ops.attention_map(x, 4.0, "both", **o), 1), (_drawn(3, 37, 9, 11),)
        ),
        "attention_map_divergence": Use(
            lambda q, k, q_t, k_t, **o: ops.attention_map_divergence(q, k, q_t.to(q), k_t.to(q), **o), heads, of_teacher
        ),
        "row_products": Use(
            lambda a, b, **o: ops.row_products(a, b, rows, **o), (_drawn(4, 181), _drawn(4, 181, seed=1))
        ),
        "augment_images": Use(lambda x, r, **o: ops.augment_images(x, r, **o), (_drawn(9, 3, 17, 15),), (record,)),
        "multi_crop": Use(lambda x, r, **o: ops.multi_crop(x, r, 20, **o), (_drawn(5, 3, 37, 35),), (crops,)),
    }


def _results(use: Use, device: str, dtype: torch.dtype, backend: str) -> Sequence[Tensor]:
    given = [t.to(device, dtype).requires_grad_() for t in use.differentiable]
    out = use.call(*given, *(t.to(device) for t in use.constants), backend=backend)
    weight = _drawn(*out.shape, seed=7).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given)]


def parity(name: str) -> Line:
    """The largest relative error of each backend that runs here; `Wrong` above `BOUND`."""
    use = uses()[name]
    truths = _results(use, "cpu", torch.float64, "cpu")
    found: Line = {}
    red: list[str] = []
    for backend in ("cuda", "triton"):
        try:
            values = _results(use, "cuda", torch.float32, backend)
            error_of_it = worst([relative_error(v.cpu(), truth) for v, truth in zip(values, truths, strict=True)])
        except NotImplementedError as error:
            found[f"{backend} is not there"] = str(error)
        except Exception as error:  # the other backend's result counts none the less
            red.append(f"{backend}: {type(error).__name__}: {error}")
        else:
            found[f"{backend} error"] = error_of_it
            if not error_of_it <= BOUND:
                red.append(f"{backend} is further than {BOUND} from the CPU")
    if not any(name.endswith(" error") for name in found) and not red:
        red.append("no backend runs here")
    if red:
        raise Wrong("; ".join(red), found)
    return found
