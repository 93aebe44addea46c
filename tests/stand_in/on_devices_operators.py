"""The package's operators on the devices, with kernels of CUDA and of Triton, against those of the CPU.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import _library, info
from pydistill.ops import (
    attention_map,
    attention_map_divergence,
    augment_images,
    bn_stat_match,
    instance_norm_relu_avg_pool,
    kd_divergence,
    multi_crop,
    row_products,
    soft_cross_entropy,
    sparse_label_loss,
)
from pydistill.ops.augment import IDENTITY
from tests.matrices import sample
from tests.stand_in.counts import counts
from tests.stand_in.kernels import cuda_operators, triton_left_out, triton_operators

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@dataclass
class Use:
    """``function(*tensors, *constants, backend=...)``, differentiated ``order`` times in the tensors."""

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    backends: tuple[str, ...] = ("cuda",)
    order: int = 2
    dtypes: tuple[torch.dtype, ...] = field(default=FLOATS)


RECORD = torch.tensor(list(IDENTITY.values())).repeat(4, 1)
RECORD[:, 0] = torch.tensor([0.1, 0.0, -0.2, 0.3])
RECORD[1:, 3:5], RECORD[2, 9], RECORD[3, 10:] = 1, 1, torch.tensor([0.9, 1.1, 0.2])
# two results of one image each, the second of a box that is resized, flipped and rolled
CROPS = torch.tensor([[[0.0, 0, 0, 6, 5, 0, 0, 0, 0, 0, 0, 4, 4, 1]], [[1, 1, 2, 4, 3, 1, 1, -1, 0, 0, 0, 4, 4, 1]]])
TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [(1, 2, 5), (11, 1, 4)]

USES = {
    "instance_norm_relu_avg_pool": Use(
        lambda x, w, b, **o: instance_norm_relu_avg_pool(x, w, b, **o),
        (drawn(2, 3, 6, 4), 1 + 0.1 * drawn(3), 0.1 * drawn(3, seed=1)),
        backends=("cuda", "triton"),
    ),
    "instance_norm_relu_avg_pool, channels last": Use(
        lambda x, w, b, **o: instance_norm_relu_avg_pool(x.contiguous(memory_format=torch.channels_last), w, b, **o),
        (drawn(2, 3, 5, 4), 1 + 0.1 * drawn(3), 0.1 * drawn(3, seed=1)),
        backends=("cuda", "triton"),
    ),
    "soft_cross_entropy, hard": Use(
        soft_cross_entropy, (drawn(3, 5),), (torch.tensor([4, 0, 2]),), backends=("cuda", "triton")
    ),
    "soft_cross_entropy, logits": Use(
        lambda x, y, **o: soft_cross_entropy(x, y, label_kind="logits", **o),
        (drawn(3, 5), drawn(3, 5, seed=1)),
        backends=("cuda", "triton"),
    ),
    "augment_images": Use(
        lambda x, r, **o: augment_images(x, r, flip_batch=True, **o),
        (drawn(2, 3, 5, 4),),
        (RECORD,),
        backends=("cuda", "triton"),
        order=1,
    ),
    "multi_crop": Use(
        lambda x, base, r, **o: multi_crop(x, r, 4, base=base, mean=(0.1, 0.2), std=(0.5, 0.6), **o),
        (drawn(2, 2, 6, 5), drawn(1, 2, 6, 5)),
        (CROPS,),
        backends=("cuda", "triton"),
        order=1,
    ),
    "bn_stat_match": Use(
        bn_stat_match,
        (drawn(3, 4, 5), drawn(4), drawn(4, seed=1).abs()),
        backends=("cuda", "triton"),
    ),
    "kd_divergence": Use(
        lambda s, t, **o: kd_divergence(s, t.to(s.dtype), kind="jsd", T=2.0, **o),
        (drawn(3, 5),),
        (drawn(3, 5, seed=1),),
        backends=("triton",),
        dtypes=TRITON_FLOATS,
    ),
    "sparse_label_loss": Use(
        lambda s, i, v, **o: sparse_label_loss(s, i, v.to(s.dtype), **o),
        (drawn(3, 5),),
        (torch.tensor([[0, 4], [1, 2], [3, 0]]), torch.tensor([[0.7, 0.2], [0.5, 0.3], [0.9, 0.05]])),
        backends=("triton",),
        order=1,
        dtypes=TRITON_FLOATS,
    ),
    "attention_map": Use(
        lambda x, **o: torch.cat(attention_map(x, 4.0, "both", **o), 1),
        (drawn(2, 3, 4, 5),),
        backends=("triton",),
        dtypes=TRITON_FLOATS,
    ),
    "attention_map_divergence": Use(
        lambda q, k, q_t, k_t, **o: attention_map_divergence(q, k, q_t.to(q.dtype), k_t.to(q.dtype), kind="jsd", **o),
        (drawn(1, 2, 5, 8), drawn(1, 2, 6, 8)),
        (drawn(1, 2, 5, 8, seed=1), drawn(1, 2, 6, 8, seed=1)),
        backends=("triton",),
        order=1,
        dtypes=TRITON_FLOATS,
    ),
    "row_products": Use(
        lambda a, b, **o: row_products(a, b, ROWS, **o),
        (drawn(2, 16), drawn(2, 16, seed=1)),
        backends=("triton",),
        dtypes=TRITON_FLOATS,
    ),
}


def derivatives(use: Use, device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The result and its gradients, and theirs, each weighted by fixed numbers."""
    leaves = [t.to(dtype).to(device).requires_grad_() for t in use.tensors]
    out = [use.function(*leaves, *(c.to(device) for c in use.constants), backend=backend)]
    found = [*out]
    for order in range(use.order):
        total = sum(
            (t * drawn(*t.shape, seed=order).to(t.dtype).to(device)).sum() for t in out if t is not None and t.grad_fn
        )
        out = list(torch.autograd.grad(total, leaves, create_graph=order + 1 < use.order, allow_unused=True))
        found += [t for t in out if t is not None]
    return [t.detach() for t in found]


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


