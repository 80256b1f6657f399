"""us3l on several processes: the same as one process with all images, and as a run that nobody disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from us3l.distributed import World, launched

Results = dict[Any, Any]
BATCH = 16  # of distributed_runs.py


def run(folder: Path, cases: str) -> Results:
    script = Path(__file__).parent / "distributed_runs.py"
    subprocess.run(
        [sys.executable, str(script), str(folder), cases],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(tmp_path_factory.mktemp("runs"), "few")


def assert_equal_to_one_process(results: Results) -> None:
    for size in (2, 4):
        for case, first in results[size][0].items():
            ranks = [results[size][rank][case] for rank in range(size)]
            for other in ranks[1:]:
                for key, value in first["weights"].items():
                    assert torch.equal(value, other["weights"][key]), (size, case, key)
            alone = results[1][0][case]
            # The images: within a view, one process behind the other.
            parts = [rank["images"].unflatten(1, (-1, BATCH // size)) for rank in ranks]  # [steps, views, B, ...]
            assert torch.equal(torch.cat(parts, 2).flatten(1, 2), alone["images"]), (size, case)
            errors = {key: error(value, alone["weights"][key]) for key, value in first["weights"].items()}
            worst = max(errors, key=errors.__getitem__)
            if case == "not_synchronised":  # the other cases say something only if this one differs
                assert errors[worst] > 1e-3
                continue
            assert errors[worst] < 1e-6, f"{case}, {size} processes: {worst} differs by {errors[worst]:.1e}"
            losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
            torch.testing.assert_close(losses, alone["losses"], rtol=1e-6, atol=1e-9)


def error(given: Tensor, expected: Tensor) -> float:
    """Largest difference beside the largest value."""
    return float((given - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def test_processes_equal_one_with_all_their_images(results: Results) -> None:
    assert_equal_to_one_process(results)


@pytest.mark.slow
def test_every_method_equals_one_process(tmp_path: Path) -> None:
    assert_equal_to_one_process(run(tmp_path, "all"))


def test_the_gradients_are_reduced_once_per_update(results: Results) -> None:
    """And nothing else is sent: no norm, no negatives, unless they are asked for."""
    for rank in range(2):
        run = results[2][rank]["not_synchronised"]
        assert run["reduced"] == [run["flat"]] * 2  # two joint steps
        per_width = results[2][rank]["byol"]
        assert per_width["reduced"].count(per_width["flat"]) == 2 * 2  # steps, widths


def test_a_killed_worker_is_restarted_and_ends_bit_for_bit(results: Results) -> None:
    undisturbed, killed = results["undisturbed"], results["killed"]
    assert [killed[rank]["start"] for rank in range(2)] == [4, 4]  # died in step 6, saved after step 4
    assert [undisturbed[rank]["start"] for rank in range(2)] == [0, 0]
    for key, value in undisturbed[0]["weights"].items():
        assert torch.equal(value, killed[0]["weights"][key]) and torch.equal(value, killed[1]["weights"][key]), key


def test_widths_are_equal_and_random_numbers_each_process_own(results: Results) -> None:
    undisturbed, killed = results["undisturbed"], results["killed"]
    assert undisturbed[0]["widths"] == undisturbed[1]["widths"] and len(undisturbed[0]["widths"]) == 8
    assert len({tuple(widths) for widths in undisturbed[0]["widths"]}) == 8
    numbers = [undisturbed[rank]["numbers"] for rank in range(2)]
    assert len({*numbers[0], *numbers[1]}) == 16
    for rank in range(2):
        assert killed[rank]["widths"] == undisturbed[rank]["widths"][4:]
        assert killed[rank]["numbers"] == numbers[rank][4:]


def test_the_others_wait_long_for_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with launched("cpu") as world:
        assert world == World(1, 2)
    assert given["timeout"] >= timedelta(hours=1)
