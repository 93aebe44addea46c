"""The methods: one file per paper, each a few lines on top of the primitives; and what runs them end to end.

from pydistill.methods import HeLlO, run
results = run(HeLlO.preset("digits"), out="runs/hello")
"""

import importlib
import pkgutil
import sys

from pydistill.methods._moved import FINDER, MOVED
from pydistill.methods.config import Config
from pydistill.methods.decoupled.cda import CDA
from pydistill.methods.decoupled.dwa import DWA
from pydistill.methods.decoupled.hello import HeLlO
from pydistill.methods.decoupled.infer import INFER
from pydistill.methods.decoupled.post_train import PostTrain
from pydistill.methods.decoupled.recover import RandomImages, Recover
from pydistill.methods.decoupled.relabel import Relabel
from pydistill.methods.decoupled.squeeze import Squeeze, Teacher
from pydistill.methods.decoupled.sre2l import SRe2L
from pydistill.methods.matching.atom import ATOM
from pydistill.methods.matching.datadam import DataDAM
from pydistill.methods.matching.dc import DC
from pydistill.methods.matching.dm import DM
from pydistill.methods.matching.dsa import DSA
from pydistill.methods.matching.fedlgd import FedLGD
from pydistill.methods.matching.krr_st import KRRST, krr_st
from pydistill.methods.method import Method, OptionError
from pydistill.methods.networks.unip import UNIP, distill_attention
from pydistill.methods.outer import State, distill
from pydistill.methods.runs import Interrupted, Progress, Run, run
from pydistill.methods.selection.dq import DQ, quantize
from pydistill.methods.selection.pca import PCA, combine
from pydistill.methods.trajectory.ast import AST
from pydistill.methods.trajectory.datm import DATM
from pydistill.methods.trajectory.ftd import FTD
from pydistill.methods.trajectory.fyi import FYI, FYIDM, FYIDSA
from pydistill.methods.trajectory.mtt import MTT
from pydistill.methods.trajectory.rat_bptt import RaTBPTT
from pydistill.methods.trajectory.tesla import TESLA


def __getattr__(name: str) -> object:
    if f"{__name__}.{name}" in MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if FINDER not in sys.meta_path:
    sys.meta_path.append(FINDER)

# in the order of the help; methods of other files in the rooms follow
_FIRST: tuple[type[Method], ...] = (
    *(MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT),
    *(DC, DSA, DM, DataDAM, ATOM, FYIDM, FYIDSA, FedLGD, KRRST, HeLlO),
    *(Squeeze, SRe2L, CDA, DWA, INFER, RandomImages, Relabel, PostTrain),
    *(DQ, PCA, UNIP),
)


def _all_methods() -> dict[str, type[Method]]:
    found = {method.name: method for method in _FIRST}
    for file in pkgutil.walk_packages(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(file.name)).values():
            own = isinstance(value, type) and issubclass(value, Method) and value.__module__ == file.name
            if own and "name" in vars(value) and found.setdefault(value.name, value) is not value:
                raise ImportError(f"{file.name}: expected a method with a name of its own, got {value.name!r} again")
    return found


METHODS: dict[str, type[Method]] = _all_methods()

# methods that recover images from a squeezed network, and real images as the baseline
DECOUPLED: dict[str, type[Recover]] = {name: m for name, m in METHODS.items() if issubclass(m, Recover)}

__all__ = [
    "AST",
    "ATOM",
    "CDA",
    "DATM",
    "DC",
    "DECOUPLED",
    "DM",
    "DQ",
    "DSA",
    "DWA",
    "FTD",
    "FYI",
    "FYIDM",
    "FYIDSA",
    "INFER",
    "KRRST",
    "METHODS",
    "MTT",
    "PCA",
    "TESLA",
    "UNIP",
    "Config",
    "DataDAM",
    "FedLGD",
    "HeLlO",
    "Interrupted",
    "Method",
    "OptionError",
    "PostTrain",
    "Progress",
    "RaTBPTT",
    "Recover",
    "Relabel",
    "Run",
    "SRe2L",
    "Squeeze",
    "State",
    "Teacher",
    "combine",
    "distill",
    "distill_attention",
    "krr_st",
    "quantize",
    "run",
]
