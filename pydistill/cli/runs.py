"""The commands that run a method: options from its dataclasses, a run of it, and a table of the results."""

from __future__ import annotations

import inspect
import os
import shlex
import time
from dataclasses import MISSING, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import rich.console
import tyro

from pydistill._arguments import not_one_of
from pydistill.cli.console import Bars, Stop
from pydistill.cli.options import by_options, given_in, names_of, parsed, value_of
from pydistill.cli.tables import table_of
from pydistill.data import read_safetensors
from pydistill.methods import DECOUPLED, METHODS, Config
from pydistill.methods.decoupled.relabel import Relabel
from pydistill.methods.folder import options_in
from pydistill.methods.method import Inputs, Method, OptionError
from pydistill.methods.runs import Interrupted, Run

__all__ = ["distill", "select", "step"]

# where a command's results go by default
_FOLDERS = {"squeeze": "teacher", "recover": "recovered", "relabel": "labels", "post-train": "student"}


@dataclass(frozen=True)
class _New:
    out: Path | None = None
    """Folder that receives all results, new or empty; a new one under runs/ by default."""


@dataclass(frozen=True)
class _Place(_New):
    resume: bool = False
    """Continue the run in --out, where it was cut off; what is not given is as it was."""


@dataclass(frozen=True)
class _Step(_Place):
    method: Literal["sre2l", "cda", "dwa", "infer", "random"] | None = None
    """Whose presets to use: by default sre2l's, and for labels those of the method that made the images. squeeze and
    post-train are the same for all methods; random takes real images as they are, as a baseline."""
    out: Path | None = None
    """Folder that receives the teacher.safetensors of squeeze, the distilled.safetensors of recover, the labels.store
    of relabel or the student.safetensors of post-train; new or empty."""


