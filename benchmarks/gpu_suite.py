"""What has to be known of a GPU, in three parts of at most nine minutes: `gpu_suite.py --part 1|2|3 --out DIR`.

1  the machine, the correctness of every kernel, compute-sanitizer, graphs beside eager, profiles of eager steps
2  convolutions: every backend and tile beside cuDNN, by how much an own kernel may be slower
3  norms, convolutions with them, packing, updates, the cost of graphs, whole steps beside their rivals, random widths

It needs torch and this checkout with its kernels built (`make build PYTHON=python3`), and no network. Every section
runs in a process of its own, item by item: an item that raises, hangs or takes the process with it is reported as that,
and the rest goes on, in a new process where nothing can be computed in the old one any more (after an illegal address,
or a capture that failed). DIR gets a JSON file for each section, from which `us3l bench table`
makes the README's table once it lies in benchmarks/results/, and at the end of a part an archive of all of them. What a
part has no time for is reported as that: `--only` and `--items` run it in another call, and its results join those that
are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks.compile_ahead import sharing  # noqa: E402
from benchmarks.gpu_sections import COMPILED, SECTIONS, Setup  # noqa: E402

PART_SECONDS = 530.0
LONGEST_ITEM = 300.0  # compiling a step takes minutes
RESTARTS = 20  # of a section whose process has died
BROKEN = 3  # code with which a process ends in which nothing can be computed any more
BARRED = 3  # of those, after which the side that is to blame is left out
DIED = "the process died here"
COMPILE_SHARE = 0.17  # of a part's time at most, for compiling ahead
COMPILE_PROCESSES = 12

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=sorted(SECTIONS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: whether the suite itself works")
    parser.add_argument("--only", default="", metavar="TEXT", help="sections with this in their name alone")
    parser.add_argument("--items", default="", metavar="TEXT", help="items with this in their name alone")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="after which no further item starts")
    # What a process of one section is given: its name, and the time.time() after which no item starts.
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)  # the claims of processes that do nothing else
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here (--device cpu --smoke tries the suite itself)")
    # cuBLAS is reproducible with it alone, which the comparison of graphs with eager steps needs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("US3L_TUNE_CACHE", str(options.out / "tune.json"))
    if options.compile is not None:
        compile_items(options)
        return
    if options.section is not None:
        run_section(options.part, options.section, setup_of(options), options.items)
        return
    run_part(options)


def setup_of(options: argparse.Namespace) -> Setup:
    """What the sections are told."""
    until = time.time() + options.seconds if options.until is None else options.until
    return Setup(torch.device(options.device), options.smoke, options.out, until, sanitized=options.sanitized)


def run_part(options: argparse.Namespace) -> list[Path]:
    """Every section of the part, one after the other, each in a process of its own; the files of their results."""
    end = time.time() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: share for name, (_, share) in SECTIONS[options.part].items() if options.only in name}
    if any(name in COMPILED for name in chosen):
        compile_ahead(options)
    start, share, files = time.time(), 0.0, []
    for name in chosen:
        share += chosen[name] / sum(chosen.values())
        log_of(options.out, name).unlink(missing_ok=True)
        for _ in range(1 + RESTARTS):
            until = start + share * (end - start)
            if time.time() >= until or run_process(options, name, until):
                break
        files.append(finish(options.part, name, setup_of(options)))
    with tarfile.open(options.out / f"part{options.part}.tar.gz", "w:gz") as archive:
        for file in sorted(options.out.glob("*.json")):
            archive.add(file, file.name)
    return files


def run_process(options: argparse.Namespace, section: str, until: float) -> bool:
    """Run a section in a process; False if that died, and another should go on where it stopped."""
    log = log_of(options.out, section)
    process = start_process(options, until, "--section", section)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            # Every item writes a line when it begins and when it ends.
            touched = log.stat().st_mtime if log.exists() else time.time()
            stuck = time.time() - touched > LONGEST_ITEM
            if stuck or time.time() > until + 10:
                append(log, {"died": f"stopped after {LONGEST_ITEM:.0f} s" if stuck else "stopped: out of time"})
                return not stuck
    finally:
        end_process(process)
    if process.returncode not in (0, BROKEN):
        append(log, {"died": f"the process ended with code {process.returncode}"})
    return process.returncode == 0


def start_process(options: argparse.Namespace, until: float, *what: str) -> subprocess.Popen[bytes]:
    """This script in another process, as it was called, to end by `until`."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--part", str(options.part), *what,
        "--out", str(options.out), "--device", options.device, "--until", f"{until:.1f}", "--only", options.only,
        "--items", options.items, *(["--smoke"] if options.smoke else []),
    ]  # fmt: skip
    # A group of its own: what it has started (compilers, a sanitizer) goes with it, and disturbs no other section.
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=os.setpgrp)


