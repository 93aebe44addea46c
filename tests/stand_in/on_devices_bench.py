"""`python -m bench.gpu` from its first item to its table.

Not collected by itself: `test_stand_in.py` runs this file in a process of its own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as program
from bench.gpu import cases
from bench.gpu.items import items
from bench.gpu.session import Item, Line, Wrong, lines_in, run_items, summary


def test_every_item_has_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.compile does not look through the stand-in, and autograd's thread for it never ends under torch's profiler
    monkeypatch.setattr("bench.gpu.items.requests", lambda thunk: {})
    monkeypatch.setitem(cases.GPU_STEP.providers, "compiled", cases.GPU_STEP.providers["eager"])
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
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("trajectory_match") and " ok " in line for line in table) == 9
    assert program.main(["--tiny", "--out", str(out)]) == 2  # which has results
    assert capsys.readouterr().err == f"bench.gpu: --out: {out} has results; --resume goes on with them\n"
    assert program.main(["--tiny", "--out", str(out), "--resume"]) == 0
    assert lines_in(out) == lines


def fails(tiny: bool) -> Line:
    raise RuntimeError("no kernel image is available")


def is_wrong(tiny: bool) -> Line:
    raise Wrong("further than 1 from it", {"error of it": 2.0})


def takes_long(tiny: bool) -> Line:
    time.sleep(5)
    return {}


def no_restart(minutes: float) -> None:
    pytest.fail("the device was not lost")


def test_items_are_apart_and_time_ends(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    before: list[str] = []

    def sees_the_lines(tiny: bool) -> Line:
        before.extend(out.read_text().splitlines())
        return {"ms": {"eager": 2.0, "ours": 1.0}, "baseline": "eager", "bytes": {"ours": 1e6}}

    some = [Item("one", fails), Item("two", is_wrong), Item("three", sees_the_lines), Item("four", takes_long)]
    began = time.monotonic()
    lines = run_items([*some, Item("five", fails)], out, 0.5 / 60, restart=no_restart)
    assert time.monotonic() - began < 3
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
    again = run_items([Item("four", lambda tiny: {"tiny": tiny})], out, 1, tiny=True, restart=no_restart)
    assert again == [*lines, {"item": "four", "status": "ok", "seconds": again[-1]["seconds"], "tiny": True}]
    rows = summary([{"item": "ceilings", "status": "ok", "copy GB/s": 2.0}, *again]).splitlines()
    assert any(row.split() == ["three:", "ours", "ok", "1.000", "2.00", "1.0", "(50%)"] for row in rows)


def test_a_lost_device_is_got_back_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    left: list[float] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    run_items([Item("one", fails)], tmp_path / "gpu.jsonl", 2, restart=left.append)
    assert len(left) == 1
    assert 1.9 < left[0] <= 2
    called: list[list[str]] = []
    monkeypatch.setattr(program, "items", lambda: (Item("one", fails), Item("two", fails)))
    monkeypatch.setattr(program.os, "execv", lambda path, command: called.append(command))
    program.main(["one", "--out", str(tmp_path / "more.jsonl"), "--minutes", "3", "--tiny"])
    module, name, *options = called[0][1:]
    assert (module, name) == ("-m", "bench.gpu")
    assert options[:3] == ["--out", str(tmp_path / "more.jsonl"), "--resume"]
    assert options[-2:] == ["one", "--tiny"]
