"""Data sets, distilled files, and the atomic writes behind them.

`load` reads a whole data set into memory as normalised float32 images, the form in which every distillation method
takes it. `DistilledSet` is the product of a distillation: a small safetensors file that carries its own normalisation
and configuration. Pickles are written only by `DistilledSet.export`, for code that reads those; CIFAR's own are read
by an unpickler that admits only numpy arrays and ordinary containers.
"""

from pydistill._atomic import put_in_place, write_atomic
from pydistill.data.dataset import Dataset
from pydistill.data.distilled import EXPORT_HEADER, DistilledSet
from pydistill.data.files import read_safetensors, write_safetensors
from pydistill.data.loading import DATASETS, load
from pydistill.data.normalisation import REPOSITORY_NORMALISATION, renormalise

__all__ = [
    "DATASETS",
    "EXPORT_HEADER",
    "REPOSITORY_NORMALISATION",
    "Dataset",
    "DistilledSet",
    "load",
    "put_in_place",
    "read_safetensors",
    "renormalise",
    "write_atomic",
    "write_safetensors",
]
