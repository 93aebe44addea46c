"""A command's options: how they are parsed, and how what is wrong with them is said: in one line, by their names."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

from pydistill._arguments import meant
from pydistill.methods.method import OptionError

__all__ = ["as_options", "by_options", "given_in", "names_of", "parsed", "value_of"]

Command = TypeVar("Command")

# arguments of Python that options with other names become
_ALIASES = {"distilled": "images", "store": "labels", "strategy": "augment", "teachers": "teacher"}
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def parsed(command: type[Command], words: str, argv: Sequence[str], default: Command | None = None) -> Command:
    """The command that ``argv`` makes, or its help; ValueError, in a line, for what is not understood."""
    said = io.StringIO()
    options: dict[str, Any] = {"prog": f"pydistill {words}", "config": (tyro.conf.FlagCreatePairsOff,)}
    options |= {} if default is None else {"default": default}
    try:
        with contextlib.nullcontext() if {"-h", "--help"} & {*argv} else _plainly(said):
            made: Command = tyro.cli(command, args=argv, **options)
            return made
    except SystemExit as stopped:
        if not stopped.code:
            raise
        parts = [] if default is None else vars(default).values()
        raise ValueError(as_options(_refusal(said.getvalue(), words), names_of(*parts))) from None


@contextlib.contextmanager
def _plainly(said: io.StringIO) -> Iterator[None]:
    """What is printed in the block goes to ``said``: without colours, in ASCII, in lines that are not broken."""
    kept = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        del os.environ["COLUMNS"]
        if kept is not None:
            os.environ["COLUMNS"] = kept


def _refusal(box: str, words: str) -> str:
    """What tyro says of what it refuses, in a line: a title, and parts of text between lines of hyphens."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        if set(line.strip()) == {"-"}:
            parts.append([])
        else:
            parts[-1].append(line.removeprefix("  ").rstrip())
    del parts[0]
    said = " ".join(part.strip() for part in parts[0]).strip()
    help_says = f"pydistill {words} --help has all options"
    if found := re.fullmatch(r"Unrecognized options: (.*)", said):
        tokens = found[1].split(", ")
        token = next((token for token in tokens if token.startswith("-")), tokens[0])
        known = re.findall(r"--[\w-]+", " ".join(line for part in parts[1:-1] for line in part if line[:6] == "    --"))
        return f"{token}: pydistill {words} has no such option{meant(token, known)}; {help_says}"
    if found := re.match(r"Missing value for argument '([^']*)'", said):
        return f"{found[1]}: expected a value, got none"
    if said.startswith("Missing from"):
        missing = [line.split()[0] for line in parts[0] if re.match(r" {4}\S", line)]
        return f"{', '.join(missing)}: expected a value, got none; {help_says}"
    if found := re.match(r"invalid choice '(.*)' for argument '([^']*)'. Expected one of (\(.*\))", said):
        choices = re.findall(r"'([^']*)'", found[3])
        if "None" in choices:  # then they come from a set, in another order each time
            choices = sorted({*choices} - {"None"})
        return f"{found[2]}: expected one of {', '.join(choices)}, got {found[1]!r}{meant(found[1], choices)}"
    if found := re.match(r"Error parsing (--[\w-]+): .*?(?:'(.*)'|\['(.*)'\].*)", said):
        metavar = next((line.split()[-1] for part in parts[1:] for line in part if line.strip().startswith("--")), "")
        wanted = next((text for kind, text in _KINDS.items() if kind in metavar), metavar)
        got = next(value for value in (*re.findall(r"\['(.*?)'\]", said), found[2], "") if value is not None)
        return f"{found[1]}: expected {wanted}, got {got!r}"
    return re.sub(r"^Error parsing \w+: ", "", said)


def names_of(*parts: Any) -> set[str]:
    """Of the fields of dataclasses."""
    return {f.name for part in parts if is_dataclass(part) for f in fields(part)}


@contextlib.contextmanager
def by_options(*parts: Any) -> Iterator[None]:
    """Errors of the block name the options of ``parts``, dataclasses, where they would name arguments of Python."""
    names = names_of(*parts)
    try:
        yield
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if isinstance(error, OptionError):
            error.reason = as_options(error.reason, names)
        elif len(error.args) == 1:  # or it is the system's
            error.args = (as_options(str(error), names),)
        raise


def as_options(message: str, names: Collection[str]) -> str:
    """A message about the arguments of Python in ``names``, of ``name: ...`` and ``name=value``, about options."""
    known = {name: name for name in names} | {
        alias: name for alias, name in _ALIASES.items() if name in names and alias not in names
    }
    if not known:
        return message
    any_name = "|".join(sorted(known, key=len, reverse=True))

    def flag(name: str) -> str:
        return f"--{known[name].replace('_', '-')}"

    def assigned(found: re.Match[str]) -> str:
        return flag(found[1]) + (f" {found[2]}" if found[2] not in ("", "True") else "")

    message = re.sub(rf"^({any_name}):", lambda found: f"{flag(found[1])}:", message)
    return re.sub(rf"(?:(?<=\s)|(?<=\s\())({any_name})=('[^']*'|[\w.+-]*\w|)", assigned, message)


def given_in(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Which options of these names are given in ``argv``."""
    flags = {part.split("=")[0].removeprefix("--").replace("-", "_") for part in argv if part.startswith("--")}
    return [name for name in names if name in flags]


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value of ``flag`` in ``argv``, before the actual parsing, which refuses a flag without one."""
    found = None
    for i, part in enumerate(argv):
        if part.startswith(f"{flag}="):
            found = part.removeprefix(f"{flag}=")
        elif part == flag and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            found = argv[i + 1]
    return found
