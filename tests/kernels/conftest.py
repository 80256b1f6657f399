"""The CUDA kernels on the CPU: csrc/cuda compiled by a host compiler through cuda_host/cuda_host.h."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from us3l_kernels import _native

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SHIM = Path(__file__).parent / "cuda_host"
COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
# Misaligned 16-byte accesses, overflow.
FLAGS += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
FLAGS += ["-DUS3L_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += os.environ.get("CUDA_HOST_FLAGS", "").split()  # test_sanitizers.py


class CudaHost:
    """ops: the operators of csrc/cuda, for tensors of the CPU."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.ops = torch.ops.us3l_cuda_host
        self.functions = ctypes.CDLL(str(library))

    def launches(self) -> int:
        """Kernels launched so far."""
        return self.functions.launches()

    @contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Blocks and threads take turns in another order (0: one after the other)."""
        self.functions.set_order(seed)
        try:
            yield
        finally:
            self.functions.set_order(0)


def registration() -> str:
    """csrc/cuda/registration.cpp, for the CPU and under a name of its own: a GPU keeps its kernels."""
    text = (CUDA / "registration.cpp").read_text()
    assert text.count("(us3l_native, CUDA, m)") == 1
    return text.replace("(us3l_native, CUDA, m)", "(us3l_cuda_host, CPU, m)").replace('"ops.h"', f'"{CUDA}/ops.h"')


def compiled(folder: Path, flags: list[str]) -> Path:
    """The library, compiled into the folder unless it is there already."""
    (folder / "registration.cpp").write_text(registration())
    sources = [*sorted(CUDA.glob("*.cu")), SHIM / "harness.cpp", folder / "registration.cpp"]
    headers = [*CUDA.glob("*.h"), *SHIM.glob("*.h"), CUDA.parent / "groups.h", *(CUDA.parent / "cpu").glob("*.h")]
    digest = hashlib.sha256(repr((flags, torch.__version__, COMPILER)).encode())
    for path in (Path(__file__), *sources, *sorted(headers)):
        digest.update(path.read_bytes())
    library = folder / f"cuda_host-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    for old in folder.glob("cuda_host-*.so"):
        old.unlink()
    command = [COMPILER, *flags, f"-I{SHIM}", "-isystem", str(Path(torch.__file__).parent / "include")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [[*command, "-x", "c++", "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))
    link = [COMPILER, *flags, "-shared", *map(str, objects), f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*link, "-o", f"{library}.new"], check=True)
    os.replace(f"{library}.new", library)
    return library


@pytest.fixture(scope="session")
def cuda_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CudaHost:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if _native.load() is None:
        pytest.skip(f"no native library, which has the schemas: {_native.why}")
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("cuda_host") if cache is None else cache.mkdir("cuda_host")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = compiled(folder, FLAGS)
    global _definitions
    _definitions = torch.library.Library("us3l_cuda_host", "DEF")
    for name in re.findall(r'm\.impl\("(\w+)"', registration()):
        schema = getattr(torch.ops.us3l_native, name).default._schema
        _definitions.define(str(schema).removeprefix("us3l_native::"))
    return CudaHost(library)


_definitions: torch.library.Library
