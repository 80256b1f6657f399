"""The body of the CUDA kernel of SGD (csrc/cuda/sgd.h), compiled for the CPU and run there thread by thread.

What this leaves to a GPU is the launch; test_multi_tensor_cuda at the end needs one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from us3l_kernels import _native
from us3l_kernels.optim import EMA, SGD, kernels

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")

HARNESS = r"""
#include "sgd.h"
using namespace us3l;

template <bool kMomentum, bool kTeacher>
void run(const SgdTable& table, const SgdOptions& options) {
  for (int32_t block = 0; block < table.blocks(); ++block)
    for (int thread = 0; thread < kThreads; ++thread) update_chunk<kMomentum, kTeacher>(table, options, block, thread);
}

extern "C" {
int max_tensors() { return kMaxTensors; }
int chunk() { return kChunk; }

int64_t group_elements(int64_t dim, int64_t rows, int64_t numel, int64_t groups) {
  return group_numel(dim, rows, numel, groups);
}

float decay(int64_t begin, int64_t group_numel, int32_t i, float weight_decay, float alpha, int32_t groups) {
  SgdOptions o{};
  o.weight_decay = weight_decay, o.alpha = alpha, o.groups = groups;
  return ChunkGroups(begin, group_numel, groups).decay(i, o);
}

void sgd(int n, float** params, const float** grads, float** momenta, float** teachers, const int64_t* numel,
         const int64_t* group_numel, float lr, float momentum, float weight_decay, bool nesterov, float alpha,
         int32_t groups, float ema_weight) {
  const SgdOptions options{lr, momentum, weight_decay, alpha, groups, ema_weight, nesterov};
  SgdTable table;
  for (int t = 0; t < n; ++t)
    table.add({params[t], grads[t], momenta ? momenta[t] : nullptr, teachers ? teachers[t] : nullptr, numel[t],
               group_numel[t]});
  auto kernel = momenta ? (teachers ? run<true, true> : run<true, false>)
                        : (teachers ? run<false, true> : run<false, false>);
  kernel(table, options);
}
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sgd")
    source, library = folder / "harness.cpp", folder / "harness.so"
    source.write_text(HARNESS)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]  # misaligned 16-byte accesses, overflow
    command = [COMPILER, *flags, "-shared", "-fPIC", f"-I{CUDA_SOURCES}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.decay.restype = ctypes.c_float
    loaded.group_elements.restype = ctypes.c_int64
    return loaded


def pointers(tensors: list[Tensor]) -> ctypes.Array | None:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors]) if tensors else None


def host_sgd(host: ctypes.CDLL, params, grads, buffers, teachers, group, ema_momentum) -> None:
    """The kernel's work for fp32 CPU tensors, with the signature of `sgd_` in optim/kernels.py."""
    groups = group["groups"]
    i64 = ctypes.c_int64
    sizes = [i64(p.numel()) for p in params]
    group_sizes = [
        host.group_elements(i64(p.ndim), i64(p.shape[0] if p.ndim else 1), i64(p.numel()), i64(groups)) for p in params
    ]
    host.sgd(
        len(params),
        pointers(params),
        pointers(grads),
        pointers(buffers),
        pointers(teachers),
        (i64 * len(params))(*sizes),
        (i64 * len(params))(*group_sizes),
        ctypes.c_float(group["lr"]),
        ctypes.c_float(group["momentum"]),
        ctypes.c_float(group["weight_decay"]),
        ctypes.c_bool(group["nesterov"]),
        ctypes.c_float(group["alpha"]),
        groups,
        ctypes.c_float(1.0 - ema_momentum),
    )


