"""`python -m bench.gpu` from its first item to its table.

Not collected by itself: `test_stand_in.py` runs this file in a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as program
from bench.gpu import cases
from bench.gpu.items import Thunk, items
from bench.gpu.session import Item, Line, Runner, Wrong, lines_in, run_items, summary, waiting


def in_this_process(run: Runner, names: Sequence[str], path: Path, minutes: float, *, tiny: bool) -> None:
    """Instead of `supervise`: another process has no stand-in."""
    assert run_items([item for item in items() if item.name in names], path, minutes, tiny=tiny)


# of one call, as torch 2.11 and later name them; the profiler waits once for the device itself
OF_A_CALL = [
    *("aten::mm", "cudaLaunchKernel", "cudaLaunchKernel_v7000", "cudaLaunchKernelExC_v11060", "cuLaunchKernelEx"),
    *("cudaGraphLaunch_v10000_ptsz", "cudaStreamBeginCapture", "cudaStreamIsCapturing", "cudaStreamWaitEvent"),
    *("cudaMemcpyAsync", "Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pinned)", "cudaMemsetAsync"),
    *("cudaStreamSynchronize_v3020", "cudaEventSynchronize", "Stream Sync", "cudaMalloc", "cuMemCreate", "cudaFree"),
]
ITS_COUNTS = {
    **{"launches": 4, "replays": 1, "captures": 1, "copies": 1, "copies from or to pageable memory": 1},
    **{"waits": 2, "allocations": 2},
}


def test_every_item_has_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.compile does not look through the stand-in, and autograd's thread for it never ends under torch's profiler
    def events(thunk: Thunk) -> list[str]:
        return ["cudaDeviceSynchronize", *(OF_A_CALL if thunk() is not None else [])]

    monkeypatch.setattr("bench.gpu.items._events", events)
    monkeypatch.setitem(cases.GPU_STEP.providers, "compiled", cases.GPU_STEP.providers["eager"])
    monkeypatch.setattr(program, "supervise", in_this_process)
    out = tmp_path / "gpu.jsonl"
    status = program.main(["--tiny", "--out", str(out), "--minutes", "5"])
    lines = lines_in(out)
    assert {line["item"]: line.get("error", "") for line in lines if line["status"] != "ok"} == {}
    assert status == 0
    assert [line["item"] for line in lines] == [item.name for item in items()]
    exact = next(line for line in lines if line["item"] == "trajectory_match fp32")
    assert set(exact["ms"]) == {"eager", "replay", "pydistill"}
    assert exact["image gradient's relative error"]["pydistill"] < 1e-3
    assert exact["flops"]["pydistill"] > 0
    by_name = {line["item"]: line for line in lines}
    assert by_name["kd_divergence"]["bytes"]["pydistill"] > 0
    for name in ("train_students", "datadam", "recovery"):
        assert by_name[name]["flops"]["pydistill"] > by_name[name]["bytes"]["pydistill"] > 0
    asked = next(line for line in lines if line["item"] == "requests")["requests"]
    assert asked == dict.fromkeys(("eager", "replay", "pydistill", "pydistill, tf32", "pydistill, bf16"), ITS_COUNTS)
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("trajectory_match") and " ok " in line for line in table) == 9
    assert sum(line.startswith("pydistill, bf16 asks for: 4 launches, 1 replays") for line in table) == 1
    assert program.main(["--tiny", "--out", str(out)]) == 2  # which has results
    assert capsys.readouterr().err == f"bench.gpu: --out: {out} has results; --resume goes on with them\n"
    assert program.main(["--tiny", "--out", str(out), "--resume"]) == 0
    assert lines_in(out) == lines


def fails(tiny: bool) -> Line:
    raise RuntimeError("no kernel image is available")


def is_wrong(tiny: bool) -> Line:
    raise Wrong("further than 1 from it", {"error of it": 2.0})


def takes_long(tiny: bool) -> Line:
    time.sleep(60)
    return {}


def test_items_are_apart_and_time_ends(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    before: list[str] = []

    def sees_the_lines(tiny: bool) -> Line:
        before.extend(out.read_text().splitlines())
        return {"ms": {"eager": 2.0, "ours": 1.0}, "baseline": "eager", "bytes": {"ours": 1e6}}

    some = [Item("one", fails), Item("two", is_wrong), Item("three", sees_the_lines), Item("four", takes_long)]
    began = time.monotonic()
    assert run_items([*some, Item("five", fails)], out, 2 / 60)
    lines = lines_in(out)
    assert time.monotonic() - began < 20
    assert [(line["item"], line["status"]) for line in lines] == [
        ("one", "failed"),
        ("two", "wrong"),
        ("three", "ok"),
        ("four", "out of time"),
    ]
    assert lines[0]["error"] == "RuntimeError: no kernel image is available"
    assert "fails" in lines[0]["traceback"]
    assert lines[1]["error of it"] == 2.0
    assert [json.loads(text) for text in before] == lines[:2]  # there as soon as they are known
    out.write_text(out.read_text() + '{"item": "fi')  # cut off
    assert run_items([Item("four", lambda tiny: {"tiny": tiny}), Item("six", takes_long, 0.1)], out, 1, tiny=True)
    assert waiting(["four", "five", "six"], out) == ["five"]  # six is too slow, whatever is left
    *again, slow = lines_in(out)
    assert (slow["item"], slow["status"]) == ("six", "too slow")
    assert again == [*lines, {"item": "four", "status": "ok", "seconds": again[-1]["seconds"], "tiny": True}]
    rows = summary([{"item": "ceilings", "status": "ok", "copy GB/s": 2.0}, *again]).splitlines()
    assert any(row.split() == ["three:", "ours", "ok", "1.000", "2.00", "1.0", "(50%)"] for row in rows)


def test_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not run_items([Item("one", fails), Item("two", fails)], tmp_path / "gpu.jsonl", 2)
    assert [line["item"] for line in lines_in(tmp_path / "gpu.jsonl")] == ["one"]
