"""The stopwatch, the order of rounds, and Triton's cache."""

import gc
import itertools
import os
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_examples import CPU, peer, race, right, shape
from torch import Tensor

from attnkit.lab.bench import machine, timing
from attnkit.lab.bench.heat import Course, spread
from attnkit.lab.bench.races import RACES
from attnkit.lab.bench.timing import Calls, Entrant, elapsed, interleave


def test_elapsed_is_seconds_a_call() -> None:
    assert 0.01 <= elapsed(CPU, lambda: time.sleep(0.01), 5) < 0.03


def test_a_measurement_is_filled_with_calls_and_divided_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MEASURED_S", 0.05)
    count = 0

    def operator(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        time.sleep(0.002)
        return x

    entrant = Entrant.ready("a", CPU, Calls(operator, [{"x": torch.ones(1)}] * 4), graph=True)
    count = 0
    assert 0.002 <= entrant.measure() < 0.006
    assert count == entrant.repeats * entrant.lot
    assert 0.01 < 0.002 * count < 0.09


def test_a_call_with_leaves_runs_backward() -> None:
    x = torch.ones(3, requires_grad=True)
    grads: list[Tensor] = []
    x.register_hook(grads.append)
    Calls(lambda x: (2 * x, None), [{"x": x}], [x], torch.full((3,), 5.0)).all()
    assert [grad.tolist() for grad in grads] == [[10.0] * 3]


def test_the_peak_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MEASURED_S", 0.05)
    entrant = Entrant.ready("a", CPU, Calls(lambda x: x + 1, [{"x": torch.ones(2**22)}]), graph=False)
    assert entrant.peak_mib is None or 8 < entrant.peak_mib < 40  # the output has 16 MiB


def test_everybody_follows_everybody_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure(self: Entrant) -> float:
        order.append(self.name)
        return float(len(order))

    monkeypatch.setattr(Entrant, "measure", measure)
    entrants = [Entrant(name, CPU, lambda: None, 1, 1, None, Calls(len, [])) for name in "abc"]
    interleave(entrants, rounds=3)
    assert "".join(order) == "acbbcabaccab"
    assert entrants[0].times == [6.0, 8.0, 11.0]
    for count in (2, 3, 4, 5, 8):
        orders = [timing._order(count, turn) for turn in range(2 * count)]
        assert all(sorted(once) == list(range(count)) for once in orders)
        after = Counter(pair for once in orders for pair in itertools.pairwise(once))
        assert set(after.values()) == {2}
        assert len(after) == count * (count - 1)
        assert set(Counter(once[0] for once in orders).values()) == {2}


@pytest.mark.parametrize(("device", "rested", "uncounted"), [("cuda", True, 3), ("cuda", False, 1), ("cpu", True, 1)])
def test_a_gpu_is_warm_before_anything_counts(
    device: str, rested: bool, uncounted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def measure(self: Entrant) -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(Entrant, "measure", measure)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    entrants = [Entrant(name, torch.device(device), lambda: None, 1, 1, None, Calls(len, [])) for name in "ab"]
    interleave(entrants, rounds=2, rested=rested)
    assert sorted(entrants[0].times + entrants[1].times) == [2 * uncounted + turn for turn in (1.0, 2.0, 3.0, 4.0)]


def test_spread_is_the_relative_interquartile_range() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([2.0, 2.0, 2.0]) == 0


def test_decoding_walks_over_inputs_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 10**6)
    seen: set[int] = set()

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if k.shape[1] == 600:
            seen.add(k.data_ptr())
        return right(q, k, v, causal)

    course = Course(race(), "auto", [peer("a", attend)], rounds=3, seed=0, cold=True, copy_gb_s=1.0)
    assert len(course.run(shape("decode", 600)).rows) == 1
    kv_bytes = 2 * 600 * 2 * 16 * 4
    assert 3e6 <= len(seen) * kv_bytes < 3e6 + 2 * kv_bytes


def test_without_a_graph_plain_calls_are_timed_and_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, device: torch.device) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "Stream", Broken)
    calls = Calls(lambda x: x, [{"x": torch.ones(1)}])
    run, note = timing._captured(torch.device("cuda"), calls)
    assert run == calls.all
    assert note == "plain calls, no CUDA graph (RuntimeError: operation not permitted when stream is capturing)"


def test_notes_reach_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Entrant.ready

    def noted(name: str, *args: Any, **options: Any) -> Entrant:
        entrant = ready(name, *args, **options)
        entrant.note = f"{name}: plain calls"
        return entrant

    monkeypatch.setattr(Entrant, "ready", noted)
    course = Course(race(), "auto", [peer("a", right)], rounds=3, seed=0, cold=True, copy_gb_s=1.0)
    assert course.run(shape("decode")).rows[0]["note"] == "attnkit: plain calls; a: plain calls"


@pytest.mark.parametrize("before", ["some/folder", None])
def test_the_cache_is_an_empty_folder_during_the_race(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    with machine.cold_kernels():
        folder = Path(os.environ["TRITON_CACHE_DIR"])
        assert list(folder.iterdir()) == []
        (folder / "kernel").touch()
    assert not folder.exists()
    assert os.environ.get("TRITON_CACHE_DIR") == before


def test_kernels_are_cold_until_one_of_ours_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("attnkit.") and "._triton" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    with machine.cold_kernels() as cold:
        assert cold
    monkeypatch.setitem(sys.modules, "attnkit.ops.x._triton.forward", ModuleType("forward"))
    with machine.cold_kernels() as cold:
        assert not cold
    monkeypatch.delitem(sys.modules, "triton")
    with machine.cold_kernels() as cold:
        assert cold


@pytest.mark.parametrize("cold", [True, False])
def test_the_first_call_is_not_reported_for_warm_kernels(cold: bool) -> None:
    course = Course(RACES["attention"], "torch", [peer("a", right)], rounds=3, seed=0, cold=cold, copy_gb_s=1.0)
    first_s = course.run(shape()).rows[0]["first_call_s"]
    assert first_s > 0 if cold else first_s is None


@pytest.mark.gpu
def test_what_a_captured_graph_reads_stays_where_it_is() -> None:
    read = torch.ones(1 << 20, device="cuda")
    watched = weakref.ref(read)

    def operator(q: Tensor, read: Tensor = read) -> Tensor:
        return q + read

    calls = Calls(operator, [{"q": torch.zeros(1 << 20, device="cuda")}])
    entrant = Entrant.ready("reader", torch.device("cuda", 0), calls, graph=True)
    del read, operator, calls
    gc.collect()
    assert watched() is not None
    assert entrant.note == "", "it was not captured"
