"""The one door to the compiled libraries: `_C` (csrc, CPU) and `_C_cuda` (csrc/cuda).

Importing them registers `torch.ops.us3l_native.*`. A library that was not built, or does not load, is no error: the
backends that need it say why they cannot run (`why`, `why_cuda`), and so does `us3l doctor`.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from us3l_kernels.errors import SettingError


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(f"us3l_kernels.{name}"), None
    except ImportError as error:
        return None, str(error)


# _C first: it registers the schemas of the CUDA kernels as well.
_C, why = _import("_C")
_C_cuda, why_cuda = _import("_C_cuda") if _C is not None else (None, why)


def _warn_if_outdated(library: ModuleType | None) -> None:
    """In a checkout that was updated, the library may lack operations that the Python code calls."""
    sources = Path(__file__).parents[1] / "csrc"
    if library is None or library.__file__ is None or not sources.is_dir():
        return
    of_library = [p for folder in (sources, sources / "cpu") for p in folder.iterdir() if p.suffix in (".cpp", ".h")]
    if max(path.stat().st_mtime for path in of_library) > Path(library.__file__).stat().st_mtime:
        warnings.warn(f"{library.__file__} is older than the sources in {sources}: run `make build`", stacklevel=2)


_warn_if_outdated(_C)


def _read_isa() -> tuple[str | None, str | None]:
    if _C is None or not hasattr(_C, "isa"):
        return None, None
    try:
        return str(_C.isa()), None
    except RuntimeError as error:
        return None, str(error)


_isa, _why_no_isa = _read_isa()


def load() -> ModuleType | None:
    """The CPU library; None if it is not there, and then `why` is the loader's message."""
    return _C


def load_cuda() -> ModuleType | None:
    """The CUDA library; None if it is not there, and then `why_cuda` is the loader's message."""
    return _C_cuda


def build_info() -> dict[str, Any]:
    """Compiler, flags, torch version and CUDA of the build; empty without the library or in a US3L_ABI3 build."""
    return dict(_C.build_info()) if _C is not None and hasattr(_C, "build_info") else {}


def cpu_features() -> dict[str, bool]:
    """What this CPU offers of what the kernels can use; empty where `build_info` is."""
    return dict(_C.cpu_features()) if _C is not None and hasattr(_C, "cpu_features") else {}


def isa() -> str | None:
    """The instruction set the CPU kernels run with: "avx512", "avx2" or "portable"; None where `build_info` is empty.

    Raises SettingError if US3L_ISA names one that does not exist or that this CPU does not have.
    """
    if _why_no_isa is not None:
        raise SettingError(_why_no_isa)
    return _isa
