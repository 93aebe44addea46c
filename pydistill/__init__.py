"""Accelerated kernels and exact constant-memory trajectory gradients for dataset distillation on PyTorch."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING

# Python started in a source checkout finds that before the installed package, but only the latter has compiled parts.
__path__ = _extend_path(__path__, __name__)

from pydistill import augment, compat, divergence, labels, matching, nn, ops, reference, select, trajectory
from pydistill._renamed import moved as _moved
from pydistill.matching import attention_match, class_mean_match, gradient_match, krr_loss
from pydistill.ops import (
    attention_map_divergence,
    bn_stat_match,
    instance_norm_relu_avg_pool,
    kd_divergence,
    soft_cross_entropy,
)
from pydistill.trajectory import ExpertStore, train_students, trajectory_match, unroll

__version__ = _version("pydistill")
__all__ = [
    "ExpertStore",
    "__version__",
    "attention_map_divergence",
    "attention_match",
    "augment",
    "bn_stat_match",
    "class_mean_match",
    "compat",
    "divergence",
    "gradient_match",
    "instance_norm_relu_avg_pool",
    "kd_divergence",
    "krr_loss",
    "labels",
    "matching",
    "nn",
    "ops",
    "reference",
    "select",
    "soft_cross_entropy",
    "train_students",
    "trajectory",
    "trajectory_match",
    "unroll",
]

# imported on demand, to keep the import fast
_ON_DEMAND = ("data", "evaluate", "info", "methods", "testing")

if TYPE_CHECKING:
    from pydistill import data as data
    from pydistill import evaluate as evaluate
    from pydistill import info as info
    from pydistill import methods as methods
    from pydistill import testing as testing
else:
    _former = _moved(
        __name__,
        {
            "TrainResult": "pydistill.trajectory",
            "attention_nmi": "pydistill.divergence",
            "bn_match_forward": "pydistill.ops",
            "class_gradients": "pydistill.matching",
            "contrastive_ce": "pydistill.divergence",
            "mmd": "pydistill.matching",
        },
        depth=2,
    )

    def __getattr__(name: str) -> object:
        return _import_module(f"{__name__}.{name}") if name in _ON_DEMAND else _former(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
