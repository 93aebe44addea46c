"""The methods: one file a paper, each a few lines on the primitives."""

from pydistill.methods.ast import AST
from pydistill.methods.datm import DATM
from pydistill.methods.ftd import FTD
from pydistill.methods.fyi import FYI
from pydistill.methods.mtt import MTT
from pydistill.methods.outer import Config, State, distill
from pydistill.methods.rat_bptt import RaTBPTT
from pydistill.methods.tesla import TESLA
from pydistill.methods.unip import UNIP, distill_attention

METHODS: dict[str, type[Config]] = {method.name: method for method in (MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT)}

__all__ = ["AST", "DATM", "FTD", "FYI", "METHODS", "MTT", "TESLA", "UNIP", "Config", "RaTBPTT", "State", "distill"]
__all__ += ["distill_attention"]
