"""The methods: one file a paper, each a few lines on the primitives."""

from pydistill.methods.ast import AST
from pydistill.methods.atom import ATOM
from pydistill.methods.cda import CDA
from pydistill.methods.datadam import DataDAM
from pydistill.methods.datm import DATM
from pydistill.methods.dc import DC
from pydistill.methods.decoupled import RandomImages, Recover
from pydistill.methods.dm import DM
from pydistill.methods.dq import DQ, quantize
from pydistill.methods.dsa import DSA
from pydistill.methods.dwa import DWA
from pydistill.methods.fedlgd import FedLGD
from pydistill.methods.ftd import FTD
from pydistill.methods.fyi import FYI, FYIDM, FYIDSA
from pydistill.methods.hello import HeLlO
from pydistill.methods.infer import INFER
from pydistill.methods.krr_st import KRRST, krr_st
from pydistill.methods.mtt import MTT
from pydistill.methods.outer import Config, State, distill
from pydistill.methods.pca import PCA, combine
from pydistill.methods.rat_bptt import RaTBPTT
from pydistill.methods.sre2l import SRe2L
from pydistill.methods.tesla import TESLA
from pydistill.methods.unip import UNIP, distill_attention

_METHODS = (MTT, TESLA, FTD, AST, DATM, FYI, RaTBPTT, DC, DSA, DM, DataDAM, ATOM, FYIDM, FYIDSA, FedLGD)
METHODS: dict[str, type[Config]] = {method.name: method for method in _METHODS}

# those that recover images from a squeezed network, and real images to compare them with
DECOUPLED: dict[str, type[Recover]] = {method.name: method for method in (SRe2L, CDA, DWA, INFER, RandomImages)}

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
    "RaTBPTT",
    "SRe2L",
    "State",
    "combine",
    "distill",
    "distill_attention",
    "krr_st",
    "quantize",
]
