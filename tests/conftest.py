"""What every test needs before torch is imported."""

import os

# As in make and in the programs: results depend on the number of threads, to the bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
