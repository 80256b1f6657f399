"""One thread per test process: the tensors are tiny, and `make test` runs as many processes as there are cores.

A test that is about threads sets their number itself. Nothing is taken from caches of earlier runs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
# torch.compile's cache on disk knows nothing of operators' schemas: graphs of another revision would be run.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ["US3L_TUNE_CACHE"] = ""  # the choices of `auto` are those of the heuristics, whatever was tuned here
