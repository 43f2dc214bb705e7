"""Tuning from end to end, in Triton's interpreter, and what is kept of it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit._core.errors import DeviceUnavailable, DTypeError, OptionError
from attnkit._core.events import Event
from attnkit._core.triton import interpreted
from attnkit._core.triton.configs import Config
from attnkit.lab import tune
from attnkit.lab.tune import runner, trial
from attnkit.lab.tune.search import Timed

pytest.importorskip("triton")
on_the_cpu = pytest.mark.skipif(not interpreted(), reason="only the interpreter runs kernels on the CPU")

BRIEF: dict[str, Any] = {"device": "cpu", "dims": [16], "workers": 0, "rounds": 3}
FAST, FASTER = Config(16, 16, 1, 1), Config(16, 16, 2, 1)
ENTRY = {"bits": 32, "width": 16}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's table of a machine on which only two configurations are worth a try."""
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    tunable = dataclasses.replace(tune.TUNABLES["attention"](), candidates=lambda *key: (FAST, FASTER))
    monkeypatch.setitem(tune.TUNABLES._values, "attention", lambda: tunable)
    return tmp_path / "tuned" / "attention-cpu.json"


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Config, float]:
    """Seconds a call, filled by the test; nothing is timed. A configuration that is missing counts as the present one."""
    seconds: dict[Config, float] = {}

    def race(probe: Any, device: Any, present: Config, configs: Sequence[Config], rounds: int) -> Any:
        final = [Timed(config, [seconds.get(config, 1.0)] * rounds) for config in configs]
        return sorted(final, key=lambda timed: timed.ms), [], ()

    monkeypatch.setattr(runner, "race", race)
    return seconds


def kept(path: Path) -> dict[str, Config]:
    rows = json.loads(path.read_text())["rows"]
    assert all(row.items() >= ENTRY.items() for row in rows)
    return {row["kernel"]: Config(*(row[name.name] for name in dataclasses.fields(Config))) for row in rows}


@on_the_cpu
def test_all_of_it_in_a_worker_process(cache: Path) -> None:
    events: list[Event] = []
    document = tune.run(**BRIEF | {"workers": 1}, kernels=["bwd_dq"], on_event=events.append)
    (row,) = document["rows"]
    assert (row["kernel"], row["dtype"], row["bits"], row["width"], row["tried"]) == ("bwd_dq", "float32", 32, 16, 3)
    assert row["dropped"] == []
    assert row["best_ms"] <= row["present_ms"] or row["best"] == row["present"]
    assert document["schema"] == "attnkit.tune/1"
    assert document["path"] == str(cache)
    assert cache.exists() == document["wrote"] == (row["best"] != row["present"])
    assert [(event.kind, event.done, event.total) for event in events] == [("plan", 0, 1), ("phase", 0, 1), ("step", 1, 1)]


@on_the_cpu
def test_the_fastest_is_kept_for_each_kernel(cache: Path, times: dict[Config, float]) -> None:
    times.update({FAST: 0.5, FASTER: 0.4})
    document = tune.run(**BRIEF)
    kernels = ["fwd", "decode", "bwd_dq", "bwd_dkdv", "gather_fwd", "gather_dq", "gather_dkdv"]
    assert [row["kernel"] for row in document["rows"]] == kernels
    assert kept(cache) == dict.fromkeys(kernels, FASTER)
    row = document["rows"][0]
    assert (row["present_ms"], row["best_ms"], row["gain"], row["spread"]) == (1000.0, pytest.approx(400), 1.5, 0.0)
    assert row["best"] == dataclasses.asdict(FASTER)
    assert document["wrote"]


@on_the_cpu
def test_nothing_is_kept_of_a_dry_run_or_where_nobody_wins(cache: Path, times: dict[Config, float]) -> None:
    times.update({FAST: 1.0, FASTER: 1.2})
    document = tune.run(**BRIEF, kernels=["fwd"])
    assert document["rows"][0]["best"] == document["rows"][0]["present"]
    assert document["rows"][0]["gain"] == 0.0
    times[FAST] = 0.5
    again = tune.run(**BRIEF, kernels=["fwd"], store=False)
    assert again["rows"][0]["best"] == dataclasses.asdict(FAST)
    assert not document["wrote"]
    assert not again["wrote"]
    assert not cache.parent.exists()


