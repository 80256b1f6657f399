"""Triton's disk cache, filled before anything is timed: by many processes, of which each compiles what no other has.

Triton compiles in one thread, a kernel in seconds, and a hundred kernels take minutes of the process that first calls
them. Inside `sharing` that process makes the calls of a section, as do others beside it: no kernel is launched, and a
binary is compiled by the process that comes to it first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def sharing(claims: Path) -> Iterator[None]:
    """Inside, Triton kernels are compiled for the disk cache and never run: the results of calls are garbage.

    claims: an empty folder that the processes share, which gets a file for each binary that one of them has begun.
    """
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    compiled, run = JITFunction._do_compile, JITFunction.run

    def compiled_once(kernel: Any, key: Any, *rest: Any) -> Any:
        name = hashlib.sha256(f"{kernel.module}.{kernel.__name__} {key}".encode()).hexdigest()
        try:
            (claims / name).touch(exist_ok=False)
        except FileExistsError:
            return None
        return compiled(kernel, key, *rest)

    def run_nothing(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        binary = run(kernel, *args, warmup=True, **options)
        if binary is not None:
            _ = binary.run  # compiles what launches it
        return binary

    JITFunction._do_compile, JITFunction.run = compiled_once, run_nothing
    try:
        yield
    finally:
        JITFunction._do_compile, JITFunction.run = compiled, run
