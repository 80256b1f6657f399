"""These run where Triton interprets: see ../test_interpreted.py."""

from us3l_kernels.triton import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