def distill(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill``."""
    typed = argv[0] if argv and not argv[0].startswith("-") else None
    name, rest = typed or "mtt", argv[1:] if typed else argv
    methods = {n: m for n, m in METHODS.items() if m.group in ("images", "networks")}
    if typed is not None and typed not in methods:
        raise ValueError(f"distill: {not_one_of(methods, typed)}; pydistill --help has all commands")
    if "--resume" not in rest:
        method = methods[name]
        config, inputs = _presets(method, rest)
    else:
        out, kept = _to_resume(rest, name)
        made = kept.get("command", kept.get("method", name))
        if made not in methods or (typed is not None and made != typed):
            raise ValueError(f"distill: expected {made} as the run in {out} is, got {typed or 'none'}")
        method = methods[made]
        config, inputs = _of_run(method, kept, out)
    _run(f"distill {method.name}", config, inputs, rest, console, stop)


def select(name: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``select`` and the method."""
    _run(f"select {name}", *_presets(METHODS[name], argv), argv, console, stop)


def step(name: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows a step of the decoupled methods; --method selects the presets of one of them."""
    chosen = value_of(argv, "--method")
    if chosen is not None and chosen not in DECOUPLED:
        raise OptionError("method", not_one_of(DECOUPLED, chosen))
    if "--resume" in argv:
        out, kept = _to_resume(argv, name)
        made = kept.get("command", kept.get("method"))
        if made != name:
            raise OptionError("out", f"expected a run of {name} to go on with, {out} has one of {made}")
        if name == "recover" and chosen not in (None, kept["method"]):
            raise OptionError("method", f"expected {kept['method']} as the run in {out} has, got {chosen}")
        config, inputs = _of_run(DECOUPLED[kept["method"]] if name == "recover" else METHODS[name], kept, out)
    else:
        config, inputs = _step_presets(name, argv, chosen)
    _run(name, config, inputs, argv, console, stop, _Step(out=Path(_FOLDERS[name])))


def _step_presets(name: str, argv: list[str], chosen: str | None) -> tuple[Method, Inputs]:
    method: type[Method] = DECOUPLED[chosen or "sre2l"] if name == "recover" else METHODS[name]
    made = {"recover": ("--teacher", "teacher"), "relabel": ("--images", "distilled")}
    made["post-train"] = made["relabel"]
    about: dict[str, Any] = {}
    if name == "squeeze":
        about["dataset"] = value_of(argv, "--dataset") or "digits"
    elif path := value_of(argv, made[name][0]):
        about = read_safetensors(path, made[name][1])[1]["config"]
    dataset = about.get("dataset", "")
    if method is Relabel:
        config: Method = Relabel.nearest_preset(dataset, chosen or about.get("method", ""))
    else:
        config = method.nearest_preset(dataset)
    given = {"dataset": dataset} if name == "squeeze" else {}
    wanted = [f.name for f in fields(method.inputs) if f.default is MISSING]
    return config, method.inputs.for_method(config, **given, **dict.fromkeys(wanted, tyro.MISSING))


def _presets(method: type[Method], argv: list[str]) -> tuple[Method, Inputs]:
    """The presets for the data set and the images per class in ``argv``, for options that are not given."""
    dataset, given = value_of(argv, "--dataset") or "digits", {}
    if issubclass(method, Config):
        ipc = value_of(argv, "--ipc") or "1"
        if not ipc.lstrip("-").isdecimal():
            raise OptionError("ipc", f"expected a whole number, got {ipc!r}")
        given["ipc"] = int(ipc)
    config = method.nearest_preset(dataset, **given)
    return config, method.inputs.for_method(config, dataset=dataset)


def _to_resume(argv: list[str], of: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the run to go on with, and its options."""
    out = value_of(argv, "--out")
    if not out:
        option = "out" if given_in(argv, ["out"]) else "resume"
        expected = "the folder of the run to go on with"
        reason = f"expected {expected}, got none" if option == "out" else f"expected --out with {expected}"
        raise OptionError(option, reason)
    return Path(out), options_in(Path(out), of)


def _of_run(method: type[Method], kept: dict[str, Any], out: Path) -> tuple[Method, Inputs]:
    """The hyper-parameters and inputs of the run to resume; `tyro.MISSING` for needed inputs that its folder lacks."""
    path, wanted = out / "config.json", f"the options of a run of {method.name}"
    found: dict[str, Any] = {}
    for f in fields(method.inputs):
        if f.name in kept:
            value = kept[f.name]
            if "Path" in str(f.type) and value is not None:
                value = tuple(map(Path, value)) if isinstance(value, list) else Path(value)
            found[f.name] = value
        elif f.default is MISSING:
            found[f.name] = tyro.MISSING
    try:
        own = {f.name for f in fields(method)} - {"precision"}  # type: ignore[arg-type]  # every method is a dataclass
        more = {"precision": kept["precision"]} if "precision" in kept else {}  # which older runs do not name
        options = kept["config"] if "config" in kept else {name: kept[name] for name in own} | more
        return method(**options), method.inputs(**found)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected {wanted}; it holds other fields ({error})") from error


def _run(
    words: str,
    default: Method,
    inputs: Inputs,
    argv: list[str],
    console: rich.console.Console,
    stop: Stop,
    place: _New | None = None,
) -> None:
    place = place or (_Place() if default.resumable else _New())
    given, place, config = _of_parts(words, {"run": inputs, "folder": place, "method": default}, argv)
    with by_options(given, place, config):
        _go(words, given, place, config, argv, console, stop)


def _go(
    words: str, given: Any, place: _New, config: Method, argv: list[str], console: rich.console.Console, stop: Stop
) -> None:
    resume = getattr(place, "resume", False)
    out = place.out
    if out is None and "WORLD_SIZE" in os.environ:
        raise OptionError("out", "expected a folder, which several processes have to agree on")
    if not resume:
        config.check_used(given, given_in(argv, names_of(config, given)))
    began = time.monotonic()
    with Bars(console) as bars:
        out = out or Path("runs") / f"{_name(config, given)}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = Run(
            config,
            given,
            out=out,
            resume=resume,
            stop=lambda: stop.requested,
            on_progress=bars.show,
            tell=console.print,
        )
        try:
            job = run.go()
        except Interrupted:
            console.print(f"stopped; {_how_to_go_on(words, run)}")
            raise
    if run.first:
        shown = table_of(job)
        figures = "".join(each for each in shown if isinstance(each, str))
        for table in (each for each in shown if not isinstance(each, str)):
            console.print(table)
        files, verb = " and ".join(job.made), "are" if len(job.made) > 1 else "is"
        console.print(f"{figures}{time.monotonic() - began:.0f} s; {files} {verb} in {out}")


def _of_parts(words: str, parts: dict[str, Any], argv: list[str]) -> tuple[Any, ...]:
    """What ``argv`` makes of the parts; their names are titles of the help, in this order."""
    default = parts["method"]
    types = [(name, tyro.conf.OmitArgPrefixes[type(part)]) for name, part in parts.items()]  # type: ignore[misc]  # made here
    command = make_dataclass("Command", types)
    command.__doc__ = f"{default.about}.\n\n{_description(default)}"
    found = parsed(command, words, argv, default=command(**parts))
    return tuple(getattr(found, name) for name in parts)


def _description(default: Method) -> str:
    """The job's own description."""
    return inspect.getdoc(get_type_hints(type(default).job)["return"]) or ""


def _name(config: Method, inputs: Any) -> str:
    ipc = f"-ipc{config.ipc}" if isinstance(config, Config) else ""
    return f"{config.name}-{inputs.dataset}{ipc}"


def _how_to_go_on(words: str, run: Run) -> str:
    if not run.begun:
        resumable = run.method.resumable
        return "nothing was begun, the same command starts anew" if resumable else "the same command starts anew"
    folder = shlex.quote(str(run.folder))
    return f"go on with: pydistill {words.split()[0]} --out {folder} --resume"