PLACES = {
    "cuda:0": ("cuda:0", contextlib.nullcontext),
    "cuda:1": ("cuda:1", contextlib.nullcontext),  # cuda:0 is current
    "side stream": ("cuda:0", side_stream),
}
MATRIX = [
    (name, backend, dtype, place)
    for name, use in USES.items()
    for backend in use.backends
    for dtype in use.dtypes
    for place in PLACES
]
FIRST = [
    case
    for number, case in enumerate(MATRIX)
    if case[2] == torch.float32 or (case[2:] == (torch.bfloat16, "cuda:1") and number % 2)
]


@pytest.mark.parametrize(("name", "backend", "dtype", "place"), sample(MATRIX, FIRST))
def test_values_are_the_cpus(name: str, backend: str, dtype: torch.dtype, place: str) -> None:
    check_values(name, backend, dtype, place)


def check_values(name: str, backend: str, dtype: torch.dtype, place: str) -> None:
    device, surrounding = PLACES[place]
    expected = derivatives(USES[name], "cpu", dtype, "cpu")
    with surrounding(), counts() as c:
        found = derivatives(USES[name], device, dtype, backend)
    assert c.launches > 0
    assert torch.cuda.current_device() == 0
    for got, want in zip(found, expected, strict=True):
        assert got.device == torch.device(device)
        assert got.dtype == want.dtype
        scale = want.double().abs().max().item()
        torch.testing.assert_close(got.cpu().double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale + 1e-12)


def test_the_operators_are_the_packages() -> None:
    names = {name.split("::")[1].split("_backward")[0].split("_jvp")[0] for name in cuda_operators()}
    assert names == {"augment", "bn_stat_match", "instance_norm_relu_avg_pool", "multi_crop", "soft_cross_entropy"}
    assert triton_operators()
    for name in cuda_operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_arguments_of_registered_operators_are_checked() -> None:
    ops = torch.ops.pydistill
    x, w = torch.ones(1, 2, 4, 4, device="cuda:1"), torch.ones(2)
    with pytest.raises(RuntimeError, match="device"):
        ops.instance_norm_relu_avg_pool(x, w, w, 1e-5, True, True)
    with pytest.raises(RuntimeError, match="record: expected the device of images"):
        ops.augment(x, RECORD[:1].contiguous(), False, True, False)
    with pytest.raises(RuntimeError, match="labels"):
        ops.soft_cross_entropy(torch.ones(2, 3, device="cuda"), torch.ones(2, device="cuda"), 0)


def test_shared_memory_beyond_the_usual_is_asked_for() -> None:
    """A plane that fills more than 48 KB of a block's memory, and one that does not fit and is streamed."""
    for size in (128, 200):
        x = drawn(1, 1, size, size).float()
        w, b = torch.ones(1), torch.zeros(1)
        want = instance_norm_relu_avg_pool(x, w, b)
        got = instance_norm_relu_avg_pool(x.cuda(), w.cuda(), b.cuda())
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_a_captured_operator_replays() -> None:
    x, w, b = drawn(1, 2, 4, 4).float().cuda(), torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph, out = torch.cuda.CUDAGraph(), []
    with torch.no_grad(), torch.cuda.graph(graph):
        out.append(instance_norm_relu_avg_pool(x, w, b))
    x.mul_(-2)
    graph.replay()
    torch.testing.assert_close(out[0], instance_norm_relu_avg_pool(x, w, b), rtol=0, atol=0)


def test_attention_maps_of_large_images() -> None:
    x = torch.zeros(1, device="cuda").expand(1, 128, 256, 256).requires_grad_()
    with triton_left_out():
        attention_map(x, 4.0, "both")[0].sum().backward()


def test_an_old_driver_or_another_architecture_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (t.float().to("cuda:1") for t in USES["instance_norm_relu_avg_pool"].tensors)
    for built, reason in (
        ({"cuda_toolkit": "14.1"}, "built by CUDA 14.1, and the driver knows CUDA 13.0 at most"),
        ({"cuda_architectures": "100-real"}, "built for the architectures 100-real, and the device is of sm_90"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_library, "_build", _library._build | built)
            patch.setattr(_library, "_unfit_device", _library._unfit_device.__wrapped__)
            found = instance_norm_relu_avg_pool(x, w, b)
            assert f"on GPUs triton (cuda: {reason}" in info.backends()["instance_norm_relu_avg_pool"]["auto"]
            with pytest.raises(NotImplementedError, match=f"backend='cuda' cannot run: {reason}"):
                instance_norm_relu_avg_pool(x, w, b, backend="cuda")
            assert torch.equal(found, instance_norm_relu_avg_pool(x, w, b, backend="triton"))


@pytest.mark.parametrize("why", ["built without", "AMD"])
@pytest.mark.parametrize("name", USES)
def test_machines_without_the_cuda_operators(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_error", "pydistill was built without _C_cuda")
    if why == "AMD":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    want = derivatives(USES[name], "cpu", torch.float32, "cpu")
    for got, here in zip(derivatives(USES[name], "cuda:0", torch.float32, "auto"), want, strict=True):
        torch.testing.assert_close(got.cpu(), here, rtol=1e-4, atol=1e-5)
