"""The dispatcher: measured choices, their file, and the tuner that makes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from us3l_kernels import _native, backend, doctor, functional, views
from us3l_kernels import nn as sliced
from us3l_kernels.backends import BACKENDS, OPS, choose, measured
from us3l_kernels.backends.aten import AtenBackend
from us3l_kernels.backends.measured import Measurement, Table
from us3l_kernels.errors import SettingError
from us3l_kernels.packed import PackedWeights
from us3l_kernels.tune import LEAST_ROUNDS, REPLAYS, SETS, _measure, _times, measure, record, tune

CONVOLUTION = {"out_channels": 16, "groups": 1, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
needs_native = pytest.mark.skipif(_native.load() is None, reason=f"no native library: {_native.why}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of this test's own."""
    file = tmp_path / "folder" / "tune.json"
    monkeypatch.setenv("US3L_TUNE_CACHE", str(file))
    monkeypatch.setattr(measured, "_tables", {})
    yield file


def images(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 8, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def weight() -> Tensor:
    return torch.randn(16, 8, 3, 3)


def measurement(
    x: Tensor, forward: dict[str, float], training: dict[str, float] | None = None, w: Tensor | None = None
) -> Measurement:
    call = measured.describe("conv2d", x, weight() if w is None else w, CONVOLUTION)
    return Measurement(call, torch.get_num_threads(), forward, training)


def network() -> nn.Sequential:
    return nn.Sequential(
        sliced.SlicedConv2d(3, 16, 3, padding=1, bias=False),
        sliced.SlicedBatchNorm2d(16, activation="relu"),
        sliced.SlicedConv2d(16, 16, 3, padding=1, bias=False),
        sliced.SlicedBatchNorm2d(16, activation="relu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        sliced.SlicedLinear(16, 8),
    ).to(memory_format=torch.channels_last)


def test_the_fastest_is_chosen_by_what_is_needed() -> None:
    m = measurement(images(), {"native": 2.0, "aten": 1.0}, {"native": 3.0, "aten": 4.0})
    assert m.choice(gradients=False) == ("aten", "measured: native takes 2.00x as long")
    assert m.choice(gradients=True) == ("native", "measured: aten takes 1.33x as long")
    forward_only = measurement(images(), {"native": 2.0, "aten": 1.0})
    assert forward_only.choice(gradients=True) is None


def test_noise_does_not_change_the_order_of_auto() -> None:
    def chosen(**seconds: float) -> str:
        choice = measurement(images(), seconds).choice(gradients=False)
        assert choice is not None
        return choice.backend

    assert chosen(native=1.0, aten=0.98) == "native"
    assert chosen(native=1.0, aten=0.96) == "aten"
    assert chosen(native=1.0, aten=0.98, reference=0.96) == "reference"


@needs_native
def test_choose_follows_the_table(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, w = images(64), weight()
    heuristic = choose("conv2d", x, w, **CONVOLUTION)
    other = "aten" if heuristic == "native" else "native"
    fast, slow = {heuristic: 2.0, other: 1.0}, {heuristic: 3.0, other: 4.0}
    measured.save("cpu", [measurement(x, fast, slow)])
    with caplog.at_level(logging.DEBUG, logger="us3l_kernels"):
        assert choose("conv2d", x, w, **CONVOLUTION) == other
    assert f"conv2d: on {other}: measured: {heuristic} takes 2.00x as long" in caplog.text
    assert choose("conv2d", x.clone().requires_grad_(), w, **CONVOLUTION) == heuristic
    assert choose("conv2d", x, w.clone().requires_grad_(), **CONVOLUTION) == heuristic
    with torch.no_grad():
        assert choose("conv2d", x, w.requires_grad_(), **CONVOLUTION) == other
    with backend("reference"):
        assert choose("conv2d", x, w, **CONVOLUTION) == "reference"


@needs_native
@pytest.mark.parametrize(
    "x, w, change",
    [
        (images(63), weight(), {}),
        (images(64).contiguous(), weight(), {}),
        (images(64), weight().contiguous(memory_format=torch.channels_last), {}),
        (images(64), torch.randn(17, 8, 3, 3), {}),
        (images(64, torch.bfloat16), weight(), {}),
        (images(64), weight(), {"out_channels": 15}),
        (images(64), weight(), {"padding": [0, 1]}),
    ],
    ids=["batch", "layout", "layout of the weight", "full weight", "dtype", "slice", "geometry"],
)
def test_another_call_is_left_to_the_heuristics(cache: Path, x: Tensor, w: Tensor, change: dict[str, object]) -> None:
    arguments = {**CONVOLUTION, **change}
    expected = choose("conv2d", x, w, **arguments)
    measured.save("cpu", [measurement(images(64), {"native": 2.0, "aten": 3.0, "reference": 1.0})])
    assert choose("conv2d", images(64), weight(), **CONVOLUTION) == "reference"
    assert choose("conv2d", x, w, **arguments) == expected != "reference"


def test_threads_are_part_of_a_call(cache: Path) -> None:
    measured.save("cpu", [measurement(images(), {"aten": 2.0, "reference": 1.0})])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert choose("conv2d", images(), weight(), **CONVOLUTION) != "reference"
    finally:
        torch.set_num_threads(before)
    assert choose("conv2d", images(), weight(), **CONVOLUTION) == "reference"


def test_tune_measures_what_a_model_calls(cache: Path) -> None:
    model, x = network(), torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[str] = []
    with views(2):
        measurements = tune(model, x, widths=[1.0, 0.5], progress=seen.append)
        calls = record(model, x, widths=[1.0, 0.5])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Of two widths: the two different convolutions, one norm (of two equal ones), the linear layer.
    assert [call[0] for call, _ in calls].count("conv2d") == 4 and len(calls) == 8 == len(seen)
    assert "conv2d float32: x [4, 3, 6, 6], weight [16, 3, 3, 3], out_channels 16" in seen[0]
    norms = {dict(call[4])["views"] for call, _ in calls if call[0] == "batch_norm"}
    assert norms == {2}
    if _native.load() is not None:
        assert {m.call[0] for m in measurements} >= {"conv2d", "batch_norm"}
    for m in measurements:
        assert (m.call, m.threads) in calls and list(m.forward) == [n for n in BACKENDS if n in m.forward]
        assert m.training is not None and min(*m.forward.values(), *m.training.values()) > 0
    written = json.loads(cache.read_text(encoding="utf-8"))
    assert len(written["tables"]) == 1 and len(written["tables"][0]["calls"]) == len(measurements)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    reloaded = measured.load("cpu")
    assert reloaded.measurements == {(m.call, m.threads): m for m in measurements}
    assert reloaded.fingerprint() == measured.table("cpu").fingerprint()


def test_a_gpu_is_timed_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded is timed, and nothing is launched meanwhile."""
    launches: list[str] = []
    recorded: list[list[str]] = []
    replayed: list[str] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        before = len(launches)
        work()
        recorded.append(launches[before:])
        return partial(replayed.append, launches[-1])

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = _times({name: partial(launches.append, name) for name in "ab"}, 3, capture)
    assert times.keys() == set("ab") == set(replayed) and len(replayed) >= 2 * LEAST_ROUNDS
    assert [set(names) for names in recorded] == [{"a"}, {"b"}] and launches[-len(recorded[1]) :] == recorded[1]


def test_all_are_repeated_as_often_as_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a graph's own time, and not by that of the host that has recorded it: 10 us and a call of 2 us."""
    now = [0.0]
    launched: list[str] = []
    host, device = {"C++": 45e-6, "Python": 200e-6}, {"C++": 2e-6, "Python": 2e-6}

    def launch(name: str) -> None:
        now[0] += host[name]
        launched.append(name)

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        before = len(launched)
        work()
        names = launched[before:]

        def replay() -> None:
            now[0] += 10e-6 + sum(device[name] for name in names)

        return replay

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("us3l_kernels.tune.time.perf_counter", lambda: now[0])
    times = _times({name: partial(launch, name) for name in host}, 1, capture)
    assert times["C++"] == times["Python"]


def test_calls_are_measured_as_a_step_on_a_gpu_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights packed at once, their gradients added at once; x changes, and its gradient is computed and not kept."""
    monkeypatch.setitem(BACKENDS, "newcomer", Newcomer())
    monkeypatch.setattr("us3l_kernels.tune.MOST_ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    x, w = images(dtype=torch.bfloat16).requires_grad_(), nn.Parameter(weight())
    with torch.autocast("cpu", torch.bfloat16):
        (((call, threads), needed),) = record(lambda: functional.conv2d(x, w, padding=1)).items()
    assert call[2][0] == "torch.bfloat16" and call[3][0] == "torch.float32" and needed == (True, True)
    packs: list[int] = []
    additions: list[int] = []
    gradients: list[tuple[int, bool]] = []
    pack, flush, backward = PackedWeights._pack, PackedWeights._flush, AtenBackend.conv2d_backward
    monkeypatch.setattr(PackedWeights, "_pack", lambda self: packs.append(len(self._slices)) or pack(self))
    monkeypatch.setattr(PackedWeights, "_flush", lambda self: additions.append(len(self._gradients)) or flush(self))

    def seen(self: object, grad: Tensor, x: Tensor, w: Tensor, into: Tensor | None, *rest: object) -> object:
        gradients.append((x.data_ptr(), into is not None))
        return backward(self, grad, x, w, into, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AtenBackend, "conv2d_backward", seen)
    m = _measure(call, threads, *needed, capture=lambda work: work)
    assert m is not None and m.training is not None and m.training.keys() == m.forward.keys()
    assert set(packs) == {0, SETS} and set(additions) == {0, SETS}
    assert len({address for address, _ in gradients}) == SETS and all(into for _, into in gradients)


def test_what_was_measured_outlives_an_interruption(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is written on the way, and no further call is measured after the time that is given."""
    monkeypatch.setitem(BACKENDS, "newcomer", Newcomer())
    monkeypatch.setattr("us3l_kernels.tune.MOST_ROUNDS", 1)
    monkeypatch.setattr("us3l_kernels.tune.SAVED_EVERY", 2)
    w = torch.randn(3, 5)

    def model() -> None:
        for rows in range(2, 7):
            functional.linear(torch.randn(rows, 5), w)

    def interrupted(text: str) -> None:
        if text.startswith("4 of 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, progress=interrupted)
    assert len(measured.load("cpu").measurements) == 2
    assert tune(model, seconds=0) == []
    assert len(measured.load("cpu").measurements) == 2
    assert len(tune(model)) == 5 == len(measured.load("cpu").measurements)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(cache: Path) -> None:
    x = torch.randn(8, 64, 16, 16, device="cuda").bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True)
    (measurement,) = tune(lambda: functional.conv2d(x, weight, padding=1))
    assert measurement.training is not None and measurement.forward.keys() == measurement.training.keys()
    assert min(measurement.forward.values()) > 0


def test_the_first_layer_needs_no_gradient_of_x() -> None:
    model, x = network(), torch.randn(4, 3, 6, 6)
    assert list(record(model, x).values())[:2] == [(False, True), (True, True)]
    with torch.no_grad():
        assert set(record(model, x).values()) == {(False, False)}


class Newcomer(AtenBackend):
    """A backend that the dispatcher knows nothing of."""

    name = "newcomer"

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: object) -> str | None:
        return "it says so"


def test_a_new_backend_is_let_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "newcomer", Newcomer())
    x = torch.randn(4, 5)
    (m,) = tune(lambda: functional.linear(x, torch.randn(3, 5)))
    assert {"aten", "newcomer"} <= m.forward.keys() and m.training is None
    measured.save("cpu", [Measurement(m.call, m.threads, {"aten": 2.0, "newcomer": 1.0}, None)])
    assert choose("linear", x, torch.randn(3, 5), out_features=3, in_features=5) == "newcomer"


CALLS = {
    "conv2d": lambda x, v: functional.conv2d(x, torch.randn(9, 8, 3, 3), out_channels=7, stride=2, padding=1),
    "linear": lambda x, v: functional.linear(x.flatten(1), torch.randn(9, 300), out_features=5),
    "batch_norm": lambda x, v: functional.batch_norm(
        x, v, v, training=True, views=2, activation="relu6", residual=torch.randn_like(x)
    ),
    "batch_norm, running": lambda x, v: functional.batch_norm(x, None, None, v, v.abs(), training=False),
    "layer_norm": lambda x, v: functional.layer_norm(x.permute(0, 2, 3, 1), v, v),
    "layer_norm, plain": lambda x, v: functional.layer_norm(x.permute(0, 2, 3, 1), None, None),
    "autocast": lambda x, v: torch.autocast("cpu", torch.bfloat16)(functional.conv2d)(x, torch.randn(9, 8, 3, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_makes_the_recorded_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choice is asked for again, so that what is measured is what will be looked up."""
    monkeypatch.setitem(BACKENDS, "newcomer", Newcomer())  # so that there is a choice for all
    monkeypatch.setattr("us3l_kernels.tune.MOST_ROUNDS", 1)
    monkeypatch.setattr("us3l_kernels.tune.LEAST_SECONDS", 1e-6)
    x, vector = images(), torch.randn(8)
    x.requires_grad_()
    ((recorded, threads),) = calls = record(lambda: CALLS[name](x, vector))
    assert calls[recorded, threads] == (True, False)
    given, tensors = REPLAYS[recorded[0]], []

    def replayed(x: Tensor, w: Tensor | None, **arguments: object) -> object:
        tensors.append((x, w))
        run = given(x, w, **arguments)
        assert {(k, t) for (k, t) in record(run)} == {(recorded, threads)}
        return run

    monkeypatch.setitem(REPLAYS, recorded[0], replayed)
    m = measure(recorded, threads, True, False)
    assert m is not None and m.training is not None
    assert tensors[0][0].requires_grad and (tensors[0][1] is None or not tensors[0][1].requires_grad)


def test_every_operation_can_be_replayed() -> None:
    assert REPLAYS.keys() == set(OPS)


def test_nothing_to_tune_is_an_error(cache: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        tune(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="found none"), backend("aten"):
        tune(network(), torch.randn(2, 3, 6, 6))
    assert not cache.exists()


def test_symbolic_sizes_are_left_to_the_heuristics(cache: Path) -> None:
    w = weight()
    measured.save("cpu", [measurement(images(), {"aten": 2.0, "reference": 1.0}, w=w)])

    def backends_in(graph: torch.fx.GraphModule) -> list[object]:
        return [node.args[-1] for node in graph.graph.nodes if "us3l.conv2d" in str(node.target)]

    def convolution(x: Tensor, w: Tensor) -> Tensor:
        return functional.conv2d(x, w, padding=1)

    for mode, expected in (("fake", True), ("symbolic", False)):
        trace = torch.fx.experimental.proxy_tensor.make_fx(convolution, tracing_mode=mode)
        (name,) = backends_in(trace(images(), w))
        assert (name == "reference") == expected
    for dynamic, expected in ((False, True), (True, False)):
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _: object, graphs: list = graphs) -> torch.fx.GraphModule:  # type: ignore[type-arg]
            graphs.append(graph)
            return graph

        compiled = torch.compile(convolution, fullgraph=True, backend=keep, dynamic=dynamic)
        torch.testing.assert_close(compiled(x := images(), w), convolution(x, w), rtol=1e-4, atol=1e-4)
        (name,) = backends_in(graphs[0])
        assert (name == "reference") == expected
        torch._dynamo.reset()


GOOD = {"format": 2, "tables": []}
BROKEN = {
    "not JSON": "{",
    "not ours": "[1, 2]",
    "another format": json.dumps({**GOOD, "format": 1}),
    "no tables": json.dumps({"format": 2}),
    "no machine": json.dumps({"format": 2, "tables": [{"calls": []}]}),
    "binary": "\udcff",
}
ENTRIES = {
    "no call": {"threads": 1, "forward": {"aten": 1.0}, "training": None},
    "unknown backend": {"call": [], "threads": 1, "forward": {"cudnn": 1.0}, "training": None},
    "different backends": {"call": [], "threads": 1, "forward": {"aten": 1.0}, "training": {"native": 1.0}},
    "no times": {"call": [], "threads": 1, "forward": {}, "training": None},
    "words for times": {"call": [], "threads": 1, "forward": {"native": "a", "aten": "b"}, "training": None},
    "a list for times": {"call": [], "threads": 1, "forward": ["aten"], "training": None},
    "not a call": {"call": {}, "threads": 1, "forward": {"aten": 1.0}, "training": None},
}


@pytest.mark.parametrize("content", [*BROKEN, *ENTRIES])
def test_a_broken_file_is_one_line_in_the_log(cache: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    table = {"machine": measured.machine("cpu"), "calls": [ENTRIES.get(content)]}
    text = BROKEN.get(content) or json.dumps({"format": 2, "tables": [table]})
    cache.parent.mkdir()
    cache.write_bytes(text.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.INFO, logger="us3l_kernels"):
        for _ in range(2):
            functional.conv2d(images(), weight(), padding=1)
    (line,) = caplog.records
    assert str(cache) in line.getMessage() and "ignored" in line.getMessage() and "\n" not in line.getMessage()
    measured.save("cpu", [measurement(images(), {"aten": 2.0, "reference": 1.0})])  # and it can be replaced
    assert len(measured.load("cpu").measurements) == 1


def test_tables_of_other_machines_are_kept_and_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = measured.machine("cpu")
    monkeypatch.setattr(measured, "machine", lambda device: here | {"torch": "1.0"})
    measured.save("cpu", [measurement(images(), {"aten": 2.0, "reference": 1.0})])
    monkeypatch.setattr(measured, "machine", lambda device: here)
    monkeypatch.setattr(measured, "_tables", {})
    with caplog.at_level(logging.INFO, logger="us3l_kernels"):
        assert choose("conv2d", images(), weight(), **CONVOLUTION) != "reference"
    assert [r.getMessage() for r in caplog.records if "this machine" in r.getMessage()]
    measured.save("cpu", [measurement(images(), {"aten": 1.0, "reference": 2.0})])
    assert len(json.loads(cache.read_text(encoding="utf-8"))["tables"]) == 2
    assert choose("conv2d", images(), weight(), **CONVOLUTION) == "aten"


def test_later_measurements_replace_earlier_ones_of_the_same_call(cache: Path) -> None:
    measured.save("cpu", [measurement(images(2), {"aten": 1.0}), measurement(images(3), {"aten": 2.0})])
    measured.save("cpu", [measurement(images(3), {"aten": 4.0}), measurement(images(4), {"aten": 3.0})])
    assert [m.forward["aten"] for m in measured.load("cpu").measurements.values()] == [1.0, 4.0, 3.0]


def test_a_failed_write_leaves_the_file_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.save("cpu", [measurement(images(), {"aten": 1.0})])
    before = cache.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(measured.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        measured.save("cpu", [measurement(images(3), {"aten": 1.0})])
    assert cache.read_bytes() == before and list(cache.parent.iterdir()) == [cache]


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert measured.path() is None  # the tests' own setting: no table
    with pytest.raises(SettingError, match="US3L_TUNE_CACHE: expected a file"):
        measured.save("cpu", [])
    monkeypatch.delenv("US3L_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.path() == tmp_path / "us3l" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measured.path() == Path.home() / ".cache" / "us3l" / "tune.json"


def test_doctor_says_which_table_is_in_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> doctor.Finding:
        return next(f for f in doctor.report() if f.subject == "tuned choices")

    assert not finding().ok and f"{cache} is not there" in finding().detail
    measured.save("cpu", [measurement(images(), {"aten": 1.0})])
    assert finding() == doctor.Finding("tuned choices", True, f"1 calls (cpu) in {cache}")
    monkeypatch.setattr(measured, "_tables", {"cpu": Table([])})
    assert not finding().ok and "none for this machine" in finding().detail
    monkeypatch.setenv("US3L_TUNE_CACHE", "")
    assert not finding().ok and "US3L_TUNE_CACHE is empty" in finding().detail
