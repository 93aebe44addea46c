"""What is measured on a GPU, in the order in which it is worth knowing."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import ours
from ..block_forms import minimum_bytes
from ..case import CONVNET, SMALL, Case, Point, relative_error
from ..peers import eager
from ..peers.problem import make_problem
from ..registry import CASES
from . import cases
from .parity import parity, uses
from .session import Item, Line, Wrong, worst

Thunk = Callable[[], Any]
STEPS = 20  # of the trajectory


def on_device(value: Any, device: str = "cuda") -> Any:
    """The problem with its tensors and networks on the device."""
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(on_device(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_device(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value


def medians(thunks: dict[str, Thunk], rounds: int) -> dict[str, float]:
    """Milliseconds of a call on the device's clock, interleaved; each has run before."""
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(rounds):
        for name, thunk in thunks.items():
            samples[name].append(1e3 * cases.device_seconds(thunk, calls=1))
    return {name: statistics.median(values) for name, values in samples.items()}


# ---- the machine


def environment(tiny: bool) -> Line:
    from pydistill import info

    properties = torch.cuda.get_device_properties(0)
    told = info.collect()
    found: Line = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "toolkit of torch": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": properties.total_memory / 2**30,
        "info": {key: str(value) for key, value in told.items() if key != "operators"},
        "operators": told["operators"],
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    return found | {"nvidia-smi": _nvidia_smi()}


def _nvidia_smi() -> list[dict[str, str]] | str:
    """What it says of every card, or why it says nothing."""
    query = "index,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    if not (program := shutil.which("nvidia-smi")):
        return "not installed"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return [dict(zip(query.split(","), line.split(", "), strict=False)) for line in told.splitlines()]