def guarded(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A float32 copy with the strides of `values` inside a larger storage of NaN, `offset` elements after 64 bytes."""
    storage = torch.full((values.numel() + 64,), float("nan"))
    start = (-(storage.data_ptr() // 4)) % 16 + offset
    view = storage.as_strided(values.shape, values.stride(), start)
    view.copy_(values)
    return view, storage


def check_against_float64(host, shapes, *, momentum, nesterov, teacher, groups=8, offset=0, channels_last=False):
    torch.manual_seed(0)
    alpha = 0.7 / max(1, groups - 1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    exact = [torch.randn(s, dtype=torch.float64).contiguous(memory_format=memory_format) for s in shapes]
    exact = [nn.Parameter(p) for p in exact]
    exact_teachers = [torch.randn_like(p) for p in exact]
    params, grads, buffers, teachers = (
        [guarded(like.detach(), offset) for like in tensors]
        for tensors in (exact, exact, [torch.zeros_like(p) for p in exact], exact_teachers)
    )
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.3, "nesterov": nesterov}
    optimizer = SGD(exact, **options, alpha=alpha, groups=groups)
    ema = EMA(exact_teachers, exact, 0.9)
    for _ in range(3):
        for p, (g, _storage) in zip(exact, grads, strict=True):
            g.copy_(torch.randn(p.shape))
            p.grad = g.double()
        optimizer.step(ema=ema)
        views = [[view for view, _ in pairs] for pairs in (params, grads, buffers, teachers)]
        used = [views[0], views[1], views[2] if momentum else [], views[3] if teacher else []]
        host_sgd(host, *used, optimizer.param_groups[0], 0.9)
    for (p, _), q in zip(params, exact, strict=True):
        torch.testing.assert_close(p, q.float(), rtol=2e-6, atol=2e-6)
    if teacher:
        for (t, _), u in zip(teachers, exact_teachers, strict=True):
            torch.testing.assert_close(t, u.float(), rtol=2e-6, atol=2e-6)
    if momentum:
        for (m, _), q in zip(buffers, exact, strict=True):
            torch.testing.assert_close(m, optimizer.state[q]["momentum_buffer"].float(), rtol=2e-6, atol=4e-6)
    for view, storage in (*params, *grads, *buffers, *teachers):
        assert storage.isnan().sum() == storage.numel() - view.numel(), "written outside of a tensor"


SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (24, 1, 3, 3), (), (1,), (17, 2, 1, 3), (2, 3, 4)]


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_kernel_body_against_float64(host, momentum, nesterov, teacher):
    check_against_float64(host, SHAPES, momentum=momentum, nesterov=nesterov, teacher=teacher)


def test_tensors_of_several_chunks(host):
    """Groups that begin inside a chunk, span several and are small ones: 8 * 1100, 600 * 8 and 3 * 4096 elements."""
    shapes = [(8, 11, 10, 10), (600, 8, 1, 1), (3, 4096, 1, 1), (9001,), (100, 90)]
    check_against_float64(host, shapes, momentum=0.9, nesterov=False, teacher=True)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_tensors_that_start_anywhere(host, offset):
    check_against_float64(host, SHAPES, momentum=0.9, nesterov=False, teacher=True, offset=offset)


def test_channels_last(host):
    shapes = [(20, 5, 3, 3), (24, 1, 3, 3), (16, 600, 1, 1)]
    check_against_float64(host, shapes, momentum=0.9, nesterov=False, teacher=True, channels_last=True)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 13), max_size=4).map(tuple), min_size=1, max_size=6),
    groups=st.integers(1, 20),
    offset=st.integers(0, 3),
)
def test_any_shapes(host, shapes, groups, offset):
    check_against_float64(host, shapes, momentum=0.9, nesterov=True, teacher=True, groups=groups, offset=offset)


@settings(max_examples=200, deadline=None)
@given(
    begin=st.integers(0, 2**50),
    size=st.one_of(st.integers(1, 5000), st.integers(1, 2**48)),
    i=st.integers(0, 4095),
    groups=st.integers(1, 64),
)
def test_group_of_an_element_in_64_bits(host, begin, size, i, groups):
    begin -= begin % host.chunk()
    group = min((begin + i) // size, groups - 1)
    decay = host.decay(
        ctypes.c_int64(begin), ctypes.c_int64(size), i, ctypes.c_float(1.0), ctypes.c_float(1 / 64), groups
    )
    assert decay == 1 - group / 64  # exact in float32


def test_the_optimizer_hands_its_work_to_the_kernel(host, monkeypatch):
    """The same steps with and without the kernel: teachers of some parameters, missing gradients, option changes."""
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(s)) for s in SHAPES]
    other = [nn.Parameter(p.detach().clone()) for p in plain]
    plain_teachers, other_teachers = ([torch.ones_like(p) for p in plain[:5]] for _ in range(2))
    steps = []
    for params, teachers in ((plain, plain_teachers), (other, other_teachers)):
        optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.3, alpha=0.1, decay_without_grad=True)
        steps.append((params, optimizer, EMA(teachers, params[:5], 0.9)))
    calls = []

    def kernel(params, grads, buffers, teachers, group, ema_momentum):
        calls.append(len(teachers))
        host_sgd(host, params, grads, buffers, teachers, group, ema_momentum)

    monkeypatch.setattr(kernels, "sgd_", kernel)
    for step in range(3):
        grads = [torch.randn_like(p) for p in plain]
        for use_kernel, (params, optimizer, ema) in enumerate(steps):
            monkeypatch.setattr(kernels, "takes", lambda op, *_, sgd=bool(use_kernel): sgd and op == "sgd_")
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            params[step].grad = None
            optimizer.param_groups[0]["alpha"] = 0.1 - 0.01 * step
            optimizer.step(ema=ema)
    assert calls == [5, 0] * 3
    for a, b in zip([*plain, *plain_teachers], [*other, *other_teachers], strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)


needs_library = pytest.mark.skipif(_native.load_cuda() is None, reason=f"no CUDA library: {_native.why_cuda}")


@needs_library
def test_the_library_has_the_operator():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("us3l_native::sgd_", "CUDA")


@needs_library
def test_the_machine_code_moves_16_bytes_at_a_time_and_spills_nothing():
    """Static gates that need no GPU: vector loads and stores in every variant, no local memory."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    tool = shutil.which("cuobjdump") or (bundled and bundled.exists() and str(bundled))
    if not tool:
        pytest.skip("no cuobjdump")
    listing = subprocess.run([tool, "-sass", _native.load_cuda().__file__], capture_output=True, text=True, check=True)
    kernels = [code for code in listing.stdout.split("Function :")[1:] if "sgd_kernel" in code.split("\n", 1)[0]]
    assert len(kernels) >= 4 and len(kernels) % 4 == 0  # with and without momentum and teacher, per architecture
    for code in kernels:
        momentum, teacher = ("ILb1E" in code), ("Lb1EEEv" in code)
        assert code.count("LDG.E.128") >= 2 + momentum + teacher
        assert code.count("STG.E.128") >= 1 + momentum + teacher
        assert not re.search(r"\b(LDL|STL)\b", code)


@needs_library
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_multi_tensor_cuda(momentum, nesterov, channels_last, monkeypatch):
    """The launched kernel against foreach, with more tensors than one launch takes, and the writes it declares."""
    torch.manual_seed(0)
    shapes = [*SHAPES, (512, 256, 3, 3), (70001,)] * 10
    values = [torch.randn(s, device="cuda") for s in shapes]
    grads = [[torch.randn(s, device="cuda") for s in shapes] for _ in range(3)]
    launches = []
    launch = kernels.sgd_

    def counted(*args):
        launches.append(len(args[0]))
        launch(*args)

    def train() -> list[Tensor]:
        params = [nn.Parameter(in_format(v.clone())) for v in values]
        teachers = [torch.ones_like(p) for p in params]
        ema = EMA(teachers[::2], params[::2], 0.9)
        optimizer = SGD(params, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.3, alpha=0.1)
        for step_grads in grads:
            for p, g in zip(params, step_grads, strict=True):
                p.grad = torch.empty_like(p).copy_(g)
            versions = [t._version for t in (*params, *teachers[::2])]
            optimizer.step(ema=ema)
            assert all(t._version > v for t, v in zip((*params, *teachers[::2]), versions, strict=True))
        return [*params, *teachers]

    def in_format(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor

    monkeypatch.setattr(kernels, "sgd_", counted)
    by_kernel = train()
    assert launches == [len(shapes) // 2] * 2 * len(grads)
    monkeypatch.setattr(kernels, "takes", lambda *_: False)
    for a, b in zip(by_kernel, train(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
