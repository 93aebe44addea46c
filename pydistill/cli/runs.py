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

from pydistill.cli.console import Bars, Stop
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
    resume: bool = False
    """Continue the run in --out, where it was cut off; the other options have to be given again."""


def distill(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill``."""
    typed = argv[0] if argv and not argv[0].startswith("-") else None
    name, rest = typed or "mtt", argv[1:] if typed else argv
    methods = {n: m for n, m in METHODS.items() if m.group in ("images", "networks")}
    kept = _options_to_resume(name, rest) if "--resume" in argv else None
    if kept is not None and typed is None:
        name = kept.get("method", name)
    if name not in methods:
        reason = f"expected one of {', '.join(methods)}, got {name!r}; pydistill --help has all commands"
        raise ValueError(f"method: {reason}")
    method = methods[name]
    if kept is None:
        config, inputs = _presets(method, rest)
    else:
        if kept.get("method", name) != name:
            raise OptionError("method", f"expected {kept['method']} as the run has, got {name}")
        config, inputs = _of_run(method, kept, Path(str(value_of(rest, "--out"))))
    _run(f"distill {name}", config, inputs, rest, console, stop)


def select(name: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``select`` and the method."""
    _run(f"select {name}", *_presets(METHODS[name], argv), argv, console, stop)


def step(name: str, argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows a step of the decoupled methods; --method selects the presets of one of them."""
    chosen = value_of(argv, "--method")
    if chosen is not None and chosen not in DECOUPLED:
        raise ValueError(f"--method: expected one of {', '.join(DECOUPLED)}, got {chosen!r}")
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
    inputs = method.inputs.for_method(config, **given, **dict.fromkeys(wanted, tyro.MISSING))
    _run(name, config, inputs, argv, console, stop, _Step(out=Path(_FOLDERS[name])))


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


def _options_to_resume(name: str, argv: list[str]) -> dict[str, Any]:
    out = value_of(argv, "--out")
    if not out:
        raise OptionError("resume", "expected --out with the folder of the run to go on with")
    return options_in(Path(out), name)


def _of_run(method: type[Method], kept: dict[str, Any], out: Path) -> tuple[Method, Inputs]:
    """The hyper-parameters and inputs of the run to resume, as far as its folder has them."""
    path, wanted = out / "config.json", f"the options of a run of {method.name}"
    known = {f.name for f in fields(method.inputs)}
    given = {name: value for name, value in kept.items() if name in known}
    given |= {name: Path(given[name]) for name in ("root", "experts") if given.get(name)}
    try:
        return method(**kept["config"]), method.inputs(**given)
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
    given, place, config = _parsed(words, {"run": inputs, "folder": place, "method": default}, argv)
    resume = getattr(place, "resume", False)
    out = place.out
    if resume and out is None:
        raise OptionError("resume", "expected --out with the folder of the run to go on with")
    if out is None and "WORLD_SIZE" in os.environ:
        raise OptionError("out", "expected a folder, which several processes have to agree on")
    if not resume:
        differs = {f.name for f in fields(given) if getattr(given, f.name) != getattr(inputs, f.name)}
        given.check_given({name: getattr(given, name) for name in differs})
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


def _parsed(words: str, parts: dict[str, Any], argv: list[str]) -> tuple[Any, ...]:
    """What ``argv`` makes of the parts; their names are titles of the help, in this order."""
    default = parts["method"]
    types = [(name, tyro.conf.OmitArgPrefixes[type(part)]) for name, part in parts.items()]  # type: ignore[misc]  # made here
    command = make_dataclass("Command", types)
    command.__doc__ = f"{default.about}.\n\n{_description(default)}"
    config = (tyro.conf.FlagCreatePairsOff,)
    found = tyro.cli(command, args=argv, prog=f"pydistill {words}", default=command(**parts), config=config)
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
    if isinstance(run.method, Config):
        return f"go on with: pydistill distill --out {folder} --resume"
    return f"go on with the same options and: --out {folder} --resume"


def value_of(argv: list[str], flag: str) -> str | None:
    """The last value of ``flag`` in ``argv``, before the actual parsing, which refuses a flag without one."""
    found = None
    for i, part in enumerate(argv):
        if part.startswith(f"{flag}="):
            found = part.removeprefix(f"{flag}=")
        elif part == flag and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            found = argv[i + 1]
    return found
