"""The stand-in itself: values and aliases are the CPU's, devices, streams and random numbers a GPU's.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W, M, LABELS = seeded(4, 3, 8, 8), seeded(5, 3, 3, 3), seeded(6, 6), torch.tensor([0, 2, 1, 3])


def views(m: Tensor) -> Any:
    m = m.clone()
    v = m.view(36)[3:9]
    v.fill_(7)
    m.t()[0].mul_(2)
    m[:, 1] = 5
    m.diagonal().zero_()
    m.chunk(2)[0].sub_(1)
    m.as_strided((2, 2), (1, 2), 3).add_(4)
    assert v._base is m
    assert v.untyped_storage().data_ptr() == m.untyped_storage().data_ptr()
    return m, v, m.expand(2, 6, 6), m.unbind(0)


def indexed(m: Tensor) -> Any:
    m, d = m.clone(), m.device
    m[torch.tensor([1, 2], device=d)] = 1.0
    m.index_put_((torch.tensor([0, 0], device=d),), torch.ones(6, device=d), accumulate=True)
    m[m > 2] = 0.0
    m.scatter_(0, torch.zeros(1, 6, dtype=torch.long, device=d), 9.0)
    return m, m[m > 0], m[torch.tensor([1, 2])], m.gather(1, torch.zeros(6, 1, dtype=torch.long, device=d))


def written(m: Tensor) -> Any:
    empty = torch.empty(0, device=m.device)
    other = torch.zeros(2, device=m.device).resize_(5).fill_(1)
    source = torch.empty(0, device=m.device).set_(m.untyped_storage(), 0, (3,), (2,))
    return torch.mm(m, m, out=empty), empty, other, source, m.clone().t_().squeeze_().clamp_(0)


def derivatives(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return out, first, torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    return run


def norms(x: Tensor) -> Any:
    x = x.detach().clone().requires_grad_()
    mean, var = torch.zeros(3, device=x.device), torch.ones(3, device=x.device)
    y = F.batch_norm(x, mean, var, training=True) + F.instance_norm(x) + F.group_norm(x, 3) + F.layer_norm(x, (8, 8))
    (y.square() * x.detach()).sum().backward()
    return y, x.grad, mean, var


class Exp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0]


def trained(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[..., Any]:
    def run(x: Tensor, labels: Tensor) -> Any:
        torch.manual_seed(3)
        layers = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
        net = torch.nn.Sequential(*layers, torch.nn.Linear(256, 6)).to(x.device)
        step = optimizer(net.parameters(), lr=0.1, **options)
        for _ in range(3):
            step.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            step.step()
        return *net.state_dict().values(), functional_call(net, dict(net.named_parameters()), x)

    return run


CASES: dict[str, tuple] = {
    "factories": (lambda m: (torch.zeros_like(m), m.new_full((2,), 3), torch.arange(5, device=m.device)), M),
    "arithmetic": (lambda m: (m + m, m / 2, m**2, m @ m, m > 0, torch.where(m > 0, m, 0.0), m.int()), M),
    "reductions": (lambda m: (m.sum(), m.mean(0), m.max(1), m.std(), m.norm(), m.sort(1), m.topk(2), m.median()), M),
    "views": (views, M),
    "indexing": (indexed, M),
    "out, resize_, set_": (written, M),
    "conv2d": (derivatives(lambda x, w: F.conv2d(x, w, padding=1)), X, W),
    "conv2d, dilated": (derivatives(lambda x, w: F.conv2d(x, w, dilation=2)), X, W),
    "conv2d, depthwise": (derivatives(lambda x, w: F.conv2d(x, w, groups=3)), X, seeded(3, 1, 3, 3)),
    "conv2d, channels last": (lambda x, w: F.conv2d(x.contiguous(memory_format=torch.channels_last), w), X, W),
    "norms": (norms, X),
    "pools": (derivatives(lambda x: F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="nearest"), 2)), X),
    "max pool": (lambda x: F.max_pool2d(x, 2), X),
    "cross entropy": (derivatives(lambda x: F.cross_entropy(x, LABELS.to(x.device), reduction="none")), M[:4]),
    "half to float softmax": (lambda m: F.log_softmax(m, 1, dtype=torch.float), M.half()),
    "linalg": (lambda m: (torch.linalg.cholesky(m @ m.T + 9 * m.new_ones(6).diag()), torch.linalg.solve(m, m)), M),
    "complex": (lambda m: (torch.view_as_complex(m.view(-1, 2)).conj().imag, torch.fft.rfft2(m).abs()), M),
    "attention": (vmap(grad(lambda x: F.scaled_dot_product_attention(x, x, x).square().sum())), X),
    "Function": (derivatives(Exp.apply), M),
    "func.grad": (grad(lambda x: grad(lambda y: Exp.apply(y).sin().sum())(x).cos().sum()), M),
    "vmap": (vmap(lambda x: F.log_softmax(x, 0) @ x), M),
    "vmap of grad": (vmap(grad(lambda x, w: F.conv2d(x[None], w).square().sum()), (0, None)), X, W),
    "vmap over weights": (vmap(lambda x, w: F.conv2d(x, w)), torch.stack([X, X]), torch.stack([W, 2 * W])),
    "jvp": (lambda m: jvp(lambda x: Exp.apply(x).sum(0), (m,), (m,)), M),
    "hessian": (hessian(lambda x: x.pow(3).sum()), M[0]),
    "SGD": (trained(torch.optim.SGD, momentum=0.9), X, LABELS),
    "Adam": (trained(torch.optim.Adam), X, LABELS),
    "AdamW, fused": (trained(torch.optim.AdamW, fused=True), X, LABELS),
    "autocast": (lambda m: torch.autocast(m.device.type, dtype=torch.bfloat16)(F.linear)(m, m), M),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_cpus_and_tensors_the_devices(name: str) -> None:
    function, *tensors = CASES[name]
    on_device = tree_leaves(function(*(t.to("cuda:1") for t in tensors)))
    for here, there in zip(tree_leaves(function(*tensors)), on_device, strict=True):
        assert there.device == torch.device("cuda:1")
        assert there.is_cuda
        assert there.dtype == here.dtype
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize(
    "function",
    [
        lambda: M.cuda() + M,
        lambda: M.to("cuda:0") + M.to("cuda:1"),
        lambda: F.conv2d(X.cuda(), W),
        lambda: M[LABELS.cuda()],
        lambda: F.cross_entropy(M[:4].cuda(), LABELS),
    ],
    ids=["sum", "two devices", "weights", "indices", "labels"],
)
def test_devices_do_not_mix(function: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        function()


def test_random_numbers_are_the_devices() -> None:
    state = torch.get_rng_state()
    torch.cuda.manual_seed(1)
    first = torch.randn(3, device="cuda"), F.dropout(torch.ones(9, device="cuda"))
    torch.cuda.manual_seed(1)
    kept = torch.cuda.get_rng_state()
    again = torch.randn(3, device="cuda"), F.dropout(torch.ones(9, device="cuda"))
    torch.cuda.set_rng_state(kept)
    given = torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert all(map(torch.equal, first, again))
    assert torch.equal(given, torch.randn(3, device="cuda"))
    assert not torch.equal(given.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(1)))
    assert torch.Generator("cuda").manual_seed(7).initial_seed() == 7
    assert torch.equal(state, torch.get_rng_state())
    other = torch.cuda.get_rng_state("cuda:1")
    torch.randn(3, device="cuda:1")
    assert not torch.equal(other, torch.cuda.get_rng_state("cuda:1"))
    with torch.random.fork_rng(["cuda:1"]):
        torch.manual_seed(5)
    assert not torch.equal(other, torch.cuda.get_rng_state("cuda:1"))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_current_device_streams_and_events() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.ones(1, device="cuda").record_stream(stream)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")


def test_the_backward_pass_runs_on_the_streams_of_the_forward_pass() -> None:
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append((torch.cuda.current_device(), torch.cuda.current_stream()))
            return g

    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        out = Seen.apply(torch.ones(2, device="cuda:1", requires_grad=True))
    out.sum().backward()
    assert seen == [(1, stream)]


def test_memory_statistics() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device="cuda")
    view, y = x[:5], x + 1
    assert torch.cuda.memory_allocated() == before + 8000
    assert torch.cuda.memory_allocated(1) == 0
    del x, y
    assert torch.cuda.memory_allocated() == before + 4000
    del view
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 8000
    assert torch.cuda.memory_reserved() >= before + 8000
    free, total = torch.cuda.mem_get_info()
    assert free == total - before


def test_pinned_memory() -> None:
    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned()
    assert pinned[2:].is_pinned()
    assert not torch.ones(4).is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert torch.equal(pinned.cuda(non_blocking=True).cpu(), pinned)


def test_operators_of_other_libraries_have_cuda_kernels_of_their_own() -> None:
    foreign = torch.ops.stand_in_foreign
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        on_stream = foreign.twice(torch.ones(1, device="cuda:1"))
    assert on_stream.item() == 2 + 1000 * stream.stream_id
    assert foreign.twice(torch.ones(1, device="cuda:1")).item() == 2
    assert foreign.twice(torch.ones(1)).item() == 2
    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        foreign.of_the_host(torch.ones(1, device="cuda"))
    with torch.library._scoped_library("stand_in_python", "DEF") as library:
        library.define("thrice(Tensor x) -> Tensor")
        library.impl("thrice", lambda x: 3 * x, "CUDA")
        assert torch.ops.stand_in_python.thrice(torch.ones(1, device="cuda")).item() == 3


def test_a_launch_beside_the_current_device_fails() -> None:
    with pytest.raises(RuntimeError, match="a launch on cuda:1 while cuda:0 is current"):
        torch.ops.stand_in_foreign.twice_without_guard(torch.ones(1, device="cuda:1"))


def test_copies_and_files(tmp_path: Path) -> None:
    m = M.to("cuda:1")
    assert copy.deepcopy(m).device == m.device
    torch.save(m, tmp_path / "m")
    loaded = torch.load(tmp_path / "m")
    assert loaded.device == m.device
    assert torch.equal(loaded, m)


def test_torch_is_itself_again_without_the_devices() -> None:
    program = """
import torch
from stand_in.plugin import devices
with devices.devices():
    assert torch.cuda.is_available()
    x = torch.ones(2, device="cuda", requires_grad=True)
    x.sum().backward()
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
assert not hasattr(torch._C, "_cuda_getDeviceCount")
assert torch.UntypedStorage(4).nbytes() == 4
"""
    here = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
