"""The sections of the GPU suite: each yields its items by name, which are run one by one (`gpu_suite.run_section`).

Backends come from the registry, so that what is added to it is checked and measured here by itself. Times of kernels
are those of CUDA graphs that repeat them over several input sets: neither the host nor a warm cache is measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import us3l_kernels
from benchmarks import harness, roofline, step, widths
from benchmarks.ops import Case as LayerCase
from benchmarks.ops import cases as layer_cases
from benchmarks.rivals import Conv2d, Settings, initial_weights
from us3l.config import Config, MethodConfig, ModelConfig, SamplerConfig, TrainConfig
from us3l.methods import build_method
from us3l.models import build_model
from us3l.models.layers import Layers
from us3l.models.mobilenet_v2 import InvertedResidual
from us3l.models.resnet import BasicBlock, Bottleneck
from us3l.step import TrainStep, why_no_graphs
from us3l_kernels import _native, functional, gradients, optim, packed
from us3l_kernels.any_width import AnyWidth
from us3l_kernels.backends import BACKENDS, measured
from us3l_kernels.errors import BackendError
from us3l_kernels.optim import kernels
from us3l_kernels.plans import CudaGraphs, Plans
from us3l_kernels.reference import active_conv_weight
from us3l_kernels.tune import record, tune
from us3l_kernels.width import active_channels

Item = tuple[str, Callable[[], dict[str, Any]]]

WIDTHS = (1.0, 0.625, 0.25)
TRANSFORMER = "vit_small 224px b128"
SETS = 3  # of inputs
SANITIZED_SECONDS = 120.0  # after which no further call starts under compute-sanitizer; imports, slow there, count
SANITIZER_GRACE = 15.0  # for the last of them, and for its report
LEAST_MS = 1.0  # of one reading
LEFT_OUT = "left out: it has broken the process in other items"
HALVES = (torch.bfloat16, torch.float16)
# Largest error beside the largest value: a small multiple of ATen's own, or what the rounding of the inputs may make.
# TF32 has as many bits as float16.
MULTIPLE = 3.0
SMALL = {"float32": 2e-6, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Setup:
    """Where the suite runs, and how.

    smoke: tiny shapes. out: the folder of the results. until: the time.time() at which the section is to end.
    barred: sides that are left out, as they have broken this section's processes.
    compiling: Triton kernels are only compiled (`compile_ahead`), nothing is timed or compared.
    sanitized: our kernels run under compute-sanitizer, and they alone: nothing is compared.
    """

    device: torch.device
    smoke: bool
    out: Path
    until: float = math.inf
    barred: frozenset[str] = frozenset()
    compiling: bool = False
    sanitized: bool = False

    @property
    def sets(self) -> int:
        """Of the inputs of what is timed: caches would hold one that is small."""
        return 1 if self.compiling else SETS

    @property
    def synchronise(self) -> Callable[[], None]:
        return harness.synchroniser(self.device)

    def settings(self, model: str, stem: str, **options: Any) -> Settings:
        """Of a step in bfloat16."""
        if self.smoke:
            return Settings(
                model="resnet_tiny", widths=(1.0, 0.5), hidden_dim=16, dim=8, dtype=torch.bfloat16, device=self.device
            )
        return Settings(
            model=model, stem=stem, **{"widths": WIDTHS, "dtype": torch.bfloat16, "device": self.device, **options}
        )


def backends(op: str) -> list[str]:
    """Those that have `op` and can run here at all."""
    return [name for name, each in BACKENDS.items() if op in each.ops and each.unavailable() is None]


# --- times of kernels ------------------------------------------------------------------------------------------------


def microseconds(setup: Setup, sides: Mapping[str, Callable[[int], object]], rounds: int = 7) -> dict[str, Any]:
    """Median microseconds of each side, which take turns; the error of one that fails is in its place.

    A side is called with the number of the input set. On a GPU a CUDA graph of that is timed. All sides are repeated as
    often as the fastest has to be, so that what a reading costs beside the calls is the same for all of them.
    """
    if setup.compiling:
        for name, side in sides.items():
            if "triton" in name:
                with suppress(Exception):  # of the side: the others are compiled
                    side(0)
        return {"us": {}}
    errors = {name: LEFT_OUT for name in sides if name in setup.barred}
    stream = torch.cuda.Stream() if setup.device.type == "cuda" else None

    def of_each(work: Callable[[str], Any]) -> dict[str, Any]:
        """work(name) of the sides that have not failed."""
        results = {}
        for name in sides:
            if name not in errors:
                try:
                    with harness.charged_to(name, setup.device):
                        results[name] = work(name)
                except Exception as error:  # that of the side: the others are measured
                    errors[name] = harness.told(error)
        return results

    def repeated(run: Callable[[], object], turns: int) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(turns):
                run()

        return repeat

    def over_sets(name: str) -> None:
        for index in range(setup.sets):
            sides[name](index)

    def seconds(run: Callable[[], object]) -> float:
        return harness.interleave({"": lambda _: run()}, rounds=1, warmup=1, synchronise=setup.synchronise)[""][0]

    def often(taken: Mapping[str, float]) -> int:
        return 1 if setup.smoke or not taken else max(1, min(100, math.ceil(LEAST_MS * 1e-3 / min(taken.values()))))

    def eager(name: str) -> float:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            over_sets(name)  # compiles, chooses algorithms
            return seconds(partial(over_sets, name))

    def captured(name: str) -> Callable[[], None]:
        work = repeated(partial(over_sets, name), turns)
        if stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        return graph.replay

    setup.synchronise()  # the inputs may have been made on another stream
    turns = often(of_each(eager))
    graphs = of_each(captured)
    # Most kernels are much shorter than what launches them.
    replays = 1 if stream is None else often(of_each(lambda name: seconds(graphs[name])))
    runs = of_each(lambda name: repeated(graphs[name], replays))
    samples = harness.interleave(
        {name: lambda turn, run=run: run() for name, run in runs.items()},
        rounds=1 if setup.smoke else rounds,
        warmup=1,
        synchronise=setup.synchronise,
    )
    times = {name: median(values) / (turns * replays * setup.sets) * 1e6 for name, values in samples.items()}
    return {"us": times} | ({"errors": errors} if errors else {})


@dataclass(frozen=True)
class Rates:
    """Measured: operations of bf16 matrix products, bytes of a copy, per second."""

    operations: float
    bandwidth: float

    def floor_us(self, operations: float, size: float) -> float:
        """Of what computes that many operations and moves that many bytes."""
        return max(operations / self.operations, size / self.bandwidth) * 1e6


def rates(setup: Setup) -> Rates:
    """Of this device, in under a second."""
    if setup.compiling:
        return Rates(1.0, 1.0)
    megabytes = 1 if setup.smoke else 1024
    if setup.smoke:
        return Rates(1e9, harness.copy_bandwidth(setup.device, megabytes))
    best = max(harness.peaks(torch.bfloat16, setup.device).values())
    return Rates(best, harness.copy_bandwidth(setup.device, megabytes))


# --- part 1: the machine ---------------------------------------------------------------------------------------------


def machine(setup: Setup) -> Iterator[Item]:
    """Rates, the cost of launches, and what they make of the model of a step (benchmarks/roofline.py)."""

    def launches() -> dict[str, float]:
        x, count = torch.zeros(64, device=setup.device), 20 if setup.smoke else 2000

        def eager(_: int) -> None:
            for _ in range(count):
                x.add_(1)

        (host,) = harness.interleave({"": eager}, rounds=1, warmup=1, synchronise=setup.synchronise)[""]
        readings = {"launch_us": host / count * 1e6}
        if setup.device.type == "cuda":
            readings["graph_kernel_us"] = microseconds(setup, {"add": lambda _: x.add_(1)})["us"]["add"]
        return readings

    def plan() -> dict[str, Any]:
        measured_rates, host = rates(setup), launches()["launch_us"]
        model = roofline.Machine(measured_rates.operations / 1e12, measured_rates.bandwidth / 1e12, launch_us=host)
        modelled = networks(setup) | ({} if setup.smoke else {TRANSFORMER: ("vit_small", "imagenet", 224, 128)})
        rows = {
            name: roofline.measure(network, stem=stem, size=size, batch=batch, widths=WIDTHS, machine=model)["rows"]
            for name, (network, stem, size, batch) in modelled.items()
        }
        return {"wall_ms": {name: {way: row["wall_ms"] for way, row in of.items()} for name, of in rows.items()}}

    def versions() -> dict[str, Any]:
        told: dict[str, Any] = {"build": _native.build_info(), "why_no_cuda_library": _native.why_cuda}
        for name, command in {"nvcc": ["nvcc", "--version"], "gpu": ["nvidia-smi"]}.items():
            if shutil.which(command[0]):
                told[name] = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        told["cudnn"] = torch.backends.cudnn.version()
        told["triton"] = getattr(sys.modules.get("triton"), "__version__", None)
        told["backends"] = {name: each.unavailable() for name, each in BACKENDS.items()}
        return told

    yield "versions", versions
    for dtype in (torch.float32, torch.bfloat16) if setup.smoke else (torch.float32, *HALVES):
        if not setup.smoke:
            yield f"peaks {dtype}", partial(harness.peaks, dtype, setup.device)
    yield "bandwidth", lambda: {"copy": rates(setup).bandwidth}
    yield "launches", launches
    yield "roofline", plan


# --- part 1: correctness ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpCase:
    """A call of an operation. x: its shape. parameters: full shapes by name; active: what of their first dimensions the
    call uses. call: (x, parameters, extra) -> y.
    """

    op: str
    name: str
    x: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    active: dict[str, tuple[int, ...]]
    call: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]


def _convolution(
    n: int, c: int, k: int, full_c: int, full_k: int, size: int, kernel: int, stride: int = 1, groups: int = 1
) -> OpCase:
    depthwise = groups > 1 and groups == full_c
    weight = (full_k, full_c // groups, kernel, kernel)
    active = (k, c if groups == 1 else full_c // groups)
    kind = "depthwise " if depthwise else "grouped " if groups > 1 else ""

    def call(x: Tensor, p: dict[str, Tensor], _: Tensor) -> Tensor:
        out = k if groups == 1 else None
        return functional.conv2d(
            x, p["weight"], p["bias"], out_channels=out, stride=stride, padding=kernel // 2, groups=groups
        )

    return OpCase(
        "conv2d", f"{kind}{kernel}x{kernel}/{stride} {c} of {full_c} -> {k} of {full_k} @{size}", (n, c, size, size),
        {"weight": weight, "bias": (full_k,)}, {"weight": active, "bias": (k,)}, call,
    )  # fmt: skip


def _linear(rows: int, c: int, k: int, full_c: int, full_k: int) -> OpCase:
    return OpCase(
        "linear", f"{rows} rows, {c} of {full_c} -> {k} of {full_k}", (rows, c),
        {"weight": (full_k, full_c), "bias": (full_k,)}, {"weight": (k, c), "bias": (k,)},
        lambda x, p, _: functional.linear(x, p["weight"], p["bias"], out_features=k),
    )  # fmt: skip


def _batch_norm(n: int, c: int, full: int, size: int, *, views: int, activation: str | None, residual: bool) -> OpCase:
    return OpCase(
        "batch_norm", f"{c} of {full} @{size}, {views} views, {activation}{', residual' if residual else ''}",
        (n, c, size, size), {"weight": (full,), "bias": (full,)}, {"weight": (c,), "bias": (c,)},
        lambda x, p, extra: functional.batch_norm(
            x, p["weight"], p["bias"], training=True, views=views, activation=activation,
            residual=extra if residual else None,
        ),
    )  # fmt: skip


def _layer_norm(n: int, tokens: int, c: int, full: int) -> OpCase:
    return OpCase(
        "layer_norm", f"{c} of {full}, {n * tokens} rows", (n, tokens, c), {"weight": (full,), "bias": (full,)},
        {"weight": (c,), "bias": (c,)}, lambda x, p, _: functional.layer_norm(x, p["weight"], p["bias"]),
    )  # fmt: skip


OP_CASES = (
    _convolution(4, 24, 40, 64, 96, 14, 1),
    _convolution(3, 33, 7, 64, 64, 9, 3),
    _linear(37, 33, 10, 64, 100),
    _batch_norm(8, 24, 64, 9, views=2, activation="relu", residual=True),
    _layer_norm(3, 17, 24, 64),
    _convolution(4, 40, 24, 80, 64, 13, 3),
    _convolution(4, 24, 24, 48, 48, 13, 3, 1, 48),
    # the above are those of a smoke test
    _convolution(4, 64, 64, 64, 64, 16, 3),
    _convolution(2, 72, 104, 80, 136, 9, 3),
    _convolution(4, 40, 80, 80, 128, 15, 3, 2),
    _convolution(2, 256, 136, 256, 256, 14, 3),
    _convolution(4, 3, 16, 3, 64, 33, 7, 2),
    _convolution(4, 64, 128, 128, 256, 15, 1, 2),
    _convolution(4, 33, 33, 48, 48, 14, 3, 2, 48),
    _convolution(4, 32, 32, 64, 64, 9, 3, 1, 4),
    _convolution(8, 128, 256, 256, 512, 28, 1),
    _linear(256, 512, 2048, 512, 2048),
    _linear(197, 96, 288, 384, 1152),
    _batch_norm(8, 7, 16, 5, views=1, activation=None, residual=False),
    _batch_norm(16, 256, 256, 14, views=2, activation="relu6", residual=False),
    _layer_norm(8, 197, 384, 384),
)


def correctness(setup: Setup) -> Iterator[Item]:
    """Every operation on every backend and in every dtype against float64: y, dX, and what is added to the gradients
    of parameters, where nothing outside the slice is read (NaN) or written (a canary).

    What is compiled at its first call, which takes long, comes last, and of that first what a step needs.
    """
    yield from multi_tensor(setup)
    items = [
        (case, name, precision)
        for case in (OP_CASES[:7] if setup.smoke else OP_CASES)
        for name in backends(case.op)
        for precision in precisions(setup, case.op)
    ]
    compiled = {name for _, name, _ in items if name.startswith("triton")}
    items.sort(key=lambda item: (item[1] in compiled) * (1 + (item[2] != "bfloat16")))
    for case, name, precision in items:
        work = partial(check_operation, setup, case, name, precision)
        yield f"{case.op} {case.name}, {name}, {precision}", work


def precisions(setup: Setup, op: str) -> list[str]:
    """Of SMALL. On a GPU torch computes convolutions of float32 in TF32, unless told otherwise: both are checked."""
    return [name for name in SMALL if name != "tf32" or (op == "conv2d" and setup.device.type == "cuda")]


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Convolutions of float32 in "ieee" or "tf32": cuDNN's, and those of our backends, which follow."""
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def check_operation(setup: Setup, case: OpCase, name: str, precision: str) -> dict[str, Any]:
    """Errors of one call; raises Mismatch if one is too large."""
    if name in setup.barred:
        return {"skipped": LEFT_OUT}
    if (setup.compiling and not name.startswith("triton")) or (setup.sanitized and name in ("aten", "reference")):
        return {}
    with convolutions_in("tf32" if precision == "tf32" else "ieee"):
        return _check_operation(setup, case, name, precision)


