"""The machine code of the Triton kernels, without a GPU: every shipped binary compiled, and its instructions counted.

What is gated (`problems`): nothing is spilled, shared memory fits, matrix products are made by the tensor cores (on
sm_90 by the warpgroup instructions alone), and loads and stores are of 16 bytes. Triton brings the compiler (ptxas) and
the disassembler; its cache (TRITON_CACHE_DIR) keeps what was compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import launches
from us3l_kernels.triton import KERNEL_FILES, SHARED_MEMORY, Binary

CAPABILITIES = tuple(SHARED_MEMORY)
RESULTS = Path(__file__).parent / "results" / "static"
WARP = 32


@dataclass(frozen=True)
class Code:
    """Of one binary. registers: of a thread. stack: bytes of a thread, where spills go. shared: bytes of a block.

    instructions: how often each kind stands in the code: the matrix instructions, and loads and stores by the bytes
    that a thread moves with one ("load 16"); "load tma" counts those of whole tiles.
    """

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def binaries(capability: int) -> Iterator[Binary]:
    """Every binary that is shipped for GPUs of this compute capability, no two alike."""
    seen = set()
    for name in KERNEL_FILES:
        for binary in import_module(f"us3l_kernels.triton.{name}").binaries(capability):
            if (key := identity(binary)) not in seen:
                seen.add(key)
                yield binary


def binaries_of_steps(capability: int) -> list[Binary]:
    """What whole training steps ask for besides (benchmarks/launches.py): other tiles of the same geometries and
    epilogues, no two alike."""
    listed = {identity(binary) for binary in binaries(capability)}
    found: dict[Hashable, Binary] = {}
    for step in launches.STEPS:
        for launch in chain(*step.record(capability, launches.WIDTHS)):
            if (key := identity(launch.binary)) not in listed:
                found.setdefault(key, launch.binary)
    return list(found.values())


def identity(binary: Binary) -> Hashable:
    """Equal for binaries that are the same."""
    types = {name: binary.types.get(name, "i32") for name in binary.kernel.arg_names if name not in binary.constants}
    options = binary.warps, binary.stages, binary.registers
    return binary.kernel, *types.items(), frozenset(binary.constants.items()), *options


def compile_binary(binary: Binary, capability: int) -> Code:
    """Compile ahead of time. Raises what Triton raises, e.g. where a kernel needs more than the GPU has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = binary.kernel.arg_names
    signature = {n: "constexpr" if n in binary.constants else binary.types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=binary.kernel, signature=signature, constexprs=dict(binary.constants), attrs=aligned)
    options = {"num_warps": binary.warps, "num_stages": binary.stages, "maxnreg": binary.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    registers, stack, instructions = _disassemble(compiled.asm["cubin"])
    return Code(binary.name, capability, registers, stack, compiled.metadata.shared, instructions)


def _disassemble(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, bytes of stack, and the counted instructions."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    counted = Counter(kind for name in names if (kind := _kind(name)) is not None)
    return int(found[1]), int(found[2]), dict(sorted(counted.items()))


_MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "UTCHMMA")


def _kind(instruction: str) -> str | None:
    """What an instruction is counted as; None for those that are not."""
    head, *modifiers = instruction.split(".")
    if head in _MATRIX:
        return head
    if head in ("LDL", "STL"):
        return "spill"
    if head == "UTMALDG":
        return "load tma"
    if head == "UTMASTG":
        return "store tma"
    if head == "ATOMG" and "EXCH" in modifiers:
        return None  # hands a descriptor to the tensor memory accelerator
    names = {"LDG": "load", "LDGSTS": "load", "STG": "store", "RED": "atomic", "ATOMG": "atomic", "REDG": "atomic"}
    if head not in names:
        return None
    bits = next((int(found[1]) for m in modifiers if (found := re.fullmatch(r"[US]?(8|16|64|128|256)", m))), 32)
    return f"{names[head]} {bits // 8}"


def problems(code: Code, binary: Binary) -> list[str]:
    """What is wrong with a binary; nothing, if it may be shipped."""
    count = code.instructions
    found = []
    if code.stack or count.get("spill"):
        found.append(f"{code.stack} bytes of stack, {count.get('spill', 0)} spills")
    if code.shared > SHARED_MEMORY[code.capability]:
        found.append(f"{code.shared} bytes of shared memory, there are {SHARED_MEMORY[code.capability]}")
    if any(kind.startswith("atomic") for kind in count):
        found.append("atomics: the order of a sum is not fixed")
    if binary.matrix:
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(code.capability, "HMMA")
        made = {kind: count[kind] for kind in _MATRIX if kind in count}
        if not made.get(wanted) or len(made) > 1:
            found.append(f"matrix instructions {made or 'none'}, expected {wanted} alone")
    narrow = {kind: n for kind, n in count.items() if kind.startswith(("load", "store")) and kind not in _WIDE}
    if binary.narrow is not None and sum(narrow.values()) > binary.narrow:
        found.append(f"loads and stores of less than 16 bytes: {narrow}, expected at most {binary.narrow}")
    return found


_WIDE = ("load 16", "load 32", "load tma", "store 16", "store 32", "store tma")


def path(folder: Path, version: str) -> Path:
    """Where the result for a version of Triton lies."""
    return folder / f"triton-{version}.json"


def measure(capabilities: Sequence[int], progress: Callable[[str], None]) -> dict[str, Any]:
    """Compile everything; the result is JSON: a row for every shipped binary, and for those of steps that are not
    well."""
    import triton

    rows, steps = [], {}
    for capability in capabilities:
        for binary in binaries(capability):
            progress(f"sm_{capability}: {binary.name}")
            rows.append(_row(binary, capability))
        more = binaries_of_steps(capability)
        steps[f"sm_{capability}"] = len(more)
        for number, binary in enumerate(more):
            progress(f"sm_{capability}: {number} of {len(more)} more of steps")
            if (row := _row(binary, capability))["problems"]:
                rows.append(row)
    return {"triton": triton.__version__, "rows": rows, "more_of_steps": steps}


def _row(binary: Binary, capability: int) -> dict[str, Any]:
    try:
        code = compile_binary(binary, capability)
    except Exception as error:  # one that does not compile is reported like any other
        return {"name": binary.name, "capability": capability, "problems": [f"does not compile: {error}"]}
    return {**asdict(code), "stages": binary.stages, "problems": problems(code, binary)}


def markdown(result: dict[str, Any]) -> str:
    """The table, for people."""
    of_steps = ", ".join(f"{number} for {gpu}" for gpu, number in result["more_of_steps"].items())
    lines = [
        f"Machine code of the shipped Triton binaries, Triton {result['triton']}. Bytes of stack are spills; loads and "
        "stores are counted by the bytes that a thread moves with one.",
        "",
        "Whole training steps of ResNet-18, ResNet-50 and MobileNetV2 ask for more, other tiles of the same geometries "
        f"and epilogues: {of_steps}. They were compiled, too, and stand here only if something is wrong with them.",
        "",
        "| GPU | binary | registers | stack | shared KB | stages | matrix | loads | stores | |",
        "|---|---|--:|--:|--:|--:|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "registers" not in row:
            lines.append(f"| sm_{row['capability']} | {row['name']} | | | | | | | | {'; '.join(row['problems'])} |")
            continue
        counted = row["instructions"]
        cells = [
            f"sm_{row['capability']}",
            row["name"],
            row["registers"],
            row["stack"],
            f"{row['shared'] / 1024:.0f}",
            row["stages"],
            ", ".join(f"{n} {kind}" for kind, n in counted.items() if kind in _MATRIX),
            *(
                ", ".join(f"{n} x {kind.split()[1]}" for kind, n in counted.items() if kind.startswith(access))
                for access in ("load", "store")
            ),
            "; ".join(row["problems"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
