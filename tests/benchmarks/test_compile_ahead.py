"""Triton kernels compiled ahead by many processes, on a driver that stands in for a GPU's: no kernel is launched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.compile_ahead import sharing

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, mask=index < n), mask=index < n)


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the kernels whose launchers were made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    made: list[str] = []

    def launcher(source: Any, _: object) -> Any:
        made.append(source.fn.__name__)
        return pytest.fail  # it is not to be launched

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda *_: (None, None, 32, 0, 1024),
            unload_module=lambda *_: None,
        ),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    return made


def test_each_binary_is_compiled_once_and_none_is_launched(tmp_path: Path, launchers: list[str]) -> None:
    claims, cache = tmp_path / "claims", tmp_path / "cache"
    claims.mkdir()
    x = torch.empty(64)
    with sharing(claims):
        for process in range(2):  # each with a kernel of its own: what one has in memory, another has not
            kernel = triton.jit(copy_kernel)
            for block in (64, 128):
                kernel[(1,)](x, x, 64, BLOCK=block)
                assert len(list(claims.iterdir())) == (2 if process else block // 64)
    assert launchers == ["copy_kernel"] * 2
    assert len(list(cache.rglob("*.cubin"))) == 2


def test_what_was_compiled_ahead_is_found(tmp_path: Path, launchers: list[str]) -> None:
    x = torch.empty(64)
    with sharing(tmp_path):
        triton.jit(copy_kernel)[(1,)](x, x, 64, BLOCK=64)
    (before,) = (tmp_path / "cache").rglob("*.cubin")
    changed = before.stat().st_mtime_ns
    triton.jit(copy_kernel).warmup(x, x, 64, BLOCK=64, grid=(1,))
    (after,) = (tmp_path / "cache").rglob("*.cubin")
    assert before == after and after.stat().st_mtime_ns == changed