def _check_operation(setup: Setup, case: OpCase, name: str, precision: str) -> dict[str, Any]:
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    generator = torch.Generator().manual_seed(0)
    x, extra = torch.randn(2, *case.x, generator=generator).to(dtype)
    values = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in case.parameters.items()}
    for key, sizes in case.active.items():
        for dim, size in enumerate(sizes):
            values[key].narrow(dim, size, values[key].size(dim) - size).fill_(torch.nan)
    with us3l_kernels.backend("reference"):
        shape = case.call(x.double(), {key: value.double() for key, value in values.items()}, extra.double()).shape
    grad = torch.randn(shape, generator=generator).to(dtype)

    def run(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        canary = 1.0
        module = nn.ParameterDict({
            key: value.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            for key, value in values.items()
        })  # fmt: skip
        images = x.dim() == 4
        moved = [t.to(device, dtype, copy=True) for t in (x, extra, grad)]
        inputs, added, upstream = (
            t.contiguous(memory_format=torch.channels_last) if images and t.dim() == 4 else t for t in moved
        )
        buffer = gradients.attach(module.to(memory_format=torch.channels_last) if images else module)
        buffer.flat.fill_(canary)
        inputs.requires_grad_()
        with us3l_kernels.backend(f"{case.op}={backend}"):
            y = case.call(inputs, dict(module.items()), added)
            y.backward(upstream)
        results = {"y": y.detach(), "dx": inputs.grad}
        for key, parameter in module.items():
            outside = torch.ones_like(parameter, dtype=torch.bool)
            outside[tuple(slice(size) for size in case.active[key])] = False
            if not (parameter.grad[outside] == canary).all():
                raise harness.Mismatch(f"d{key}: written outside of the slice")
            results[f"d{key}"] = parameter.grad[~outside] - canary
        return {key: result.double().cpu() for key, result in results.items()}

    try:
        with harness.charged_to(name, setup.device):
            given = run(name, dtype, setup.device)
    except BackendError as error:
        return {"skipped": str(error)}
    if setup.compiling or setup.sanitized:
        return {"errors": {}}
    expected = run("reference", torch.float64, torch.device("cpu"))
    plain = run("aten", dtype, setup.device)
    errors: dict[str, float] = {}
    for key, value in expected.items():
        scale = value.abs().max().item() or 1.0
        own, aten = ((of[key] - value).abs().max().item() / scale for of in (given, plain))
        errors[key] = own
        if not own <= max(MULTIPLE * aten, SMALL[precision]):
            raise harness.Mismatch(f"{key} differs by {own:.1e} of its largest value, ATen's by {aten:.1e}")
    return {"errors": errors}


def multi_tensor(setup: Setup) -> Iterator[Item]:
    """Optimizers, EMA, packing: on the device beside float64, or beside torch's own operations bit by bit."""
    shapes = [(64, 32, 3, 3), (40, 33, 1, 1), (7,), (130, 65), (4096, 24)]

    def tensors(dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    def updated(kind: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        params = [nn.Parameter(t) for t in tensors(dtype, device, 0)]
        if kind == "EMA":
            optim.EMA(params, tensors(dtype, device, 1), 0.9).update()
            return [p.detach().double().cpu() for p in params]
        make = {"SGD": partial(optim.SGD, momentum=0.9), "AdamW": optim.AdamW}[kind]
        optimizer = make(params, lr=0.1, weight_decay=0.1, alpha=0.05)
        for turn in range(2):
            for p, g in zip(params, tensors(dtype, device, 2 + turn), strict=True):
                p.grad = g
            optimizer.step()
        return [p.detach().double().cpu() for p in params]

    def check(kind: str) -> dict[str, Any]:
        given = updated(kind, torch.float32, setup.device)
        expected = updated(kind, torch.float64, torch.device("cpu"))
        errors = [harness.relative_error(a, b) for a, b in zip(given, expected, strict=True)]
        if max(errors) > 1e-6:
            raise harness.Mismatch(f"{kind}: differs by {max(errors):.1e} from float64")
        return {"errors": max(errors)}

    def pack(dtype: torch.dtype) -> dict[str, Any]:
        full = [nn.Parameter(t) for t in tensors(torch.float32, setup.device, 0)]
        module = nn.ParameterList(full)
        buffer = gradients.attach(module)
        plans = packed.PackedWeights(buffer)
        slices = [tuple(slice(max(1, size * 5 // 8)) for size in p.shape[:2]) for p in full]
        additions = [torch.randn_like(p[s], dtype=dtype) for p, s in zip(full, slices, strict=True)]
        for _ in range(2):
            with plans, torch.no_grad():
                copies = [packed.cast(p, p[s], dtype) for p, s in zip(full, slices, strict=True)]
                for slot, s, addition in zip(buffer.slots, slices, additions, strict=True):
                    packed.accumulate_(slot.view[s], addition)
            expected = [p.detach()[s].to(dtype) for p, s in zip(full, slices, strict=True)]
            if not all(map(torch.equal, copies, expected)):
                raise harness.Mismatch("packed weights are not the cast ones")
            with torch.no_grad():
                for p in full:
                    p.add_(1)
        for slot, s, addition in zip(buffer.slots, slices, additions, strict=True):
            wanted = torch.zeros_like(slot.view)
            wanted[s] = addition.float() + addition.float()
            if not torch.equal(slot.view, wanted):
                raise harness.Mismatch(f"gradients of shape {tuple(slot.view.shape)} are not the sum")
        return {"equal": True}

    for kind in ("SGD", "AdamW", "EMA"):
        yield f"{kind} against float64", partial(check, kind)
    for dtype in HALVES:
        yield f"packed weights and their gradients, {dtype}", partial(pack, dtype)


def sanitizer(setup: Setup) -> Iterator[Item]:
    """compute-sanitizer over the correctness of a few calls. Every tensor is an allocation of its own meanwhile: in the
    memory that torch keeps, an access behind one tensor would be a good one to the next. Calls that fail are not
    reported: torch and cuDNN make such calls, to find out what there is."""
    tools = ("memcheck", "racecheck")

    def run(tool: str) -> dict[str, Any]:
        found = shutil.which("compute-sanitizer")
        if setup.device.type != "cuda" or found is None:
            return {"skipped": "there is no compute-sanitizer, or no GPU"}
        out = setup.out / f"sanitizer_{tool}"
        suite = str(Path(__file__).with_name("gpu_suite.py"))
        share = (setup.until - time.time()) / (len(tools) - tools.index(tool)) - SANITIZER_GRACE
        seconds = min(SANITIZED_SECONDS, share)
        # The smoke cases: every operation once, on every backend; as many as there is time for.
        command = [
            found, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, suite,
            "--part", "1", "--section", "correctness", "--out", str(out), "--smoke", "--sanitized",
            "--until", str(time.time() + seconds),
        ]  # fmt: skip
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds + SANITIZER_GRACE
        )
        summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        log = out / "correctness.jsonl"
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        results = [line["result"] for line in lines if "result" in line]
        shutil.rmtree(out, ignore_errors=True)
        if done.returncode != 0:
            raise harness.Mismatch(f"code {done.returncode}: {summary or done.stdout[-2000:]}")
        return {"summary": summary, "calls": sum("errors" in result for result in results)}

    for tool in tools:
        yield tool, partial(run, tool)


# --- part 1: graphs, and eager steps ---------------------------------------------------------------------------------


def graphs(setup: Setup) -> Iterator[Item]:
    """Replayed steps beside eager ones, bit by bit, in deterministic mode."""

    def run(policy: str, mode: str) -> tuple[list[Tensor], int]:
        config = _trainer_config(setup, graphs=mode, step=policy)
        torch.manual_seed(0)
        method = build_method(config).to(setup.device).to(memory_format=torch.channels_last).train()
        train = TrainStep(config, method)
        results = []
        for turn, middle in enumerate((0.6, 0.62, 0.3, 0.6, 0.6)):
            images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(turn)).to(setup.device)
            images = images.to(memory_format=torch.channels_last)
            results.append(train(images, [1.0, middle, 0.25], lr=0.1, alpha=0.05).losses)
        captured = 0 if train.plans is None else train.plans.graphs
        return [*results, *[value.detach().clone() for value in method.state_dict().values()]], captured

    def check(policy: str) -> dict[str, Any]:
        reason = why_no_graphs(build_method(_trainer_config(setup)), setup.device)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            expected, _ = run(policy, "false")
            given, captured = run(policy, "auto" if reason else "true")
        finally:
            torch.use_deterministic_algorithms(False)
        differing = sum(not torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        if differing:
            raise harness.Mismatch(f"{differing} of {len(given)} results differ")
        return {"equal": True, "graphs": captured} | ({"skipped": reason} if reason else {})

    for policy in step.POLICIES:
        yield f"{policy}: replayed steps beside eager ones", partial(check, policy)


def _trainer_config(setup: Setup, **train: Any) -> Config:
    model = ModelConfig(name="resnet_tiny" if setup.smoke else "resnet18", stem="cifar", in_channels=3)
    return Config(
        model=model,
        method=MethodConfig(name="simclr", hidden_dim=16 if setup.smoke else 256, dim=8 if setup.smoke else 64),
        sampler=SamplerConfig(kind="dynamic"),
        train=TrainConfig(amp="bf16", **train),
    )


# Where a kernel belongs, by its name; the first line that matches.
KERNELS = {
    "copies and casts": re.compile(r"copy|cast|Memcpy", re.IGNORECASE),
    "fills": re.compile(r"fill|Memset", re.IGNORECASE),
    "norm": re.compile(r"batch_norm|bn_|batchnorm|layer_norm|norm_kernel", re.IGNORECASE),
    "convolution or product": re.compile(
        r"conv|gemm|cutlass|cudnn|xmma|wgrad|dgrad|fprop|winograd|nvjet|product|gradient_kernel", re.IGNORECASE
    ),
    "update": re.compile(r"multi_tensor|foreach|sgd|adam|lerp", re.IGNORECASE),
    "elementwise": re.compile(r"elementwise|vectorized|triton", re.IGNORECASE),
    "reduction": re.compile(r"reduce|softmax", re.IGNORECASE),
}


def profiles(setup: Setup) -> Iterator[Item]:
    """Kernels of a step and their time by kind: the published code, the best eager one (channels_last), us3l."""

    def profile(name: str) -> dict[str, Any]:
        settings = setup.settings("resnet18", "cifar")
        side = step.make_side(name, settings, initial_weights(settings), stacked=True, policy="joint")
        images = step.random_images(settings, size=32, batch=2 if setup.smoke else 128)
        for turn in range(1 if setup.smoke else 3):
            side.step(images[turn])
        seconds = harness.interleave(
            {"": step.stepper(side, images)}, rounds=1 if setup.smoke else 10, warmup=0, synchronise=setup.synchronise
        )[""]
        if setup.device.type != "cuda":
            return {"median_ms": median(seconds) * 1e3}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            side.step(images[0])
            torch.cuda.synchronize()
        parts = dict.fromkeys([*KERNELS, "other"], 0.0)
        launched = 0
        for event in profiler.key_averages():
            part = next((part for part, pattern in KERNELS.items() if pattern.search(event.key)), "other")
            parts[part] += event.self_device_time_total / 1e3
            launched += event.count if event.self_device_time_total else 0
        return {"median_ms": median(seconds) * 1e3, "kernels": launched, "gpu_ms": parts}

    for name in ("published", "eager", "us3l"):
        yield name, partial(profile, name)


# --- part 2: convolutions --------------------------------------------------------------------------------------------


def convolutions(setup: Setup) -> Iterator[Item]:
    """Every different convolution of our models at three widths: y, dX and dW, cuDNN beside every other backend; then
    the Triton kernels tile by tile. The models take turns, from the width on that no library was made for."""
    models = [("resnet18", "cifar", 32), ("resnet50", "imagenet", 224), ("mobilenet_v2", "imagenet", 224)]
    of_models = []
    for model, stem, size in models[:1] if setup.smoke else models:
        settings = replace(setup.settings(model, stem), dtype=torch.float32)
        layers = [
            case for case in layer_cases(settings, 16 if setup.smoke else size) if isinstance(case.layer, Conv2d)
        ]
        of_models.append(sorted(layers, key=lambda case: abs(case.width - 0.625)))
    in_turn = chain.from_iterable(zip_longest(*of_models))
    different = {(case.name, case.shape, case.output): case for case in in_turn if case is not None}
    cases = [(case, direction) for case in different.values() for direction in case.directions]
    limits: list[Rates] = []
    for case, direction in cases[:3] if setup.smoke else cases:
        yield _title(case, direction), partial(time_convolution, setup, case, direction, limits)
    for case, direction in cases[:3] if setup.smoke else cases:
        yield f"{_title(case, direction)}, tiles", partial(time_tiles, setup, case, direction)


def _title(case: LayerCase, direction: str) -> str:
    return f"{case.name}, width {case.width:g}, {direction}"


def _sides(setup: Setup, case: LayerCase, direction: str) -> dict[str, Callable[[int], object]]:
    """The convolution of a layer on every backend that takes it."""
    layer = case.layer
    assert isinstance(layer, Conv2d)
    n, dtype = 4 if setup.smoke else 256, torch.bfloat16
    channels_last = {"memory_format": torch.channels_last}
    sets = [torch.randn(n, *case.shape, device=setup.device).to(dtype, **channels_last) for _ in range(setup.sets)]
    grads = [torch.randn(n, *case.output, device=setup.device).to(dtype, **channels_last) for _ in range(setup.sets)]
    weight = nn.Parameter(layer.weight.detach().clone().to(setup.device, **channels_last))
    gradient = torch.zeros_like(weight)
    geometry = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")} | {
        "groups": layer.groups
    }
    out = case.output[0]

    def side(name: str) -> Callable[[int], object]:
        backend = BACKENDS[name]
        if direction == "forward":
            return lambda i: backend.conv2d(sets[i], weight, None, out, *geometry.values())
        into = gradient if direction == "dW" else None
        need = direction == "dX"
        return lambda i: backend.conv2d_backward(grads[i], sets[i], weight, into, None, need, *geometry.values())

    active, groups = active_conv_weight(weight.detach().to(dtype), case.shape[0], out, layer.groups)
    active = active.contiguous(**channels_last)

    def cudnn(i: int) -> object:
        """On packed weights, which one kernel makes for all layers; gradients are left to be added by another."""
        sizes = list(geometry.values())[:3]
        if direction == "forward":
            return torch.ops.aten.convolution(sets[i], active, None, *sizes, False, [0, 0], groups)
        wanted = [direction == "dX", direction == "dW", False]
        return torch.ops.aten.convolution_backward(
            grads[i], sets[i], active, None, *sizes, False, [0, 0], groups, wanted
        )

    sides: dict[str, Callable[[int], object]] = {"cudnn": cudnn}
    for name in backends("conv2d"):
        takes = BACKENDS[name].can_run("conv2d", sets[0], weight, out_channels=out, **geometry)
        another = name != "reference" and (name, direction) != ("triton_tma", "dW")  # its dW is that of `triton`
        if another and takes:
            sides[name] = side(name)
    return sides


def time_tiles(setup: Setup, case: LayerCase, direction: str) -> dict[str, Any]:
    """Microseconds of the Triton kernels with each of their tiles alone."""
    sides = {name: side for name, side in _sides(setup, case, direction).items() if name.startswith("triton")}
    with torch.no_grad():
        return {"tiles": {name: triton_tiles(setup, direction, name, side) for name, side in sides.items()}}


def time_convolution(setup: Setup, case: LayerCase, direction: str, limits: list[Rates]) -> dict[str, Any]:
    """Microseconds by backend, beside the floor; and how many times cuDNN's time an own kernel may take (`break_even`).

    `cudnn` runs on packed weights. An own kernel reads the weight and adds its gradient where they lie, and takes the
    statistics of the norm behind it on the way: it may take as much longer as cuDNN's plan needs for these.
    """
    if not limits:
        limits.append(rates(setup))
    limit, layer, out = limits[0], case.layer, case.output[0]
    assert isinstance(layer, Conv2d)
    n = 4 if setup.smoke else 256
    with torch.no_grad():
        times = microseconds(setup, _sides(setup, case, direction))
    taps = math.prod(layer.kernel_size)
    conv = roofline.Conv(
        case.shape[0], out, layer.in_channels, layer.out_channels, taps, math.prod(case.shape[1:]),
        math.prod(case.output[1:]), layer.groups > 1, layer.in_channels <= 3,
    )  # fmt: skip
    x, y = roofline.HALF * n * conv.c * conv.pixels, roofline.HALF * n * conv.k * conv.out_pixels
    weights = conv.k * taps * (1 if conv.depthwise else conv.c)
    operations = 0.0 if conv.depthwise else 2.0 * n * conv.out_pixels * weights
    saved = {
        "forward": y + weights * (roofline.FULL + roofline.HALF),  # statistics, and the packing
        "dX": 0,
        "dW": weights * (roofline.HALF + 2 * roofline.FULL),  # the addition
    }[direction]
    base = times["us"].get("cudnn")
    return times | {
        "floor_us": limit.floor_us(operations, x + y + weights * roofline.HALF),
        "break_even": None if base is None else 1 + saved / limit.bandwidth * 1e6 / base,
        "to_cudnn": {} if base is None else {name: us / base for name, us in times["us"].items() if name != "cudnn"},
    }


def triton_tiles(setup: Setup, direction: str, backend: str, side: Callable[[int], object]) -> dict[str, Any]:
    """Microseconds of `side`, which runs a backend of Triton kernels, with each of its tiles alone."""
    from us3l_kernels.triton import conv2d as kernels_of

    tables = kernels_of.GRADIENT_TILES if direction == "dW" else kernels_of.PRODUCT_TILES
    shipped, few_rows = tables["half"], kernels_of.FEW_ROWS["half"]
    capability = 10 * torch.cuda.get_device_capability()[0] if setup.device.type == "cuda" else 80
    times: dict[str, Any] = {}
    try:
        for tile in (*shipped, few_rows):
            name = f"{tile.m}x{tile.n}x{tile.k}"
            if name in times or tile.capability > capability:
                continue
            alone = replace(tile, channels=1 << 31)
            tables["half"], kernels_of.FEW_ROWS["half"] = (alone,), alone
            found = microseconds(setup, {f"{backend}, {name}": side}, rounds=3)
            times[name] = next(iter((found["us"] | found.get("errors", {})).values()), None)
    finally:
        tables["half"], kernels_of.FEW_ROWS["half"] = shipped, few_rows
    return times


def linear_layers(setup: Setup) -> Iterator[Item]:
    """The linear layers of a small vision transformer, which reads prefixes, at three widths: y and dX by backend."""
    dtype, rows = torch.bfloat16, 8 if setup.smoke else 256 * 197
    limits: list[Rates] = []

    def run(full_c: int, full_k: int, width: float, direction: str) -> dict[str, Any]:
        if not limits:
            limits.append(rates(setup))
        c, k = active_channels(full_c, width), active_channels(full_k, width)
        xs, grads = (
            [torch.randn(rows, channels, device=setup.device, dtype=dtype) for _ in range(setup.sets)]
            for channels in (full_c, k)
        )
        weight = torch.randn(full_k, full_c, device=setup.device, dtype=dtype)

        def side(name: str) -> Callable[[int], object]:
            backend = BACKENDS[name]
            if direction == "forward":
                return lambda i: backend.linear(xs[i], weight, None, k, c)
            return lambda i: backend.linear_backward(grads[i], xs[i], weight, None, None, True, c)

        sides = {
            name: side(name)
            for name in backends("linear")
            if name != "reference"
            and BACKENDS[name].can_run("linear", xs[0], weight, out_features=k, in_features=c)
        }
        with torch.no_grad():
            times = microseconds(setup, sides)
        moved = roofline.HALF * (rows * (c + k) + c * k)
        return times | {"floor_us": limits[0].floor_us(2.0 * rows * c * k, moved)}

    for full_c, full_k in ((384, 1152), (384, 384), (384, 1536), (1536, 384))[: 1 if setup.smoke else 4]:
        for width in WIDTHS:
            for direction in ("forward", "dX"):
                yield f"{full_c} -> {full_k}, width {width:g}, {direction}", partial(
                    run, full_c, full_k, width, direction
                )


# --- part 3: norms, packing, updates ---------------------------------------------------------------------------------


def norms(setup: Setup) -> Iterator[Item]:
    """Batch norm (two views, ReLU) in GB/s of what must be moved: x, y forward; x, y, dY, dX backward; by backend."""
    shapes = [(8, 16, 4)] if setup.smoke else [
        (256, 64, 32), (256, 128, 16), (256, 256, 8), (256, 512, 4), (256, 40, 32), (256, 64, 56), (256, 256, 56),
        (256, 512, 28), (256, 2048, 7), (256, 96, 112),
    ]  # fmt: skip

    def run(n: int, c: int, size: int, residual: bool) -> dict[str, Any]:
        def tensor() -> Tensor:
            values = torch.randn(n, c, size, size, device=setup.device, dtype=torch.bfloat16)
            return values.to(memory_format=torch.channels_last)

        xs, grads, added = ([tensor() for _ in range(setup.sets)] for _ in range(3))
        weight, bias = torch.ones(c, device=setup.device), torch.zeros(c, device=setup.device)
        into = torch.zeros(2, c, device=setup.device)
        forward: dict[str, Callable[[int], object]] = {}
        backward: dict[str, Callable[[int], object]] = {}
        for name in backends("batch_norm"):
            backend = BACKENDS[name]
            arguments = {"training": True, "views": 2, "activation": "relu", "residual": residual}
            if name == "reference" or not backend.can_run("batch_norm", xs[0], weight, **arguments):
                continue

            def run_forward(i: int, backend: Any = backend) -> Any:
                extra = added[i] if residual else None
                return backend.batch_norm(xs[i], weight, bias, None, None, extra, True, 0.1, 1e-5, 2, "relu")

            saved = [run_forward(i) for i in range(setup.sets)]

            def run_backward(i: int, backend: Any = backend, saved: Any = saved) -> Any:
                y, mean, rstd = saved[i]
                of_mask = None if residual else bias
                return backend.batch_norm_backward(
                    grads[i], xs[i], y, weight, of_mask, mean, rstd, *into, True, residual, True, 2, "relu"
                )

            forward[name], backward[name] = run_forward, run_backward
        nbytes = xs[0].nbytes
        results = {}
        with torch.no_grad():
            moved = {"forward": (2 + residual) * nbytes, "backward": (4 + residual) * nbytes}
            for direction, sides in {"forward": forward, "backward": backward}.items():
                times = microseconds(setup, sides)
                rate = {name: moved[direction] / us / 1e3 for name, us in times["us"].items()}
                results[direction] = times | {"gbps": rate}
        return results

    for shape in shapes:
        for residual in (False, True):
            yield f"{list(shape)}{', residual' if residual else ''}", partial(run, *shape, residual)


def blocks(setup: Setup) -> Iterator[Item]:
    """Two residual blocks in a row (two views), forward and backward: each as one operation beside its modules one by
    one. Predicted is the gain of a read of each norm's input forward, of a read of its gradient backward, and of the
    addition of the gradients of a block's input."""
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "basic": lambda c: BasicBlock(c, c, 1, Layers()),
        "bottleneck": lambda c: Bottleneck(c, c // 4, 1, Layers()),
        "inverted": lambda c: InvertedResidual(c, c, 1, 6, Layers()),
    }
    shapes = [("basic", 16, 8), ("inverted", 16, 8)] if setup.smoke else [
        ("basic", 64, 32), ("basic", 128, 16), ("basic", 40, 32), ("bottleneck", 256, 56), ("bottleneck", 1024, 14),
        ("inverted", 24, 56), ("inverted", 96, 14),
    ]  # fmt: skip
    n, few, dtype = (4, 4, torch.float32) if setup.smoke else (256, 8, torch.bfloat16)

    def run(kind: str, c: int, size: int) -> dict[str, Any]:
        layout = {"memory_format": torch.channels_last}
        model = nn.Sequential(kinds[kind](c), kinds[kind](c)).to(setup.device, **layout)
        apart = deepcopy(model)
        for module in apart.modules():
            module.register_forward_hook(lambda *_: None)  # someone looks at the results between
        xs, grads = (
            [torch.randn(n, c, size, size, device=setup.device).to(dtype, **layout) for _ in range(setup.sets)]
            for _ in range(2)
        )

        def step(network: nn.Module, x: Tensor, grad: Tensor, spec: str) -> list[Tensor]:
            x = x.detach().requires_grad_()
            autocast = torch.autocast(setup.device.type, dtype, enabled=x.dtype != torch.float64 and not setup.smoke)
            with us3l_kernels.backend(spec), us3l_kernels.views(2), autocast:
                y = network(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *network.parameters()], grad)]

        specs = ["auto"] + ["triton"] * (BACKENDS["triton"].unavailable() is None)

        def check() -> None:
            x, grad = xs[0][:few], grads[0][:few]
            expected = step(deepcopy(apart).double(), x.double(), grad.double(), "aten")
            for spec in specs:
                errors = [
                    [harness.relative_error(a, b) for a, b in zip(step(network, x, grad, spec), expected, strict=True)]
                    for network in (model, apart)
                ]
                if not all(a <= max(MULTIPLE * b, SMALL["float32"]) for a, b in zip(*errors, strict=True)):
                    raise harness.Mismatch(f"{spec}: errors of y, dx, parameters, as one operation and apart: {errors}")

        if not setup.compiling:
            check()
        return microseconds(
            setup,
            {
                f"{spec}, {name}": lambda i, network=network, spec=spec: step(network, xs[i], grads[i], spec)
                for spec in specs
                for name, network in (("one operation", model), ("apart", apart))
            },
        )

    for kind, c, size in shapes:
        yield f"{kind} {c} @{size}, {n} images", partial(run, kind, c, size)


def packing(setup: Setup) -> Iterator[Item]:
    """All weights of a width: packed at once beside cast one by one; gradients added at once beside one by one, and
    beside the zero-filled ones of autograd's slices."""

    def run(model: str, width: float) -> dict[str, Any]:
        full = [p for p in initial_weights(setup.settings(model, "cifar")) if p.ndim in (2, 4)]
        full = [p.to(setup.device) for p in full]
        module = nn.ParameterList([nn.Parameter(p) for p in full])
        buffer = gradients.attach(module)
        slices = [tuple(slice(max(1, int(size * width))) for size in p.shape[:2]) for p in full]
        additions = [p[s].bfloat16() for p, s in zip(full, slices, strict=True)]
        copies = packed.PackedWeights(buffer)

        def pack(_: int) -> None:
            copies._pack()

        def cast(_: int) -> None:
            for p, s in zip(full, slices, strict=True):
                p[s].bfloat16()

        nothing_to_pack = packed.PackedWeights(buffer)

        def add_at_once(_: int) -> None:
            with nothing_to_pack:
                add_one_by_one(0)

        def add_one_by_one(_: int) -> None:
            for slot, s, addition in zip(buffer.slots, slices, additions, strict=True):
                packed.accumulate_(slot.view[s], addition)

        def add_zero_filled(_: int) -> None:
            for slot, s, addition in zip(buffer.slots, slices, additions, strict=True):
                whole = torch.zeros_like(slot.view)
                whole[s] = addition.float()
                slot.view.add_(whole)

        with torch.no_grad():
            with copies:
                for p, s in zip(module, slices, strict=True):
                    packed.cast(p, p[s], torch.bfloat16)
            sides = {
                "pack": pack, "cast": cast, "add at once": add_at_once, "add one by one": add_one_by_one,
                "add zero-filled": add_zero_filled,
            }  # fmt: skip
            times = microseconds(setup, sides)
        active = sum(addition.numel() for addition in additions)
        limit = rates(setup)
        return times | {
            "floor_us": {"pack": limit.floor_us(0, 6 * active), "add at once": limit.floor_us(0, 10 * active)},
            "packed_bytes": copies.nbytes,
        }

    for model in ("resnet_tiny",) if setup.smoke else ("resnet18", "resnet50"):
        for width in WIDTHS:
            yield f"{model}, width {width:g}", partial(run, model, width)


def updates(setup: Setup) -> Iterator[Item]:
    """Optimizers with the regulariser inside, and EMA: our kernels, torch's foreach operations, torch's fused ones; as
    a step runs them (`eager_us`: the host's work is in it), and in a graph."""

    @contextmanager
    def without_kernels() -> Iterator[None]:
        takes = kernels.takes
        kernels.takes = lambda *_: False
        try:
            yield
        finally:
            kernels.takes = takes

    def run(model: str) -> dict[str, Any]:
        weights = [w.to(setup.device) for w in initial_weights(setup.settings(model, "cifar"))]

        def parameters() -> list[nn.Parameter]:
            made = [nn.Parameter(w.clone()) for w in weights]
            for p in made:
                p.grad = torch.randn_like(p)
            return made

        options = {"lr": 1e-4, "weight_decay": 1e-4}
        sides: dict[str, Callable[[int], object]] = {}
        for name, make in {"SGD": partial(optim.SGD, momentum=0.9), "AdamW": optim.AdamW}.items():
            for how, context in {"kernel": nullcontext, "foreach": without_kernels}.items():
                optimizer = make(parameters(), alpha=0.05, **options)
                sides[f"{name}, {how}"] = partial(_inside, context, optimizer.step)
        torch_sgd = torch.optim.SGD(parameters(), momentum=0.9, fused=True, **options)
        sides["SGD, torch fused, no regulariser"] = lambda _: torch_sgd.step()
        for how, context in {"kernel": nullcontext, "foreach": without_kernels}.items():
            ema = optim.EMA([w.clone() for w in weights], weights, 0.99)
            sides[f"EMA, {how}"] = partial(_inside, context, ema.update)
        samples = harness.interleave(
            {name: lambda turn, side=side: side(0) for name, side in sides.items()},
            rounds=1 if setup.smoke else 20,
            warmup=2,
            synchronise=setup.synchronise,
        )
        # A graph would freeze the number of AdamW's step.
        times = microseconds(setup, {name: side for name, side in sides.items() if "AdamW" not in name})
        limit, elements = rates(setup), sum(w.numel() for w in weights)
        moved = {"SGD": 20, "AdamW": 28, "EMA": 12}
        return times | {
            "eager_us": {name: median(values) * 1e6 for name, values in samples.items()},
            "floor_us": {name: limit.floor_us(0, size * elements) for name, size in moved.items()},
        }

    for model in ("resnet_tiny",) if setup.smoke else ("resnet18", "resnet50", "mobilenet_v2"):
        yield model, partial(run, model)


def _inside(context: Callable[[], AbstractContextManager[object]], work: Callable[[], object], _: int) -> None:
    with context():
        work()


# --- part 3: tuning, graphs, whole steps -----------------------------------------------------------------------------


def tuning(setup: Setup) -> Iterator[Item]:
    """Measure which backend is the fastest for the calls of a step: what `auto` takes in the sections that follow."""

    def run(model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        if measured.path() is None:
            return {"skipped": "US3L_TUNE_CACHE is empty"}
        settings = setup.settings(model, stem)
        side = step.US3L(settings, initial_weights(settings), policy="joint")
        side.training.plans = None  # every call is to be seen
        if setup.compiling:
            with us3l_kernels.backend("conv2d=triton,batch_norm=triton"):
                record(side.step, step.random_images(settings, size=size, batch=fewer(size, batch))[0])
            return {}
        images = step.random_images(settings, size=size, batch=batch)[0]
        taken = tune(side.step, images, seconds=setup.until - time.time())
        chosen: dict[str, int] = {}
        for measurement in taken:
            choice = measurement.choice(measurement.training is not None)
            chosen[choice.backend if choice else "-"] = chosen.get(choice.backend if choice else "-", 0) + 1
        return {"calls": len(taken), "chosen": chosen}

    for name, arguments in networks(setup).items():
        yield name, partial(run, *arguments)


def networks(setup: Setup) -> dict[str, tuple[str, str, int, int]]:
    """The steps that are timed: model, stem, pixels, images per view."""
    if setup.smoke:
        return {"tiny": ("resnet_tiny", "cifar", 16, 4)}
    return {
        "resnet18 32px b128": ("resnet18", "cifar", 32, 128),
        "mobilenet_v2 224px b128": ("mobilenet_v2", "imagenet", 224, 128),
        "resnet50 224px b128": ("resnet50", "imagenet", 224, 128),
        "resnet18 32px b512": ("resnet18", "cifar", 32, 512),
    }


def fewer(size: int, batch: int) -> int:
    """Images of a step whose kernels are only compiled, in many processes at once: as few as take the same kernels."""
    return batch if size < 64 else batch // 8


def capture(setup: Setup) -> Iterator[Item]:
    """What a new width costs: its first step, the second with the capture, and a replay; and the memory of it all."""

    def run(model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        settings = setup.settings(model, stem)
        side = step.US3L(settings, initial_weights(settings), policy="joint")
        if setup.compiling:
            side.step(step.random_images(settings, size=size, batch=fewer(size, batch))[0])
            return {}
        images = step.random_images(settings, size=size, batch=batch)
        middles = (0.5,) if setup.smoke else (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        seconds: dict[str, list[float]] = {"first": [], "captured": [], "replayed": []}
        memory: list[float] = []
        used: list[float] = []
        for middle in middles:
            side.settings = replace(settings, widths=(1.0, middle, 0.25))
            for turn, which in enumerate(seconds):
                call = step.stepper(side, images)
                (taken,) = harness.interleave(
                    {"": lambda _, turn=turn, call=call: call(turn)}, rounds=1, warmup=0, synchronise=setup.synchronise
                )[""]
                seconds[which].append(taken)
            if setup.device.type == "cuda":
                memory.append(torch.cuda.memory_reserved() / 2**20)
                free, total = torch.cuda.mem_get_info()  # with what the driver keeps of graphs
                used.append((total - free) / 2**20)
        plans = side.training.plans
        return {
            "ms": {which: [value * 1e3 for value in values] for which, values in seconds.items()},
            "reserved_mb": memory,
            "used_mb": used,
            "plans": None if plans is None else {"passes": len(plans), "graphs": plans.graphs},
        }

    for name, arguments in networks(setup).items():
        yield name, partial(run, *arguments)


def steps(setup: Setup) -> Iterator[Item]:
    """Whole steps beside their rivals, as `us3l bench step` times them, and beside the model of the floor. Those that
    compile for minutes come last; what is read then takes the place of what was read without them."""

    def run(name: str, rivals: Sequence[str], model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        settings = setup.settings(model, stem)
        report = step.measure(
            settings, size=size, batch=batch, rivals=rivals, rounds=1 if setup.smoke else 20, warmup=1 if setup.smoke
            else 4, progress=lambda text: print(f"    {text}", flush=True),
        )  # fmt: skip
        return {"report": report, "file": name, "median_ms": report["median_ms"], "ratios": report["ratios"]}

    rivals = ("published", "eager")
    for name, arguments in networks(setup).items():
        yield f"step {name}", partial(run, f"step {name}", rivals, *arguments)
    yield f"step {TRANSFORMER}", partial(vision_transformer, setup)
    # CUDA graphs are compile's best mode; the others are left to `us3l bench step`.
    for name, arguments in networks(setup).items():
        if not setup.smoke:
            yield f"step {name}, compiled", partial(run, f"step {name}", (*rivals, "compile_graphs"), *arguments)


def vision_transformer(setup: Setup) -> dict[str, Any]:
    """A step of a vision transformer with and without graphs: the rivals have none."""
    name, size, batch = ("vit_mini", 16, 2) if setup.smoke else ("vit_small", 224, 128)
    sides = {}
    for mode in ("auto", "false"):
        config = _trainer_config(setup, graphs=mode)
        config.model = ModelConfig(
            name=name, in_channels=3, image_size=size, patch_size=8 if setup.smoke else 16, slicing="full"
        )
        method = build_method(config).to(setup.device).train()
        train = TrainStep(config, method)
        inputs = [torch.randn(2 * batch, 3, size, size, device=setup.device) for _ in range(SETS)]
        sides["graphs" if mode == "auto" else "no graphs"] = lambda turn, train=train, inputs=inputs: train(
            inputs[turn % SETS], WIDTHS, lr=1e-4, alpha=0.0
        )
    samples = harness.interleave(
        sides, rounds=1 if setup.smoke else 10, warmup=1 if setup.smoke else 3, synchronise=setup.synchronise
    )
    return harness.summarise(samples, subject="graphs")


def random_widths(setup: Setup) -> Iterator[Item]:
    """A new random width in every step beside fixed ones of equal operations; then torch.compile at them as well, for
    as long as there is time: what is read with it takes the place of what was read without."""
    name, (model, stem, size, batch) = next(iter(networks(setup).items()))

    def run(rivals: Sequence[str]) -> dict[str, Any]:
        report = widths.measure(
            setup.settings(model, stem),
            size=size,
            batch=batch,
            steps=2 if setup.smoke else 60,
            rivals=rivals,
            rival_seconds=min(300.0, (setup.until - time.time()) / 3),
        )
        return {"report": report, "file": f"random widths {name}", "ratios": report["ratios"]}

    yield f"random widths {name}", partial(run, ())
    if not setup.smoke:
        yield f"random widths {name}, compiled", partial(run, ("compile",))


def one_graph(setup: Setup) -> Iterator[Item]:
    """Passes that read their width from the device, beside a graph for each width: their gradients are compared first.
    Then steps at a new random width each, in which captures count."""

    def passes(dtype: torch.dtype, model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        torch.manual_seed(0)
        network = build_model(model, stem=stem, num_classes=10).to(setup.device).to(memory_format=torch.channels_last)
        network.train()
        images = torch.randn(2 * batch, 3, size, size, device=setup.device).to(memory_format=torch.channels_last)
        batches = torch.cat([images] * len(WIDTHS))
        capture = CudaGraphs(setup.device) if setup.device.type == "cuda" else None
        with nullcontext() if capture is None else capture.stream():
            buffer = gradients.attach(network)
        plans = Plans(buffer, capture=capture)

        def work(context: AbstractContextManager[object], images: Tensor) -> tuple[Tensor]:
            precision = torch.autocast(setup.device.type, dtype, enabled=dtype != torch.float32)
            with context, precision, us3l_kernels.views(2):
                loss = network(images).float().logsumexp(1).sum() / batch
            loss.backward()
            return (loss.detach(),)

        def graph_per_width(_: int) -> None:
            for width in WIDTHS:
                plans.run(width, partial(work, us3l_kernels.use_width(network, width)), images)

        tables = {name: AnyWidth(network, widths=count) for name, count in (("one", 1), ("together", len(WIDTHS)))}

        def one_graph(_: int) -> None:
            for width in WIDTHS:
                tables["one"].set(width)
                plans.run("one", partial(work, tables["one"]), images)

        def one_pass(_: int) -> None:
            tables["together"].set(*WIDTHS)
            plans.run("together", partial(work, tables["together"]), batches)

        sides = {"a graph per width": graph_per_width, "one graph": one_graph, "all in one pass": one_pass}
        found: dict[str, Tensor] = {}
        errors: dict[str, str] = {}
        with plans.stream():
            for name, side in list(sides.items()):
                try:
                    with harness.charged_to(name, setup.device):
                        side(0)
                        buffer.zero_()
                        side(1)
                        found[name] = buffer.flat.clone()
                except Exception as error:  # that of the side: the others are measured
                    errors[name] = harness.told(error)
                    del sides[name]
                buffer.zero_()
            of_widths = next(iter(found.values()))
            differences = {name: ((each - of_widths).norm() / of_widths.norm()).item() for name, each in found.items()}
            if max(differences.values()) > (1e-2 if dtype == torch.float32 else 0.3):
                raise harness.Mismatch(f"the gradients differ: {differences}")
            samples = harness.interleave(
                sides,
                rounds=1 if setup.smoke else 15,
                warmup=0 if setup.smoke else 1,
                synchronise=setup.synchronise,
            )
        report = harness.summarise(samples, subject=next(iter(sides)))
        return {"median_ms": report["median_ms"], "ratios": report["ratios"], "differences": differences} | (
            {"errors": errors} if errors else {}
        )

    def random_steps(model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        drawn = torch.rand(2 if setup.smoke else 60, generator=torch.Generator().manual_seed(0)).mul(0.75).add(0.25)
        result: dict[str, Any] = {"ms": {}, "graphs": {}}
        for mode in ("true", "one"):
            config = _trainer_config(setup, graphs=mode)
            config.model = ModelConfig(name=model, stem=stem, in_channels=3)
            method = build_method(config).to(setup.device).to(memory_format=torch.channels_last).train()
            train = TrainStep(config, method)
            images = torch.randn(2 * batch, 3, size, size, device=setup.device).to(memory_format=torch.channels_last)
            ms = []
            for middle in drawn.tolist():
                step_of = partial(train, images, [1.0, middle, 0.25], lr=1e-4, alpha=0.0)
                (taken,) = harness.interleave(
                    {"": lambda _, step_of=step_of: step_of()}, rounds=1, warmup=0, synchronise=setup.synchronise
                )[""]
                ms.append(taken * 1e3)
            result["ms"][mode] = ms
            result["graphs"][mode] = 0 if train.plans is None else train.plans.graphs
        return result

    reason = BACKENDS["triton"].unavailable()
    graphs_only = None if setup.device.type == "cuda" else "CUDA graphs are for GPUs"
    cases = {"tiny": ("resnet_tiny", "cifar", 8, 2)} if setup.smoke else {
        "resnet18 32px b128": ("resnet18", "cifar", 32, 128),
        "resnet50 224px b32": ("resnet50", "imagenet", 224, 32),
    }  # fmt: skip

    def exact(model: str, stem: str, size: int, batch: int) -> dict[str, Any]:
        """In float32 the gradients must be nearly the same: the kernels are right."""
        with convolutions_in("ieee"):
            return passes(torch.float32, model, stem, size, min(batch, 16))

    runs = {
        "float32 passes": (exact, reason),
        "passes": (partial(passes, torch.bfloat16), reason or graphs_only),
        "steps at random widths": (random_steps, reason or graphs_only),
    }
    for name, arguments in cases.items():
        for kind, (run, skipped) in runs.items():
            yield f"{kind} {name}", partial(dict, skipped=skipped) if skipped else partial(run, *arguments)


SECTIONS: dict[int, dict[str, tuple[Callable[[Setup], Iterator[Item]], float]]] = {
    1: {
        "machine": (machine, 0.1),
        "correctness": (correctness, 0.4),
        "graphs": (graphs, 0.1),
        "profiles": (profiles, 0.1),
        "sanitizer": (sanitizer, 0.3),
    },
    2: {"linear layers": (linear_layers, 0.1), "convolutions": (convolutions, 0.9)},
    3: {
        "norms": (norms, 0.08),
        "blocks": (blocks, 0.04),
        "packing": (packing, 0.04),
        "updates": (updates, 0.04),
        "tuning": (tuning, 0.14),
        "capture": (capture, 0.1),
        "one graph": (one_graph, 0.08),
        "steps": (steps, 0.38),
        "random widths": (random_widths, 0.1),
    },
}
"""By part and name: the section, and its share of the part's time; what a section leaves is for those that follow."""

COMPILED = ("correctness", "linear layers", "convolutions", "norms", "blocks", "tuning", "capture")
"""Sections whose Triton kernels are compiled before the part's first one."""
