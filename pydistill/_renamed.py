"""Names that changed, of arguments and of homes: the old ones work until 1.0, with a warning."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Function], Function]:
    """Decorates a function whose keyword arguments got new names: ``renamed(old="new")``."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old, new in names.items():
                if old in options:
                    if new in options:
                        raise TypeError(f"{function.__qualname__}: {old} is the former name of {new}; both were given")
                    warn(f"{function.__qualname__}: the argument {old} is called {new} now")
                    options[new] = options.pop(old)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


def moved(module: str, names: dict[str, str], depth: int = 1) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module from which names have moved: each with the module that is its home.

    ``depth``: how many calls it is below whoever wants the name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name} is {names[name]}.{name} now", depth)
        return getattr(importlib.import_module(names[name]), name)

    return find


def warn(message: str, depth: int = 1) -> None:
    """For whoever called the function that calls this, or is ``depth`` calls above it."""
    if torch.compiler.is_dynamo_compiling():  # which follows no warning
        return
    if sys._getframe(1 + depth).f_globals.get("__name__") == "importlib._bootstrap":
        return  # `from module import name` asks twice: first whether the name is there
    warnings.warn(f"{message}; the old name goes with 1.0", DeprecationWarning, stacklevel=2 + depth)
