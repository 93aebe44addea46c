from __future__ import annotations

import os

import pytest
from host_machine import HostMachine

from bench.kernels import build_host_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # Triton's interpreter wraps the functions of its language again at every call of a helper, until a launch ends, and
    # calls them through all of these wrappers: most of its time. In a process that interprets, once is enough.
    _wrap, _wrapped = interpreter._patch_lang, set()

    def _wrap_once(fn: object) -> interpreter._LangPatchScope:
        names = {lang.__name__ for lang in fn.__globals__.values() if lang is tl or lang is tl.core}
        if not names <= _wrapped:
            _wrap(fn)
            _wrapped.update(names)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = _wrap_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the interpreter's process, the part of the tests that `triton_checks.check_in_the_interpreter` asks for."""
    if part := os.environ.get("PYDISTILL_INTERPRETED"):
        items[:] = [item for number, item in enumerate(items) if (number % 7 == 0) == (part == "sample")]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostMachine:
    """The launchers, compiled by g++; a machine without g++ fails here."""
    return HostMachine(build_host_launch(tmp_path_factory.mktemp("host") / "host_launch.so"))
