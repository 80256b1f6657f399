"""What the build promises: the libraries are there, face torch through the stable ABI, and say what they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from us3l_kernels import __version__, _native

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(_native.load() is None, reason=f"no native library: {_native.why}")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.environ.get("US3L_NATIVE") == "0", reason="US3L_NATIVE=0")
def test_the_native_library_is_there() -> None:
    assert _native.load() is not None, f"{_native.why} (make build)"


@needs_library
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_backward", "sgd_"])
def test_schemas_are_registered(name: str) -> None:
    schema = getattr(torch.ops.us3l_native, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert (
        written
        == {
            "batch_norm": {"running_mean", "running_var"},
            "batch_norm_backward": {"grad_weight", "grad_bias"},
            "sgd_": {"params", "momentum_buffers", "teachers"},
        }[name]
    )


@needs_library
def test_build_info_and_features() -> None:
    info = _native.build_info()
    assert set(info) == {"compiler", "flags", "torch", "cuda"} and all(info.values())
    assert "-O3" in info["flags"]
    assert _native.isa() in ("portable", "avx2", "avx512")
    assert all(isinstance(v, bool) for v in _native.cpu_features().values())


@needs_library
def test_an_instruction_set_that_is_not_there_is_an_error() -> None:
    code = "import torch; from us3l_kernels import _native as n; n.isa()"
    done = run("-c", code, US3L_ISA="sse9")
    assert done.returncode != 0
    assert re.search(r"SettingError: US3L_ISA: expected one of .*portable on this CPU, got 'sse9'", done.stderr)


def test_native_code_faces_torch_through_the_stable_abi() -> None:
    allowed = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/shim", "torch/headeronly/")
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r'#include [<"]((?:torch|ATen|c10)/[^>"]+)[>"]', path.read_text()):
            assert header.startswith(allowed), f"{path.name} includes {header}"


@pytest.mark.parametrize("name, value", [("US3L_CUDA", "maybe"), ("US3L_NATIVE", "2"), ("US3L_ABI3", "yes")])
def test_build_options_are_checked(name: str, value: str) -> None:
    done = run("setup.py", "--version", **{name: value})
    assert done.returncode != 0
    assert f"us3l: {name}: expected one of" in done.stderr and repr(value) in done.stderr


def test_cuda_without_the_cpu_library_is_an_error() -> None:
    done = run("setup.py", "--version", US3L_NATIVE="0", US3L_CUDA="1")
    assert done.returncode != 0 and "the CUDA library needs the CPU one" in done.stderr


def test_one_version() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None and declared[1] == __version__


def test_requirements_come_from_pyproject() -> None:
    listed = run("scripts/requirements.py", "list", "build", "run", "test").stdout.split()
    names = {re.split("[<>=]", line)[0] for line in listed}
    assert {"setuptools", "torch", "omegaconf", "pytest"} <= names
    assert len(names) == len(listed), "a requirement is declared twice with different versions"
    assert run("scripts/requirements.py", "check", "nonsense").returncode != 0


def test_packages_import_without_the_native_library(tmp_path: Path) -> None:
    """A machine without a compiler: nothing native, everything else."""
    source = ROOT / "us3l_kernels"
    for path in source.rglob("*.py"):
        target = tmp_path / "us3l_kernels" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # An editable installation would find the library of the checkout.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import torch, us3l_kernels as k; from us3l_kernels import _native\n"
        "assert _native.load() is None and _native.why and _native.build_info() == {}\n"
        "k.functional.batch_norm(torch.randn(4, 8), None, None, training=True)\n"
        "try:\n"
        "    with k.backend('native'): k.functional.batch_norm(torch.randn(4, 8), None, None, training=True)\n"
        "except RuntimeError as error: assert 'compiled library is not there' in str(error), error\n"
        "else: raise SystemExit('ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_library
def test_a_library_older_than_its_sources_is_said_to_be(tmp_path: Path) -> None:
    library = ModuleType("_C")
    library.__file__ = str(tmp_path / "_C.so")
    (tmp_path / "_C.so").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native._warn_if_outdated(library)
    os.utime(library.__file__, (0, 0))
    with pytest.warns(UserWarning, match="is older than the sources in .*csrc: run `make build`"):
        _native._warn_if_outdated(library)


@pytest.mark.slow
def test_building_again_does_nothing() -> None:
    assert run("setup.py", "-q", "build_ext", "--inplace").returncode == 0
    objects = {p: p.stat().st_mtime_ns for p in (ROOT / "build").rglob("*.o")}
    assert objects
    assert run("setup.py", "-q", "build_ext", "--inplace").returncode == 0
    assert {p: p.stat().st_mtime_ns for p in objects} == objects