def ceilings(tiny: bool) -> Line:
    """The most that this device copies and multiplies, by torch's own calls; and its clocks while it does."""
    numbers = 1 << (16 if tiny else 29)
    source = torch.zeros(numbers, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found: Line = {"copy GB/s": 2 * numbers / _best(lambda: target.copy_(source)) / 1e9}
    size = 64 if tiny else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            a = torch.randn(size, size, device="cuda", dtype=dtype)
            seconds = _best(partial(torch.mm, a, a))
            found[f"{precision} TFLOP/s"] = 2 * size**3 / seconds / 1e12
            for _ in range(min(1000, int(1 / seconds))):  # a second of work, during which the clocks are read
                torch.mm(a, a)
            found[f"clocks, {precision}"] = _nvidia_smi()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


def _best(thunk: Thunk) -> float:
    thunk()
    return min(cases.device_seconds(thunk) for _ in range(5))


# ---- the trajectory


# what is counted by which names: of the runtime, of the driver (by which Triton launches), and of copies themselves
KINDS = {
    "launches": "cu(da)?Launch(Cooperative)?Kernel.*",
    "replays": "cu(da)?GraphLaunch",
    "captures": "cu(da)?StreamBeginCapture.*",
    "copies": "cu(da)?Memcpy.*",
    "copies from or to pageable memory": r"Memcpy .*Pageable.*",  # in which the host waits, too
    "waits": "cu(da)?(Stream|Device|Ctx|Event)Synchronize",
    "allocations": "cuda(Malloc|HostAlloc).*|cuMem(Alloc|Create).*",
}


def counted(names: Iterable[str]) -> dict[str, int]:
    """Of a profile's events: some versions of torch name a call by its version, `cudaLaunchKernel_v7000`."""
    plain = Counter(re.sub(r"(_v\d+)?(_pt[sd][sz])?$", "", name) for name in names)
    return {
        kind: sum(count for name, count in plain.items() if re.fullmatch(pattern, name))
        for kind, pattern in KINDS.items()
    }


def _events(thunk: Thunk) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        thunk()
    return [event.name for event in profile.events()]


def requests(tiny: bool) -> Line:
    """What one call asks of the driver after the first two, by torch's profiler, without what that asks itself."""
    problem = _trajectory(tiny, 3 if tiny else STEPS)
    thunks = _providers(problem, "fp32") | {
        f"pydistill, {each}": _providers(problem, each)["pydistill"] for each in ("tf32", "bf16")
    }
    _events(lambda: None)  # the first profile of a process has more
    own = counted(_events(lambda: None))
    found: Line = {"requests": {}}
    for name, thunk in thunks.items():
        thunk()
        thunk()
        counts = counted(_events(thunk))
        found["requests"][name] = {kind: max(0, count - own[kind]) for kind, count in counts.items()}
    if not found["requests"]["eager"]["launches"]:
        raise Wrong("the profiler saw no launch of the eager loop", found)
    return found


def _trajectory(tiny: bool, steps: int, dtype: torch.dtype = torch.float32) -> Any:
    config = (SMALL if tiny else CONVNET) | {"steps": steps, "dtype": dtype}
    return on_device(make_problem(**config))


def _providers(problem: Any, precision: str) -> dict[str, Thunk]:
    """The eager loop at torch's default switches, our replay of any network, and the student engine."""
    return {
        "eager": eager.prepare(problem),
        "replay": ours.trajectory_match(problem, engine="generic"),
        "pydistill": ours.trajectory_match(problem, engine="student", precision=precision),
    }


def trajectory(precision: str, tiny: bool) -> Line:
    """The exact gradient in images and rate, against the eager loop in float64."""
    steps = 3 if tiny else STEPS
    truth = eager.prepare(_trajectory(tiny, steps, torch.float64))().d_images
    torch.cuda.empty_cache()
    problem = _trajectory(tiny, steps)
    thunks = _providers(problem, precision)
    outputs = {name: [thunk().d_images] for name, thunk in thunks.items()}
    first = {name: 1e3 * cases.device_seconds(thunk, calls=1) for name, thunk in thunks.items()}
    times = medians(thunks, 2 if tiny else 5)
    for name, thunk in thunks.items():
        outputs[name].append(thunk().d_images)  # of graphs that are replayed
    errors = {name: worst([relative_error(each, truth) for each in images]) for name, images in outputs.items()}
    found: Line = {
        "precision": precision,
        "baseline": "eager",
        "ms": times,
        "second call ms": first,
        "image gradient's relative error": errors,
        "flops": {"pydistill": problem.steps * _flops(problem)},
    }
    # a ReLU that turns changes the rest, and torch's default rounds convolutions to tf32
    bound = max({"fp32": 2e-2, "tf32": 0.1, "bf16": 0.3}[precision], 2 * errors["eager"])
    if not errors["pydistill"] <= bound:
        raise Wrong(f"further than {bound:.3g} from float64", found)
    return found


def _flops(problem: Any) -> float:
    """Of one step's convolutions: three times the forward pass for the gradient, and about eight for the tangent where
    it computes the step anew."""
    total = 0

    def count(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in problem.net.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        problem.net(problem.images[problem.batches[0]])
    for hook in hooks:
        hook.remove()
    return 11.0 * total


def memory(tiny: bool) -> Line:
    """Peak of torch's memory above the inputs', by the number of steps: a line for the eager loop; of ours with all
    that "auto" keeps for the backward pass, and with no more than each step's parameters."""
    found: Line = {"MiB": {}}
    for steps in (2, 3) if tiny else (5, 20, 50):
        problem = _trajectory(tiny, steps)
        stored = (steps + 2) * problem.theta0.nbytes
        thunks = {
            "eager": eager.prepare(problem),
            "pydistill": ours.trajectory_match(problem, engine="student"),
            "pydistill, parameters only": ours.trajectory_match(problem, engine="student", memory=stored),
        }
        for name, thunk in thunks.items():
            try:
                found["MiB"][f"{name}, T={steps}"] = _reserved(thunk) / 2**20
            except torch.cuda.OutOfMemoryError:
                found["MiB"][f"{name}, T={steps}"] = None
    return found


def _reserved(thunk: Thunk) -> int:
    """Bytes that a first call takes: with those of graphs, whose pools a later one finds."""
    from pydistill.trajectory import release_graphs

    release_graphs()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    thunk()
    return torch.cuda.max_memory_reserved() - before


def compiled_step(tiny: bool) -> Line:
    """A step's tangent, the larger part of the work, by torch.compile with CUDA graphs and by ours, in tf32."""
    case = cases.GPU_STEP
    points = case.points(case, case.config("quick" if tiny else "full"))
    point = next(point for point in points if point.mode == "tangent tf32")
    providers = ("eager", "compiled", "layers-graph")
    return {"precision": "tf32", **_measured(case, point, point.problem(), providers, 2 if tiny else 10, first=3)}


# ---- the other loops and operators


def _measured(case: Case, point: Point, problem: Any, providers: Sequence[str], rounds: int, *, first: int = 2) -> Line:
    """Times by provider; and the case's checks of the last of the ``first`` calls, which replays captured graphs. They
    come before the times: torch.compile writes its next output over the last one."""
    thunks = {each: case.providers[each].prepare(problem) for each in providers}
    outputs = {}
    for name, thunk in thunks.items():
        for _ in range(first):
            outputs[name] = thunk()
    checks = list(case.check(case.only(providers), point, problem, outputs))
    del outputs
    found: Line = {"baseline": providers[0], "ms": medians(thunks, rounds)}
    if red := [str(check) for check in checks if not check.ok]:
        raise Wrong("; ".join(red), found)
    return found


def block_forms(tiny: bool) -> Line:
    """The fused block's four forms beside eager torch and a copy of as many bytes."""
    case = cases.GPU_BLOCK
    config = case.config("quick" if tiny else "full")
    found: Line = {"ms": {}, "bytes": {}}
    for point in case.points(case, config):
        form, scalar = point.mode.split()
        line = _measured(case, point, point.problem(), ("eager", "pydistill", "copy"), 2 if tiny else 10)
        for name, ms in line["ms"].items():
            found["ms"][f"{point.mode} {point.x} {name}"] = ms
            found["bytes"][f"{point.mode} {point.x} {name}"] = minimum_bytes(form, scalar, config["shape"])
    return found


def of_case(name: str, providers: Sequence[str], tiny: bool) -> Line:
    """A case of `bench.run` with its problem on the device: its first point, its checks, these providers; and as the
    work of each, however it does it, the products of the first and the fewest bytes that have to be moved."""
    case = CASES[name]
    point = case.points(case, case.config("quick" if tiny else "full"))[0]
    problem = on_device(point.problem())
    found = _measured(case, point, problem, providers, 2 if tiny else 5)
    with Products() as products:
        output = case.providers[providers[0]].prepare(problem)()
    work = {"flops": products.flops, "bytes": held_bytes((problem, output))}
    # most products are those of convolutions, which torch rounds by default
    found["precision"] = "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
    return found | {name: dict.fromkeys(providers, amount) for name, amount in work.items()}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions. `FlopCounterMode` does not follow autograd.grad."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def held_bytes(value: Any) -> int:
    """The bytes of all tensors in a value, each memory once: what a call reads and writes at least."""
    found: dict[int, int] = {}
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, nn.Module):
            pending += [*value.parameters(), *value.buffers()]
        elif isinstance(value, (tuple, list)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
        elif is_dataclass(value):
            pending += [getattr(value, f.name) for f in fields(value)]
    return sum(found.values())


def items() -> tuple[Item, ...]:
    """All of them, in their order."""
    return (
        Item("environment", environment),
        Item("ceilings", ceilings),
        *(Item(f"parity {name}", lambda tiny, name=name: parity(name)) for name in uses()),
        *(Item(f"trajectory_match {each}", partial(trajectory, each)) for each in ("fp32", "tf32", "bf16")),
        Item("requests", requests),
        Item("memory", memory),
        Item("compiled step", compiled_step, seconds=180),
        Item("train_students", partial(of_case, "train_students", ("eager", "pydistill"))),
        Item("datadam", partial(of_case, "datadam_step_published", ("eager", "pydistill"))),
        Item("recovery", partial(of_case, "sre2l_recover_step", ("repository", "pydistill"))),
        Item("attention_map_divergence", partial(of_case, "attention_map_divergence", ("eager", "pydistill"))),
        Item("block", block_forms),
        Item("kd_divergence", partial(of_case, "kd_divergence", (CASES["kd_divergence"].baseline, "pydistill"))),
        Item("multi_crop", partial(of_case, "multi_crop", ("eager", "pydistill"))),
    )