def end_process(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def compile_ahead(options: argparse.Namespace) -> None:
    """Fill Triton's disk cache, on all cores, before anything is timed. What is not done by the end is left to the
    items; so is everything if this fails."""
    start = time.time()
    until = start + COMPILE_SHARE * options.seconds
    count = 1 if options.smoke else max(1, min(COMPILE_PROCESSES, (os.cpu_count() or 1) - 2))
    with TemporaryDirectory() as claims:
        processes = [start_process(options, until, "--compile", claims) for _ in range(count)]
        try:
            while time.time() < until + 5 and any(process.poll() is None for process in processes):
                time.sleep(0.2)
        finally:
            for process in processes:
                end_process(process)
        made, codes = len(list(Path(claims).iterdir())), [process.returncode for process in processes]
    print(f"compiled {made} Triton kernels ahead in {time.time() - start:.0f} s; processes: {codes}", flush=True)


def compile_items(options: argparse.Namespace) -> None:
    """Compile what the items of the part need, as far as no other process has begun to."""
    torch.set_num_threads(1)
    setup = replace(setup_of(options), compiling=True)
    with sharing(options.compile):
        for name in (name for name in SECTIONS[options.part] if name in COMPILED and options.only in name):
            for item, work in SECTIONS[options.part][name][0](setup):
                if time.time() >= setup.until:
                    return
                if options.items in item:
                    with suppress(Exception):  # the item itself will tell
                        work()
                    if setup.device.type == "cuda":
                        torch.cuda.empty_cache()  # many share the memory


def run_section(part: int, name: str, setup: Setup, items: str = "") -> None:
    """The items of a section that its log does not have, in this process; those with `items` in their name.

    Ends the process after an item that has left nothing in working order.
    """
    setup.out.mkdir(parents=True, exist_ok=True)
    log = log_of(setup.out, name)
    lines = list(lines_of(log))
    done = {line["begin"] for line in lines if "begin" in line}
    blamed = Counter(line["result"]["broken"] for line in lines if "broken" in line.get("result", ()))
    setup = replace(setup, barred=frozenset(side for side, count in blamed.items() if side and count >= BARRED))
    section, _ = SECTIONS[part][name]
    for item, work in section(setup):
        if item in done or items not in item:
            continue
        append(log, {"begin": item})
        result = run_item(item, work, setup.device) if time.time() < setup.until else {"skipped": "out of time"}
        append(log, {"result": result})
        if "broken" in result:
            os._exit(BROKEN)  # the ordinary end would wait for the device


def run_item(item: str, work: Callable[[], Result], device: torch.device) -> Result:
    """The item's result; or its error, in one line and in full. `broken`: the side that has broken the process."""
    print(f"{item} ...", flush=True)
    start = time.perf_counter()
    side = ""
    try:
        result = work()
    except (Exception, harness.Broken) as error:  # whatever it is, it is this item's
        result = {"error": harness.told(error), "traceback": traceback.format_exc()}
        side = error.side if isinstance(error, harness.Broken) else ""
    # Kernels run behind the host: what shows only now is this item's as well.
    if (reason := harness.why_broken(device)) is not None:
        result = {"error": reason, **result, "broken": side}
    if "error" in result:
        print(f"    {result['error']}", flush=True)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def finish(part: int, section: str, setup: Setup) -> Path:
    """Make the section's JSON of its log, and of what an earlier call has left there. Whole steps are written as
    `us3l bench step` would, each to a file of its own."""
    out = setup.out
    file = out / f"part{part}_{slug(section)}.json"
    items: dict[str, Result] = json.loads(file.read_text(encoding="utf-8"))["items"] if file.exists() else {}
    last = "(start)"
    for line in lines_of(log_of(out, section)):
        if "begin" in line:
            last = line["begin"]
            items[last] = {"error": DIED}
        elif "result" in line:
            items[last] = line["result"]
        elif items.get(last, {"error": DIED}).get("error") == DIED:
            items[last] = {"error": line["died"]}
    stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "clocks": clocks(setup.device)}
    for result in items.values():
        if report := result.pop("report", None):
            result["file"] = f"{slug(result['file'])}.json"
            harness.write_json(out / result["file"], report | stamp)
    config = {"part": part, "section": section, "smoke": setup.smoke}
    harness.write_json(file, harness.report("gpu", config, setup.device, items=items) | stamp)
    log_of(out, section).unlink(missing_ok=True)
    errors = [f"{name}: {result['error']}" for name, result in items.items() if "error" in result]
    print(f"{file}: {len(items)} items, {len(errors)} errors", *errors, sep="\n    ", flush=True)
    return file


def log_of(out: Path, section: str) -> Path:
    """What a section has done so far, line by line: it outlives the section's process."""
    return out / f"{slug(section)}.jsonl"


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def append(log: Path, line: Result) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines_of(log: Path) -> Iterator[Result]:
    """The lines of a log; one that was torn by the end of its process is left out."""
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def clocks(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature of the GPU, as nvidia-smi tells them."""
    if device.type != "cuda":
        return None
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(fields.split(","), (value.strip() for value in told.splitlines()[0].split(",")), strict=True))


if __name__ == "__main__":
    main()
