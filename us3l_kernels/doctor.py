"""What is available on this machine, what is not, and why: the content of `us3l doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

import torch

from us3l_kernels import _native
from us3l_kernels.backends import BACKENDS, OPS, measured
from us3l_kernels.errors import SettingError
from us3l_kernels.version import __version__

PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Finding:
    """One line of the report: a subject, whether it is well, and what there is to know about it."""

    subject: str
    ok: bool
    detail: str


def _version(package: str) -> Finding:
    try:
        return Finding(package, True, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, False, "not installed")


def _native_library() -> Finding:
    if _native.load() is None:
        return Finding("native library (csrc/cpu)", False, f"not loaded: {_native.why}")
    try:
        isa = _native.isa()
    except SettingError as error:
        return Finding("native library (csrc/cpu)", False, str(error))
    built = _native.build_info()
    parts = [f"runs with {isa}"] if isa else []
    parts += [f"{key}: {value}" for key, value in built.items() if value not in (None, "")]
    return Finding("native library (csrc/cpu)", True, "; ".join(parts) or "loaded (abi3 build)")


def _cuda_library() -> Finding:
    if _native.load_cuda() is None:
        return Finding("CUDA library (csrc/cuda)", False, f"not loaded: {_native.why_cuda}")
    return Finding("CUDA library (csrc/cuda)", True, "loaded")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("GPU", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Finding("GPU", False, f"none visible to torch ({built})")


def _backends() -> list[Finding]:
    """Per backend which operations and dtypes it takes, asked with the tensors it likes best."""
    findings = []
    for name, backend in BACKENDS.items():
        try:
            reason = backend.unavailable()
        except SettingError as error:
            reason = str(error)
        if reason is not None:
            findings.append(Finding(f"backend {name}", False, reason))
            continue
        taken = []
        for device in _devices():
            for op in OPS:
                dtypes = [str(d).removeprefix("torch.") for d in _dtypes_of(name, op, device)]
                if dtypes:
                    taken.append(f"{op} ({device}: {', '.join(dtypes)})")
        missing = [op for op in OPS if op not in backend.ops]
        left_out = f"; not {', '.join(missing)}: another backend takes them" if missing else ""
        findings.append(Finding(f"backend {name}", True, "; ".join(taken) + left_out))
    return findings


def _dtypes_of(name: str, op: str, device: str) -> list[torch.dtype]:
    taken = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(2, 8, 4, 4, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        x = x if op in ("conv2d", "batch_norm") else x.permute(0, 2, 3, 1)
        weight = torch.empty(8, dtype=torch.promote_types(dtype, torch.float32), device=device)
        likes: list[tuple[torch.Tensor, dict[str, Any]]] = [(weight, {})]
        if op == "conv2d":
            geometry = {"out_channels": 8, "stride": [1, 1], "dilation": [1, 1], "groups": 1}
            likes = [
                (weight.new_empty(8, 8, k, k), {**geometry, "padding": [k // 2, k // 2]})
                for k in (3, 1)
            ]
        if any(BACKENDS[name].can_run(op, x, weight, **arguments) for weight, arguments in likes):
            taken.append(dtype)
    return taken


def _tuning() -> Finding:
    """Whether this machine has measured choices of backends."""
    file = measured.path()
    if file is None:
        return Finding("tuned choices", False, "none: US3L_TUNE_CACHE is empty")
    counts = {device: len(measured.table(device).measurements) for device in _devices()}
    if not any(counts.values()):
        found = "has none for this machine and build" if file.exists() else "is not there"
        return Finding("tuned choices", False, f"{file} {found}: heuristics choose; `us3l tune` measures")
    return Finding("tuned choices", True, ", ".join(f"{n} calls ({d})" for d, n in counts.items()) + f" in {file}")


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def report() -> list[Finding]:
    """All findings, in the order in which a person asks: versions, machine, libraries, backends."""
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return [
        Finding("us3l", True, f"{__version__} on {machine}, {torch.get_num_threads()} threads"),
        *(_version(package) for package in PACKAGES),
        _gpu(),
        _native_library(),
        _cuda_library(),
        *_backends(),
        _tuning(),
    ]
