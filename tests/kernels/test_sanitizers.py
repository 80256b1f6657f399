"""The native CPU code under sanitizers: memory errors, undefined behaviour, data races.

AddressSanitizer sees every access outside of a tensor or of working memory, UndefinedBehaviorSanitizer shifts,
overflows and misaligned accesses, ThreadSanitizer two threads at the same memory. GCC's OpenMP runtime is not
instrumented, so that for the latter `openmp_of_threads.cpp` takes its place. The code is compiled anew for each, which
takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from us3l_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
needs_setarch = pytest.mark.skipif(shutil.which("setarch") is None, reason="no setarch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no g++, whose sanitizers these are"),
    pytest.mark.skipif(_native.load() is None, reason=f"no native library: {_native.why}"),
]


def runtime(name: str) -> str:
    """The path of a library of the compiler's, to be loaded before Python."""
    done = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = done.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


def checked(command: list[str], folder: Path, **environment: str) -> str:
    """Run the command, and return what it said; whatever it said is the error if it failed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def build(folder: Path, sanitizers: str) -> None:
    """A copy of the kernels, compiled with these sanitizers."""
    for name in ("csrc", "us3l_kernels", "tests/kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    flags = f"-fsanitize={sanitizers}"
    checked(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        folder,
        US3L_CUDA="0",
        US3L_ABI3="0",
        CXX=str(COMPILER),
        CXXFLAGS=f"{flags} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1",
        LDFLAGS=flags,
    )
    (library,) = (folder / "us3l_kernels").glob("_C.*.so")
    assert f"__{sanitizers[0]}san_init".encode() in library.read_bytes()


def test_no_memory_error_and_no_undefined_behaviour(tmp_path: Path) -> None:
    # The C++ library as well: otherwise the sanitizer finds nothing to pass an exception on to.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    build(tmp_path, "address,undefined")
    tests = sorted(str(path) for path in (tmp_path / "tests" / "kernels").glob("test_native_*.py"))
    tests = [path for path in tests if not path.endswith("_isa.py")]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    # Tests of the compiler of graphs are left out, and of the process's memory, which is not its own here.
    left_out = "not compiles and not opcheck and not memory_does_not_grow"
    for isa in ("avx512", "avx2", "portable"):
        if isa == "portable" or _native.cpu_features().get(f"{isa}f" if isa == "avx512" else isa):
            checked(
                [*run, *tests, "-k", left_out],
                tmp_path,
                LD_PRELOAD=preload,
                ASAN_OPTIONS="detect_leaks=0",  # Python's own; test_memory_does_not_grow is for ours
                US3L_ISA=isa,
            )


def test_cuda_kernels_on_the_cpu_have_no_memory_error() -> None:
    """Every access of every thread: tensors, shared memory, the tables of arguments (conftest.py has the kernels)."""
    tests = [str(ROOT / "tests" / "kernels" / f"test_cuda_{name}.py") for name in ("ops", "multi_tensor")]
    checked(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        ROOT,
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0",
        CUDA_HOST_FLAGS="-fsanitize=address -fno-omit-frame-pointer -g1",
    )


RACES = """
import sys
sys.path.insert(0, "tests/kernels")
import test_native_block as blocks
import test_native_safety as safety
for threads in (2, 3, 4, 8):
    safety.torch.set_num_threads(threads)
    assert safety.torch.get_num_threads() == threads
    for kind in safety.PROBLEMS:
        for seed in range(20):
            safety.torch.manual_seed(seed)
            problem = safety.PROBLEMS[kind](safety.random.Random(seed).randint)
            if problem.runs():
                problem.solve()
    for case in blocks.CASES.values():
        with blocks.us3l_kernels.backend("native"):
            blocks.run(*case.inputs(), case.views)
"""


@needs_setarch
def test_no_data_race(tmp_path: Path) -> None:
    """Parts of the work write to memory of their own; what they have in common is merged when all are done."""
    preload = runtime("libtsan.so")
    build(tmp_path, "thread")
    shim = tmp_path / "openmp.so"
    source = tmp_path / "tests" / "kernels" / "openmp_of_threads.cpp"
    checked(
        [str(COMPILER), "-O1", "-g1", "-fPIC", "-shared", "-fsanitize=thread", str(source), "-o", str(shim)], tmp_path
    )
    # The sanitizer needs fixed places in memory, where random addresses put a library now and then.
    command = ["setarch", "-R", sys.executable, "-c", RACES]
    checked(command, tmp_path, LD_PRELOAD=f"{preload} {shim}", TSAN_OPTIONS="halt_on_error=1")
