"""The command line's description of itself."""

from __future__ import annotations

import contextlib
import re
import sys

import pytest

import pydistill
from pydistill.cli import main
from pydistill.cli.commands import COMMANDS
from pydistill.methods import METHODS


def said(capsys: pytest.CaptureFixture[str], argv: list[str], code: int) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == code
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--help", "distill"]])
def test_help_has_every_command_and_method(capsys, argv):
    main(argv)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    words = [command.words for group in COMMANDS.values() for command in group]
    assert err == ""
    assert all(any(line.startswith(f"  {each} ") for line in lines) for each in words)
    assert set(METHODS) <= set(re.findall(r"[\w-]+", out))


def test_without_a_command_it_is_an_error(capsys):
    out, err = said(capsys, [], 2)
    assert out == ""
    assert "usage: pydistill COMMAND" in err


def test_a_command_of_several_has_their_help(capsys):
    main(["select", "--help"])
    out = capsys.readouterr().out
    assert "select dq" in out
    assert "select pca" in out
    assert "squeeze" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["select"], "expected one of select dq, select pca, got 'select'"),
        (["select", "mtt"], "expected one of select dq, select pca, got 'select mtt'"),
        (["recovr"], "got 'recovr'; did you mean recover?"),
        (["frobnicate"], "expected one of bench, distill, evaluate, experts, export, pack, post-train, recover"),
        (["--method", "mtt"], "got '--method'"),
    ],
)
def test_an_unknown_command_is_named(capsys, argv, message):
    _, err = said(capsys, argv, 2)
    assert err.startswith("pydistill: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{pydistill.__version__}\n"


def test_a_full_disk_is_an_error_in_a_line(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        monkeypatch.undo()
        with contextlib.suppress(OSError):  # flushes again what the failed write left
            full.close()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "pydistill: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("words", sorted(c.words for group in COMMANDS.values() for c in group if c.words != "bench"))
def test_each_option_has_a_text_that_stands_alone(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    shown = capsys.readouterr().out
    options = [i for i, line in enumerate(shown.splitlines()) if re.match("[│ ] --[a-z]", line)]
    lines = [line.strip("│ ") for line in shown.splitlines()]
    assert options
    for i in options:
        text = [*re.split(" {2,}", lines[i], maxsplit=1), lines[i + 1]][1]
        assert text[0].isupper() or text.startswith(("replay_buffer_", "package.module", "convnet")), lines[i]
        assert not text.startswith(("Its ", "Their ")), lines[i]
    titles = re.findall("(run|folder|method) options", shown)
    assert titles in ([], ["run", "folder", "method"])
