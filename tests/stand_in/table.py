"""``PYDISTILL_KERNELS=borrowed python -m stand_in.table``, from the folder of the tests: what calls cost on a GPU.

An argument is a former table, whose columns "... before" are kept beside the new numbers.
"""

import sys
from pathlib import Path

import stand_in.plugin  # noqa: F401, the devices, before the package is imported

from tests.stand_in import calls
from tests.stand_in.devices import devices

with devices():
    calls.table(Path(sys.argv[1]) if sys.argv[1:] else None)
