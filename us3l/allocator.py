"""The C library's memory allocator, as a training loop on a CPU needs it."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt(3) and their values.
_SETTINGS = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD: tensors come from the heap, not from mappings that are returned when freed
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD: the heap's free end is kept
    -2: 1 << 28,  # M_TOP_PAD: and grows in large steps
}


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; returns whether it does.

    Every step allocates the same tensors again. By default glibc gives large ones back to the system at once, and each
    page of the next one is a page fault: 54 000 of them, and 6 % of the time, in a step of a ResNet-18 (CIFAR, 32
    images per view). It concerns the whole process and stays. Nothing is done where the C library is another one, or
    where GLIBC_TUNABLES or MALLOC_* say how the allocator is wanted.
    """
    own = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    )
    if platform.libc_ver()[0] != "glibc" or own:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
