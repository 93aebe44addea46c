"""The methods: one file a paper, each a few lines on the primitives."""

from pydistill.methods.ast import AST
from pydistill.methods.datm import DATM
from pydistill.methods.fedlgd import FedLGD
from pydistill.methods.ftd import FTD
from pydistill.methods.fyi import FYI
from pydistill.methods.mtt import MTT
from pydistill.methods.outer import Config, State, distill
from pydistill.methods.rat_bptt import RaTBPTT
from pydistill.methods.tesla import TESLA

METHODS: dict[str, type[Config]] = {
    method.name: method for method in (MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT, FedLGD)
}

__all__ = ["AST", "DATM", "FTD", "FYI", "METHODS", "MTT", "TESLA", "Config", "FedLGD", "RaTBPTT", "State", "distill"]
