"""``PYDISTILL_KERNELS=borrowed python -m stand_in.table``, from the folder of the tests: what calls cost on a GPU.

`measured.csv` is what it printed when it was last run."""

import stand_in.plugin  # noqa: F401, the devices, before the package is imported

from tests.stand_in import calls
from tests.stand_in.devices import devices

with devices():
    calls.main()
