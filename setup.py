"""Builds the compiled part of us3l_kernels; everything else is in pyproject.toml.

    python setup.py build_ext --inplace                     # what `make build` does
    pip install --no-build-isolation -e .                   # the same, installed

`us3l_kernels._C` is the CPU library, `us3l_kernels._C_cuda` the CUDA one. Both face torch through LibTorch's stable
ABI: one binary runs with every torch from 2.10 on. Never build in pip's isolated environment: it would download a
torch of its own.

The environment variables US3L_NATIVE, US3L_CUDA and US3L_ABI3 are described in docs/environment.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE = "us3l_kernels"
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += os.environ.get("CXXFLAGS", "").split()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the ABI of torch 2.10


def say(text: str) -> None:
    print(f"us3l: {text}", file=sys.stderr, flush=True)


def option(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name) or default
    if value not in allowed:
        sys.exit(f"us3l: {name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


NATIVE = option("US3L_NATIVE", "1", ("0", "1")) == "1"
CUDA = option("US3L_CUDA", "auto", ("0", "1", "auto"))
ABI3 = option("US3L_ABI3", "0", ("0", "1")) == "1"


def toolkit_homes() -> Iterator[Path]:
    """Where a CUDA toolkit may be, likeliest first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def find_toolkit(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The toolkit to compile with, and why it is the one, or why there is none."""
    if CUDA == "0":
        return None, "US3L_CUDA=0"
    if torch_cuda is None:
        return None, "this torch is built without CUDA"
    rejected = []
    for home in dict.fromkeys(toolkit_homes()):
        nvcc = home / "bin" / "nvcc"
        # The nvcc on the PATH may be a wrapper that lies elsewhere: take the home that has the headers.
        if not nvcc.exists() or not (home / "include" / "cuda_runtime.h").exists():
            continue
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        version = match[1] if (match := re.search(r"release (\d+\.\d+)", output)) else "unknown"
        if version.split(".")[0] == torch_cuda.split(".")[0]:
            return home, f"nvcc {version} in {home}, torch built with CUDA {torch_cuda}"
        rejected.append(f"{home} has {version}")
    found = "; ".join(rejected) or "no toolkit found"
    return None, f"torch is built with CUDA {torch_cuda}, and there is no nvcc of that major version ({found})"


def files(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).iterdir() if p.suffix in suffixes)


def compiler_version() -> str:
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"us3l: no C++ compiler: `{' '.join(command)}` failed ({error}). Install g++ or clang, or set "
            "US3L_NATIVE=0 to go without the compiled kernels"
        )
    return lines[0]


def remove_stale(name: str) -> None:
    """A library of an earlier build that this one leaves out would still be loaded."""
    for path in (ROOT / PACKAGE).glob(f"{name}.*"):
        if path.suffix in (".so", ".pyd"):
            say(f"removing {path.relative_to(ROOT)} of an earlier build")
            path.unlink()


def extensions() -> dict[str, object]:
    """The arguments of setup() that concern compiled code."""
    try:
        import torch
    except ImportError:
        sys.exit("us3l: the compiled part needs torch to build: `make build`, or install torch>=2.10 first")

    home, reason = find_toolkit(torch.version.cuda)
    if home is None and CUDA == "1":
        sys.exit(f"us3l: US3L_CUDA=1, but {reason}")
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # read when cpp_extension is imported
    from torch.utils import cpp_extension

    sources = files("csrc", ".cpp") + files("csrc/cpu", ".cpp")
    cuda_sources = files("csrc/cuda", ".cpp", ".cu")
    headers = [name for folder in ("csrc", "csrc/cpu", "csrc/cuda") for name in files(folder, ".h", ".cuh")]

    info = {
        "US3L_COMPILER": compiler_version(),
        "US3L_FLAGS": " ".join(CXX_FLAGS),
        "US3L_TORCH": torch.__version__,
        "US3L_CUDA_TOOLKIT": reason,
    }
    include_dirs = []
    if ABI3:
        remove_stale("_C")  # Python prefers the library of its own version to an abi3 one
    else:
        import pybind11

        include_dirs.append(pybind11.get_include())
    modules = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            sources,
            include_dirs=include_dirs,
            define_macros=[(name, f'"{value}"') for name, value in info.items()],
            depends=[*headers, "setup.py"],
            py_limited_api=ABI3,
            extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI]},
        )
    ]
    if home is not None:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            # cpp_extension asks the GPU, and fails where there is none.
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
        cuda = cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            cuda_sources,
            depends=[*headers, "setup.py"],
            py_limited_api=True,  # its module is empty: one binary for every Python
            extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI], "nvcc": ["-O3", "-DUSE_CUDA", STABLE_ABI]},
        )
        # A toolkit may come without the runtime's import library; torch's own wheel has the library itself.
        wheel = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
        cuda.include_dirs.append(str(wheel / "include"))  # after the toolkit's own
        runtime = sorted((wheel / "lib").glob("libcudart.so.*"))
        if runtime and not any((Path(d) / "libcudart.so").exists() for d in cuda.library_dirs):
            cuda.libraries.remove("cudart")
            cuda.extra_link_args.append(str(runtime[0]))
        modules.append(cuda)

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extension(self, ext: object) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if ext.name.endswith("._C"):
                    say("the CPU kernels did not compile; US3L_NATIVE=0 goes without them")
                    raise
                if CUDA == "1":
                    raise
                # Nobody asked for CUDA by name, and the CPU library is of use without it.
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                remove_stale("_C_cuda")
                ext.optional = True
                say(f"CUDA kernels OFF: they did not compile ({error}). US3L_CUDA=1 makes this an error")

    say(f"CUDA kernels {'ON' if home else 'OFF'}: {reason}")
    if home is None:
        remove_stale("_C_cuda")
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    }


if NATIVE:
    setup(**extensions())
elif CUDA == "1":
    sys.exit("us3l: US3L_CUDA=1, but US3L_NATIVE=0: the CUDA library needs the CPU one")
else:
    say("US3L_NATIVE=0: no compiled kernels, operations run on PyTorch's own")
    remove_stale("_C")
    remove_stale("_C_cuda")
    setup()
