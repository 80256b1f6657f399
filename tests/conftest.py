"""One thread per test process: the tensors are tiny, and `make test` runs as many processes as there are cores.

A test that is about threads sets their number itself.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
