"""The compiled CUDA library: its machine code, read without a GPU, and its kernels, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l_kernels import _native, backend, functional
from us3l_kernels.optim import EMA, SGD, AdamW, kernels

REGISTRATION = Path(__file__).parents[2] / "csrc" / "cuda" / "registration.cpp"

pytestmark = pytest.mark.skipif(_native.load_cuda() is None, reason=f"no CUDA library: {_native.why_cuda}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("operator", re.findall(r'm\.impl\("(\w+)"', REGISTRATION.read_text()))
def test_the_library_has_the_operator(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"us3l_native::{operator}", "CUDA")


# ---------------------------------------------------------------------------------------------- machine code

# What every instance of a kernel must have: the pattern of its name and the least numbers of 16-byte loads and stores,
# computed from what the pattern found. Kernels of one element to a thread have none.
NUMBER, FLAG, TYPE = r"(\d+)", r"(true|false)", r"(?:float|c10::Half|c10::BFloat16)"
GATES = {
    rf"update_kernel<.*Sgd<{FLAG}, {FLAG}>": lambda m, t: (2 + yes(m) + yes(t), 1 + yes(m) + yes(t)),
    r"update_kernel<.*Adamw": lambda: (4, 3),
    r"update_kernel<.*Ema": lambda: (2, 1),
    rf"copy_kernel<float, {TYPE}, false>": lambda: (2, 1),
    rf"copy_kernel<{TYPE}, float, true>": lambda: (3, 2),
    rf"statistics_kernel<{TYPE}, {NUMBER}>": lambda w: vectors(w, 4, 2),
    rf"apply_kernel<{TYPE}, {NUMBER}>": lambda w: vectors(w, 2, 1),
    rf"reduce_kernel<{FLAG}, {TYPE}, {NUMBER}>": lambda y, w: vectors(w, 2 + yes(y), 3),
    rf"input_gradient_kernel<{FLAG}, {TYPE}, {NUMBER}>": lambda y, w: vectors(w, 2 + yes(y), 1),
    # The columns under four pixels, and a row of the filters.
    rf"correlate_kernel<{TYPE}, {NUMBER}, {NUMBER}>": lambda k, s: (3 * int(s) + 2 * int(k), 4),
    rf"adjoint_stride2_kernel<{TYPE}, {NUMBER}>": lambda k: (int(k) + (int(k) - 1) // 2 + 2, 4),
    rf"filter_gradient_kernel<{TYPE}, {NUMBER}, {NUMBER}, {NUMBER}>": lambda w, k, s: vectors(
        w, 4 + 3 * int(s) + int(k), int(k)
    ),
    # Reads are copies to shared memory. Pairs of float32 are what a thread has of a partial dW.
    rf"correlate_product_kernel<{TYPE}, {NUMBER}, {FLAG}>": lambda n, _: (0, int(n)),
    rf"gradient_product_kernel<{TYPE}, {NUMBER}>": lambda n: (0, 0),
    r"general_kernel<|filters_kernel|finish_\w+_kernel|running_statistics_kernel": lambda: (0, 0),
}
REGISTERS = 232  # of a thread at most: 7x7 taps have a row of the filters, pixels and sums in them


def check_tensor_cores(name: str, code: str) -> bool:
    """Whether they have all products of the kernel. All it reads are 16-byte copies to shared memory, then."""
    match = re.search(rf"_product_kernel<{TYPE}, {NUMBER}", name)
    if match is None:
        return False
    chunks = int(match[1])  # of 8 channels, in a row of a tile
    # In a stage 16 x 8 x 16 for each chunk, 2 x 2 of them; and in two stages before the loop and in that, a thread
    # copies 4 chunks of pixels and a 128th of 32 rows of what they are multiplied with.
    assert len(re.findall(r"\bHMMA\.16816\.F32", code)) == 4 * chunks, f"{name}: products"
    assert code.count("LDGSTS") == len(re.findall(r"LDGSTS\.E\.BYPASS\.128", code)) == 3 * (4 + -(-chunks // 4)), name
    assert "LDSM.16" in code and "FFMA" not in code
    return True


# The loads that a kernel makes before it uses what any of them has read: of four rows of all tensors that a norm reads,
# of the pixels under a row of taps, of the results of four blocks. The scheduler may put one behind the first use.
IN_FLIGHT = {
    rf"statistics_kernel<{TYPE}, {NUMBER}>": lambda w: 4,
    rf"apply_kernel<{TYPE}, {NUMBER}>": lambda w: 8 - 1,
    rf"(?:reduce|input_gradient)_kernel<{FLAG}, {TYPE}, {NUMBER}>": lambda y, w: 4 * (2 + yes(y)) - 1,
    rf"correlate_kernel<{TYPE}, {NUMBER}, {NUMBER}>": lambda k, s: 3 * int(s) + int(k) - 1,
    rf"adjoint_stride2_kernel<{TYPE}, {NUMBER}>": lambda k: int(k) // 2 + 2 - 1,
    rf"filter_gradient_kernel<{TYPE}, {NUMBER}, ([357]), {NUMBER}>": lambda w, k, s: 3 * int(s) + int(k) - 1,
    r"finish_(?:statistics|gradients)_kernel": lambda: 8,
    r"finish_(?:filter_)?gradient_kernel": lambda: 4,
}


def check_loads_in_flight(name: str, code: str) -> bool:
    """Whether it is a kernel of IN_FLIGHT, which has as many."""
    for pattern, least in IN_FLIGHT.items():
        if (match := re.search(pattern, name)) is not None:
            # The blocks of a second stage may be fewer; elsewhere what is read on a condition is the parameters.
            found = loads_in_flight(code, r"@!?P\d LDG" if "finish_" in pattern else "LDG")
            assert found >= least(*match.groups()), f"{name}: {found} loads in flight"
            return True
    return False


def loads_in_flight(code: str, pattern: str) -> int:
    """The most loads in a row, with no branch between them, before any of their results is used."""
    most, waiting = 0, set()
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?);", code):
        to, *others = re.findall(r"\bR\d+", line) or [None]
        load = re.match(pattern, line) is not None
        if waiting & {*others, None if load else to} or re.match(r"(@!?U?P\w+ )?(BRA|BAR|EXIT)", line):
            waiting = set()
        if load:
            waiting.add(to)
        most = max(most, len(waiting))
    return most


def yes(flag: str) -> bool:
    return flag == "true"


def vectors(width: str, loads: int, stores: int) -> tuple[int, int]:
    return (loads, stores) if int(width) > 1 else (0, 0)


def tool(name: str) -> str:
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    path = shutil.which(name) or (bundled and bundled.exists() and str(bundled))
    if not path:
        pytest.skip(f"no {name}")
    return path


def output_of(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def test_the_machine_code_moves_16_bytes_at_a_time_and_spills_nothing():
    """Static gates that need no GPU, for every kernel and architecture: vector accesses, registers, no local memory."""
    library = _native.load_cuda().__file__
    listing = output_of(tool("cuobjdump"), "-sass", library)
    usage = output_of(tool("cuobjdump"), "-res-usage", library)
    functions = listing.split("Function :")[1:]
    mangled = [code.split("\n", 1)[0].strip() for code in functions]
    names = output_of(tool("c++filt"), text="\n".join(mangled)).splitlines()
    # Of what the compiler says of itself: registers, stack and local memory.
    resources = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(resources) == len(functions)
    for registers, stack, local in resources:
        assert int(registers) <= REGISTERS and int(stack) == int(local) == 0
    seen = dict.fromkeys(GATES, 0)
    for check in (check_tensor_cores, check_loads_in_flight):
        assert any([check(*each) for each in zip(names, functions, strict=True)])
    for name, code in zip(names, functions, strict=True):
        pattern, match = next(((p, m) for p in GATES if (m := re.search(p, name))), (None, None))
        assert match is not None, f"no gate for {name}"
        seen[pattern] += 1
        loads, stores = GATES[pattern](*match.groups())
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        assert code.count("LDG.E.128") >= loads, f"{name} loads {code.count('LDG.E.128')} times 16 bytes"
        assert code.count("STG.E.128") >= stores, f"{name} stores {code.count('STG.E.128')} times 16 bytes"
    assert all(seen.values()), seen


# ---------------------------------------------------------------------------------------------- on a GPU

SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (24, 1, 3, 3), (), (1,), (512, 256, 3, 3), (70001,)]


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_optimizers(optimizer, channels_last, monkeypatch):
    """The launched kernels against foreach, with more tensors than one launch takes, and the writes they declare."""
    torch.manual_seed(0)

    def in_format(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor

    values = [in_format(torch.randn(s, device="cuda")) for s in SHAPES * 20]
    grads = [[torch.randn_like(v) for v in values] for _ in range(3)]

    def train() -> list[Tensor]:
        params = [nn.Parameter(v.clone()) for v in values]
        teachers = [torch.ones_like(p) for p in params]
        ema = EMA(teachers[::2], params[::2], 0.9)
        stepped = optimizer(params, lr=0.01, weight_decay=0.3, alpha=0.1)
        for step_grads in grads:
            for p, g in zip(params, step_grads, strict=True):
                p.grad = g.clone()
            versions = [t._version for t in (*params, *teachers[::2])]
            stepped.step(ema=ema)
            assert all(t._version > v for t, v in zip((*params, *teachers[::2]), versions, strict=True))
        return [*params, *teachers]

    by_kernel = train()
    monkeypatch.setattr(kernels, "takes", lambda *_: False)
    for a, b in zip(by_kernel, train(), strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [33, 64])
def test_operations(c, dtype):
    """Depthwise convolution and batch norm against float64, and captured: a replay gives the same bits."""
    torch.manual_seed(0)
    x = torch.randn(8, c, 28, 30, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight, scale, shift = (torch.rand(s, device="cuda") for s in ((80, 1, 3, 3), (80,), (80,)))
    tensors = [t.requires_grad_() for t in (x, weight, scale, shift)]
    grad = torch.randn(8, c, 14, 15, device="cuda").to(dtype)

    def run(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        x, weight, scale, shift = tensors
        h = functional.conv2d(x, weight, stride=2, padding=1, groups=80)
        y = functional.batch_norm(h, scale, shift, training=True, views=2, activation="relu6")
        return [y, *torch.autograd.grad(y, tensors, grad)]

    with backend("conv2d=cuda,batch_norm=cuda"):
        eager = run(tensors, grad)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(tensors, grad)
    graph.replay()
    with backend("reference"):
        exact = run([t.detach().double().requires_grad_() for t in tensors], grad.double())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for ours, replayed, other in zip(eager, captured, exact, strict=True):
        assert torch.equal(ours, replayed)
        # Not the largest error: a value within rounding of a kink of relu6 has no one gradient.
        assert F.mse_loss(ours.double(), other).sqrt() <= tolerance * other.abs().max()
