"""Each method has a page, whose command the command line accepts and whose Python line names a preset that exists."""

import ast
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

from pydistill import methods
from pydistill.cli import commands, runs
from pydistill.cli.console import Stop, plain_console
from pydistill.methods import METHODS, Method

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text() for path in (DOCS / "methods").glob("*.md")}


class ParsedError(Exception):
    """Raised with the method and its inputs where the command line would run it."""


def fenced(page, language):
    return re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1]


def test_every_method_has_a_page_and_every_page_a_method():
    assert set(PAGES) == set(METHODS)
    linked = re.findall(r"\(methods/([^)]+)\.md\)", (DOCS / "methods.md").read_text())
    assert len(linked) > 20
    assert set(linked) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_it_names_the_paper_and_is_short(name):
    words = " ".join(PAGES[name].split())
    assert METHODS[name].paper in words
    assert len(PAGES[name].splitlines()) <= 60
    for target in re.findall(r"\]\((?!https://)([^)#]+)", PAGES[name]):
        assert (DOCS / "methods" / target).exists(), target


@pytest.mark.parametrize("name", METHODS)
def test_its_commands_are_understood(name, monkeypatch):
    """Up to where the run would begin; the files of earlier steps are not there."""

    def begin(config, inputs, **place):
        raise ParsedError(config, inputs, place)

    about = {"config": {"dataset": "digits", "method": name}}
    monkeypatch.setattr(runs, "Run", begin)
    monkeypatch.setattr(runs, "read_safetensors", lambda path, kind: ({}, about))
    made = []
    for line in fenced(PAGES[name], "sh").splitlines():
        program, *words = line.split()
        assert program == "pydistill"
        command, rest = commands._chosen(words)
        with pytest.raises(ParsedError) as parsed:
            command.run(rest, plain_console(), Stop())
        config, _, place = parsed.value.args
        assert str(place["out"]).startswith("runs/")
        made.append(config.name)
    assert made[-1] == name


@pytest.mark.parametrize("name", METHODS)
def test_its_python_line_names_a_preset(name):
    tree = ast.parse(fenced(PAGES[name], "python"))
    (run,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run")
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    made = eval(ast.unparse(run.args[0]), {name: getattr(methods, name) for name in imported})
    assert isinstance(made, Method)
    assert type(made) is METHODS[name]
    given = {keyword.arg: Path("file") for keyword in run.keywords if keyword.arg != "out"}
    made.inputs.for_method(made, **given)  # raises for an input that is missing, and for one that there is not


@pytest.mark.parametrize("name", METHODS)
def test_the_primitives_it_names_are_there(name):
    for found in set(re.findall(r"`pydistill((?:\.\w+)+)", PAGES[name])):
        reduce(getattr, found.split(".")[1:], importlib.import_module("pydistill"))
