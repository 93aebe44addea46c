"""Data sets, distilled files, and the atomic writes behind them.

`load` reads a whole data set into memory as normalised float32 images, the form in which every distillation method
takes it; `stream` gives the same without the memory. `open_sources` finds a set's images without reading them, and
`pack` makes of them one file that is quick to read. `DistilledSet` is the product of a distillation: a small
safetensors file that carries its own normalisation and configuration. Pickles are written only by
`DistilledSet.export`, for code that reads those; CIFAR's own are read by an unpickler that admits only numpy arrays
and ordinary containers.
"""

from pydistill._atomic import put_in_place, write_atomic
from pydistill.data.dataset import Dataset, StreamedDataset
from pydistill.data.distilled import EXPORT_HEADER, DistilledSet
from pydistill.data.files import read_safetensors, write_safetensors
from pydistill.data.loading import DATASETS, load, open_sources, stream
from pydistill.data.normalisation import REPOSITORY_NORMALISATION, renormalise
from pydistill.data.packed import PackedImages, pack
from pydistill.data.sources import ImageSource
from pydistill.data.streamed import StreamedImages

__all__ = [
    "DATASETS",
    "EXPORT_HEADER",
    "REPOSITORY_NORMALISATION",
    "Dataset",
    "DistilledSet",
    "ImageSource",
    "PackedImages",
    "StreamedDataset",
    "StreamedImages",
    "load",
    "open_sources",
    "pack",
    "put_in_place",
    "read_safetensors",
    "renormalise",
    "stream",
    "write_atomic",
    "write_safetensors",
]
