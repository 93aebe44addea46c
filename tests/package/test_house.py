"""Imports go downwards: which part of the package may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pydistill

PACKAGE = Path(pydistill.__file__).parent

# from the ground up: a room imports from the floors below its own, and from itself
FLOORS = (
    ("_C", "_C_cuda", "_host", "_arguments"),
    ("_atomic", "_devices", "_library", "_on_demand", "_renamed", "_torch_files"),
    ("seeding", "whitening", "reference", "triton"),
    ("_store_file", "ops"),
    ("nn", "augment", "divergence", "select"),
    ("trajectory", "data"),
    ("matching", "labels", "evaluate", "compat", "testing"),
    ("methods",),
    ("info",),
    ("cli", "bench"),
)
# within pydistill.methods; its __init__ is above them all
METHODS = (
    ("_moved", "precision", "ranks"),
    ("method",),
    ("folder", "settings", "training", "outer"),
    ("picture", "runs"),
    ("distilling",),
    ("config",),
    ("networks",),
    ("matching", "selection"),
    ("trajectory", "decoupled"),
)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports when it runs, by full name."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or PACKAGE / "bench" in path.parents, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("pydistill.")}


def floor(name: str, floors: tuple[tuple[str, ...], ...]) -> int | None:
    return next((number for number, rooms in enumerate(floors) if name in rooms), None)


def upward(prefix: str, folder: Path, floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """What is imported from the same floor or a higher one; and rooms on no floor."""
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        if (own := floor(room, floors)) is None:
            wrong.append(f"{room}: on no floor")
            continue
        for name in imported(path):
            if not name.startswith(f"{prefix}."):
                continue
            other = name.removeprefix(f"{prefix}.").split(".")[0]
            number = floor(other, floors)
            if other != room and number is not None and number >= own:
                wrong.append(f"{path.relative_to(folder)} imports {name}")
    return wrong


def test_imports_go_downwards():
    assert upward("pydistill", PACKAGE, FLOORS) == []


def test_imports_of_the_methods_go_downwards():
    assert upward("pydistill.methods", PACKAGE / "methods", METHODS) == []
    low = {room for rooms in METHODS for room in rooms} - {"__init__"}
    # nothing below uses the table of all methods
    for path in (PACKAGE / "methods").rglob("*.py"):
        if path != PACKAGE / "methods" / "__init__.py":
            names = {name.split(".")[2] for name in imported(path) if name.startswith("pydistill.methods.")}
            assert names <= low, path


def test_what_the_documentation_names_can_be_reached():
    for room in ("data", "evaluate", "info", "methods", "testing", "trajectory"):
        assert getattr(pydistill, room).__name__ == f"pydistill.{room}"
    assert pydistill.ops.Workspace().at_least(1).numel() >= 1
    assert issubclass(pydistill.trajectory.DivergedError, FloatingPointError)
    assert issubclass(pydistill.trajectory.NonFiniteError, FloatingPointError)
