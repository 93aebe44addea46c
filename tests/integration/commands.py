"""Commands of ``pydistill`` as they are called, and what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pydistill.cli import main

OPTIONS = {
    "width": 4,
    "depth": 2,
    "image-size": 8,
    "num-experts": 2,
    "train-epochs": 2,
    "expert-epochs": 1,
    "max-start-epoch": 2,
    "syn-steps": 10,
    "iterations": 40,
    "checkpoint-every": 7,
    "student-epochs": 5,
    "whole-epochs": 1,
    "students": 2,
}
SMALL = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]


def start(*arguments, **options):
    command = [sys.executable, "-m", "pydistill.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(folder: Path, phase: str) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["phase"] == phase]


def refused(capsys, *arguments):
    """The one line that a command prints before it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error
