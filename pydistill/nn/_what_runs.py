"""What really runs when a user's module is called, as far as can be told without running it."""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# torch's own forwards: users may replace those of its classes
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    cls: cls.forward
    for cls in (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
        *(nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential),
    )
}
_CALL, _ITERATE = nn.Module.__call__, nn.Sequential.__iter__


class StandIn:
    """A forward or hook of ours on a user's instance, which does not change what it computes."""


def set_on_instance(module: nn.Module) -> str | None:
    """The method of its class that is overridden on the instance ``module`` itself; None if there is none."""
    for name, value in vars(module).items():
        if callable(getattr(type(module), name, None)) and not isinstance(value, StandIn):
            return name
    return None


def why_not_plain(module: nn.Module, *classes: type[nn.Module]) -> str | None:
    """None if ``module`` computes exactly what one of ``classes``, torch's or ours, does; else why it may not."""
    cls = type(module)
    if cls not in classes:
        return f"it is a {cls.__name__}, which may compute something else than {classes[0].__name__}"
    if cls.forward is not _FORWARDS.get(cls, cls.forward) or cls.__call__ is not _CALL:
        return f"{cls.__name__} itself was changed"
    if (name := set_on_instance(module)) is not None:
        return f"its {name} was set on the instance"
    if is_compiled(module):
        return "it is compiled"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands between ``module`` and its forward."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def is_sequential(module: nn.Module) -> bool:
    """Whether ``module`` calls its children one after the other, and nothing else."""
    cls = type(module)
    return (
        cls.forward is _FORWARDS[nn.Sequential]
        and (getattr(cls, "__iter__", None), cls.__call__) == (_ITERATE, _CALL)
        and set_on_instance(module) is None
        and not is_compiled(module)
    )


def taken_apart(module: nn.Module) -> dict[str, str]:
    """Attributes that methods of ``module`` and its parts use other than by calling them, each with such a method."""
    found: dict[str, str] = {}
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    for cls in sorted(classes, key=lambda cls: cls.__qualname__):
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, method in vars(cls).items():
            if not isinstance(method, FunctionType) or name == "__init__":
                continue
            for instruction in dis.get_instructions(method):
                # calling an attribute loads it as a method, flagged by a bit since Python 3.12
                called = sys.version_info >= (3, 12) and instruction.arg is not None and instruction.arg & 1
                if instruction.opname == "LOAD_ATTR" and not called:
                    found.setdefault(instruction.argval, f"{cls.__name__}.{name}")
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs more than just its forward and backward."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not isinstance(hook, StandIn) for hook in module._forward_hooks.values())


