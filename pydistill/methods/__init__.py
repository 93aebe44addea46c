"""The methods: one file a paper, each a few lines on the primitives."""

from pydistill.methods.ast import AST
from pydistill.methods.datm import DATM
from pydistill.methods.dc import DC
from pydistill.methods.dsa import DSA
from pydistill.methods.ftd import FTD
from pydistill.methods.fyi import FYI
from pydistill.methods.mtt import MTT
from pydistill.methods.outer import Config, State, distill
from pydistill.methods.rat_bptt import RaTBPTT
from pydistill.methods.tesla import TESLA

METHODS: dict[str, type[Config]] = {
    method.name: method for method in (MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT, DC, DSA)
}

__all__ = ["AST", "DATM", "DC", "DSA", "FTD", "FYI", "METHODS", "MTT", "TESLA", "Config", "RaTBPTT", "State", "distill"]