@on_the_cpu
def test_a_winner_with_other_outputs_is_refused(
    cache: Path, times: dict[Config, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    times.update({FAST: 0.5, FASTER: 0.4})
    tunable = tune.TUNABLES["attention"]()

    def wrong(*problem: Any) -> Any:
        probe = tunable.probe(*problem)
        return dataclasses.replace(probe, run=lambda c: tuple(t + (c == FASTER) * 1e-3 for t in probe.run(c)))

    monkeypatch.setitem(tune.TUNABLES._values, "attention", lambda: dataclasses.replace(tunable, probe=wrong))
    (row,) = tune.run(**BRIEF, kernels=["bwd_dkdv"])["rows"]
    assert row["best"] == dataclasses.asdict(FAST)
    (out,) = row["dropped"]
    assert out["config"] == dataclasses.asdict(FASTER)
    assert "error of d_k is 1.0e-03, allowed " in out["reason"]
    assert kept(cache) == {"bwd_dkdv": FAST}


@on_the_cpu
def test_an_interrupted_run_keeps_what_is_finished(cache: Path, times: dict[Config, float]) -> None:
    times[FAST] = 0.5

    def interrupt(event: Event) -> None:
        if event.kind == "phase" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.run(**BRIEF, on_event=interrupt)
    assert kept(cache) == {"fwd": FAST, "decode": FAST}
    assert trial.probe.cache_info().currsize == 0, "tensors are still held"


@on_the_cpu
def test_configurations_that_fail_are_dropped_with_the_reason(
    cache: Path, times: dict[Config, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    times.update({FAST: 0.5, FASTER: 0.4})
    failing = {FASTER}

    def attempt(task: trial.Trial) -> str:
        return "OutOfResources: shared memory" if task.config in failing else ""

    monkeypatch.setattr(runner, "attempt", attempt)
    (row,) = tune.run(**BRIEF, kernels=["fwd"])["rows"]
    assert row["best"] == dataclasses.asdict(FAST)
    assert row["dropped"] == [{"config": dataclasses.asdict(FASTER), "reason": "OutOfResources: shared memory"}]

    present = Config(**row["present"])
    failing.add(present)
    (row,) = tune.run(**BRIEF, kernels=["fwd"], store=False)["rows"]
    assert (row["present_ms"], row["gain"], row["best"]) == (None, None, dataclasses.asdict(FAST))

    failing.add(FAST)
    (row,) = tune.run(**BRIEF, kernels=["fwd"])["rows"]
    assert (row["best"], row["best_ms"], len(row["dropped"])) == (row["present"], None, 3)


@on_the_cpu
def test_an_attempt_says_why_it_failed() -> None:
    problem = trial.Problem("attention", "decode", torch.float32, 16, torch.device("cpu"))
    assert trial.attempt(trial.Trial(problem, FAST)) == ""
    unknown = dataclasses.replace(problem, kernel="none")
    assert trial.attempt(trial.Trial(unknown, FAST)).startswith("OptionError: unknown kernel 'none'")


@on_the_cpu
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernels": ["fwd", "bwd"]}, OptionError, "kernel 'bwd' is not tuned; choose from fwd, decode, bwd_dq, bwd_dkdv"),
        ({"dims": [48]}, OptionError, "padded head width 48 is not tuned; choose from 16, 32, 64, 128, 256"),
        ({"dtypes": [torch.float64]}, OptionError, "bits of the dtype 64 is not tuned; choose from 16, 32"),
        ({"dtypes": [torch.float32] * 2}, OptionError, "dtypes of one size share their entries"),
        ({"dtypes": [torch.bfloat16]}, DTypeError, "interpreter computes 16 bits wrongly"),
        ({"rounds": 2}, OptionError, "rounds must be at least 3"),
        ({"workers": -1}, OptionError, "workers at least 0"),
        ({"op": "attentoin"}, OptionError, "unknown tunable operator 'attentoin'; did you mean 'attention'"),
        ({"device": "meta"}, DeviceUnavailable, "device meta: tuning measures kernels on a GPU"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str, cache: Path) -> None:
    with pytest.raises(error, match=message):
        tune.run(**BRIEF | arguments)


def test_a_cpu_without_the_interpreter_has_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DeviceUnavailable, match="there is none here"):
        tune.run(device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="there is none here"):
            tune.run()


def test_a_gpu_gets_its_index_since_tables_are_kept_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [runner._place(name) for name in ("cuda", "cuda:0")] == [torch.device("cuda", 1), torch.device("cuda", 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(DeviceUnavailable, match=r"GPU X: the kernels need compute capability 8\.0"):
        tune.run()


@pytest.mark.gpu
def test_all_of_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    impossible = Config(256, 128, 8, 4)  # 576 KiB of shared memory
    tunable = dataclasses.replace(tune.TUNABLES["attention"](), candidates=lambda *key: (Config(64, 32, 4, 2), impossible))
    monkeypatch.setitem(tune.TUNABLES._values, "attention", lambda: tunable)
    for kernel in ("fwd", "bwd_dkdv"):
        (row,) = tune.run(kernels=[kernel], dims=[256], workers=2, rounds=3)["rows"]
        assert row["present_ms"] > 0
        assert row["best_ms"] <= row["present_ms"] or row["best"] == row["present"]
        assert dataclasses.asdict(impossible) in [out["config"] for out in row["dropped"]]
        assert "esource" in row["dropped"][0]["reason"]
