"""One thread per test process: the tensors are tiny, and `make test` runs as many processes as there are cores.

A test that is about threads sets their number itself. Nothing is taken from caches of earlier runs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
# torch.compile's cache on disk knows nothing of operators' schemas: graphs of another revision would be run.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ["US3L_TUNE_CACHE"] = ""  # the choices of `auto` are those of the heuristics, whatever was tuned here

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_run() -> None:
    """One draw in sixty has a value so close to 0 that rounding decides on which side of a ReLU it is, in any dtype."""
    torch.manual_seed(0)