def has_global_hooks() -> bool:
    """Whether a call of any module does."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or nn.Module.__call__ is not _CALL
    )


class Unproven(Exception):
    """There is no proof that a forward only calls operators and children. The message says what else it does."""


class Reads:
    """What the forward of a module computes from, besides its arguments, and proof that it changes nothing.

    Its instructions are read, and those of the functions and methods that it calls: it may call children and torch's
    operators, branch and loop; it may not store into anything but its own variables, enter contexts, catch exceptions,
    query types, draw random numbers, or touch objects that are neither modules nor constants.

    Raises:
        Unproven: it does, or might.
    """

    def __init__(self, module: nn.Module):
        cls = type(module)
        if (name := set_on_instance(module)) is not None:
            raise Unproven(f"its {name} was set on the instance")
        if is_compiled(module):
            raise Unproven("it is compiled")
        if cls.__call__ is not _CALL or cls.__getattr__ is not nn.Module.__getattr__:
            raise Unproven(f"{cls.__name__} has a __call__ or __getattr__ of its own")
        if cls.__getattribute__ is not object.__getattribute__:
            raise Unproven(f"{cls.__name__} has a __getattribute__ of its own")
        self._attributes: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        self._methods: list[tuple[type, str, Any]] = [(cls, "forward", cls.forward)]
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[Any] = set()
        self._module = module
        if not is_sequential(module):
            self._read(cls.forward, module)

    def state(self) -> tuple[Any, ...] | None:
        """The current values of what was read, for later comparison; None if the code itself has changed."""
        if any(getattr(cls, name) is not found for cls, name, found in self._methods):
            return None
        if any(namespace.get(name) is not found for namespace, name, found in self._globals):
            return None
        values: list[object] = [tuple(map(id, self._module._modules.values()))]
        for owner, name in self._attributes.values():
            value = getattr(owner, name, None)
            if isinstance(value, nn.Module):
                values.append((id(value), *map(id, value._modules.values())))
            else:
                values.append((type(value), value) if _is_constant(value) else id(value))
        return tuple(values)

    def _read(self, function: Any, module: nn.Module | None) -> None:
        if not isinstance(function, FunctionType):
            raise Unproven(f"it calls {function!r}")
        code = function.__code__
        if (code, module) in self._seen:
            return
        self._seen.add((code, module))
        if code.co_freevars or code.co_cellvars:
            raise Unproven(f"{function.__qualname__} shares variables with other functions")
        me = None if module is None else code.co_varnames[0]
        before: Any = _UNKNOWN  # what the previous instruction left, if known
        for instruction in dis.get_instructions(code):
            name, value = instruction.opname, instruction.argval
            if name in _NOTHING:
                continue
            if not name.startswith(_HARMLESS):
                raise Unproven(f"{function.__qualname__} does {name}")
            attribute = name in ("LOAD_ATTR", "LOAD_METHOD")
            if before is module is not None and not attribute:
                raise Unproven(f"{function.__qualname__} hands its module on")
            if attribute:
                before = self._attribute(before, value)
            elif name == "LOAD_GLOBAL":
                before = self._global(function, value)
            elif "_FAST" in name:
                names = value if isinstance(value, tuple) else (value,)
                if me in names[:-1] or (me in names and "LOAD" not in name):
                    raise Unproven(f"{function.__qualname__} hands its module on")
                before = module if me is not None and names[-1] == me else _UNKNOWN
            else:
                before = _UNKNOWN

    def _attribute(self, of: Any, name: str) -> Any:
        if isinstance(of, ModuleType):
            found = getattr(of, name, None)
            if isinstance(found, ModuleType) and _is_torchs(found):
                return found
            if name not in _OPERATORS and not isinstance(found, torch.dtype):
                raise Unproven(f"it uses {of.__name__}.{name}")
            return _UNKNOWN
        if not isinstance(of, nn.Module):
            # a tensor's attribute, unless it is that of a module from a loop or an index
            if name not in _OPERATORS or any(name in vars(m) or hasattr(type(m), name) for m in self._module.modules()):
                raise Unproven(f"it uses .{name} of something")
            return _UNKNOWN
        if isinstance(inspect.getattr_static(type(of), name, None), property):
            raise Unproven(f"it reads the property {name}")
        found = getattr(of, name, _UNKNOWN)
        if isinstance(found, MethodType) and found.__self__ is of and name not in vars(of):
            self._methods.append((type(of), name, found.__func__))
            self._read(found.__func__, of)
            return _UNKNOWN
        if not isinstance(found, nn.Module) and not _is_constant(found):
            raise Unproven(f"it reads {name}, a {type(found).__name__}")
        self._attributes[id(of), name] = (of, name)
        return found if isinstance(found, nn.Module) else _UNKNOWN

    def _global(self, function: FunctionType, name: str) -> Any:
        namespace = function.__globals__
        if name not in namespace:
            if name not in _BUILTINS or not hasattr(builtins, name):
                raise Unproven(f"it uses {name}")
            return _UNKNOWN
        found = namespace[name]
        self._globals.append((namespace, name, found))
        if isinstance(found, ModuleType) and _is_torchs(found):
            return found
        if _is_constant(found) or any(found is getattr(of, name, None) for of in (torch, F) if name in _OPERATORS):
            return _UNKNOWN
        if not isinstance(found, FunctionType) or found.__module__.partition(".")[0] == "torch":
            raise Unproven(f"it uses {name}")
        self._read(found, None)
        return _UNKNOWN


_UNKNOWN = object()
_NOTHING = ("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "PRECALL", "PUSH_NULL", "RESUME", "RESUME_CHECK")
_HARMLESS = (
    *("LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_ASSERTION_ERROR"),
    *("LOAD_COMMON_CONSTANT", "STORE_FAST", "CALL", "KW_NAMES", "POP_", "COPY", "SWAP", "DUP_", "ROT_", "RETURN_"),
    *("BINARY_", "INPLACE_", "UNARY_", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "TO_BOOL", "JUMP_", "RAISE_VARARGS"),
    *("BUILD_TUPLE", "BUILD_LIST", "BUILD_SLICE", "BUILD_STRING", "FORMAT_", "CONVERT_VALUE", "UNPACK_SEQUENCE"),
    *("LIST_EXTEND", "GET_ITER", "FOR_ITER", "END_FOR"),
)
_BUILTINS = (
    *("len", "int", "float", "bool", "range", "min", "max", "sum", "abs", "tuple", "list", "slice", "zip", "enumerate"),
    *("AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError"),
)
_OPERATORS = {name for name in dir(Tensor) if not name.startswith("_")}
_OPERATORS |= {name for name in dir(F) if not name.startswith("_") and callable(getattr(F, name))}
_OPERATORS |= {"cat", "stack", "is_scripting", "is_tracing"}


def _is_torchs(found: ModuleType) -> bool:
    return found.__name__.partition(".")[0] == "torch"


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or type(value) in (bool, int, float, str, torch.dtype)
