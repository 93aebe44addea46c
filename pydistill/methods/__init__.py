"""The methods: one file a paper, each a few lines on the primitives."""

from pydistill.methods.ast import AST
from pydistill.methods.atom import ATOM
from pydistill.methods.datadam import DataDAM
from pydistill.methods.datm import DATM
from pydistill.methods.dc import DC
from pydistill.methods.dm import DM
from pydistill.methods.dsa import DSA
from pydistill.methods.fedlgd import FedLGD
from pydistill.methods.ftd import FTD
from pydistill.methods.fyi import FYI, FYIDM, FYIDSA
from pydistill.methods.hello import HeLlO
from pydistill.methods.krr_st import KRRST, krr_st
from pydistill.methods.mtt import MTT
from pydistill.methods.outer import Config, State, distill
from pydistill.methods.rat_bptt import RaTBPTT
from pydistill.methods.tesla import TESLA
from pydistill.methods.unip import UNIP, distill_attention

_METHODS = (MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT, DC, DSA, DM, DataDAM, ATOM, FYIDM, FYIDSA, FedLGD)
METHODS: dict[str, type[Config]] = {method.name: method for method in _METHODS}

__all__ = [
    "AST",
    "ATOM",
    "DATM",
    "DC",
    "DM",
    "DSA",
    "FTD",
    "FYI",
    "FYIDM",
    "FYIDSA",
    "KRRST",
    "METHODS",
    "MTT",
    "TESLA",
    "UNIP",
    "Config",
    "DataDAM",
    "FedLGD",
    "HeLlO",
    "RaTBPTT",
    "State",
    "distill",
    "distill_attention",
    "krr_st",
]
