"""Accelerated kernels and exact constant-memory trajectory gradients for dataset distillation on PyTorch."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING

# Python started in a source checkout finds that before the installed package, but only the latter has compiled parts.
__path__ = _extend_path(__path__, __name__)

from pydistill import augment, compat, divergence, labels, matching, nn, ops, reference, select, trajectory
from pydistill.divergence import attention_map_divergence, attention_nmi, contrastive_ce, kd_divergence
from pydistill.matching import attention_match, class_gradients, class_mean_match, gradient_match, krr_loss, mmd
from pydistill.ops import bn_match_forward, bn_stat_match, instance_norm_relu_avg_pool, soft_cross_entropy
from pydistill.trajectory import ExpertStore, TrainResult, train_students, trajectory_match, unroll

__version__ = _version("pydistill")
__all__ = [
    "ExpertStore",
    "TrainResult",
    "__version__",
    "attention_map_divergence",
    "attention_match",
    "attention_nmi",
    "augment",
    "bn_match_forward",
    "bn_stat_match",
    "class_gradients",
    "class_mean_match",
    "compat",
    "contrastive_ce",
    "divergence",
    "gradient_match",
    "instance_norm_relu_avg_pool",
    "kd_divergence",
    "krr_loss",
    "labels",
    "matching",
    "mmd",
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

    def __getattr__(name: str) -> object:
        if name in _ON_DEMAND:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
