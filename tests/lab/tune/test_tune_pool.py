"""Attempts in processes of their own: one that dies, hangs or loses its device costs itself and nothing else."""

import os
from collections.abc import Callable

import pytest
from tune_examples import NoStart, SlowStart, attempt, pid

from attnkit._core.errors import BackendUnavailable
from attnkit.lab.tune.pool import Pool


def test_every_attempt_gets_its_own_answer_whatever_happens_to_its_process() -> None:
    with Pool.open(attempt, 2, limit_s=1.0) as pool:
        reasons = pool.run(["", "does not fit", "die", "hang", "break", "", "too large"])
        processes = [worker.process for worker in pool._workers]
    assert reasons == [
        "",
        "does not fit",
        "its process died (exit code 7)",
        "not done after 1 s",
        "the device is gone",
        "",
        "too large",
    ]
    assert processes
    assert not any(process.is_alive() for process in processes)


def test_processes_are_kept_from_one_call_to_the_next() -> None:
    with Pool.open(pid, 1, limit_s=30.0) as pool:
        first, second = pool.run(["a"]), pool.run(["b", "c"])
    assert len({*first, *second}) == 1
    assert first != [str(os.getpid())]


def test_without_workers_attempts_are_made_here() -> None:
    with Pool.open(pid, 0, limit_s=1.0) as pool:
        assert pool.run(["a"]) == [str(os.getpid())]
    with Pool.open(attempt, 0, limit_s=1.0) as pool:
        assert pool.run(["", "break", "x"]) == ["", "the device is gone", "x"]


def test_processes_that_do_not_start_are_no_result() -> None:
    unloadable: Callable[[str], str] = NoStart()
    with (
        pytest.raises(BackendUnavailable, match=r"does not start: its process died \(exit code 1\); .*workers=0"),
        Pool.open(unloadable, 2, limit_s=30.0) as pool,
    ):
        pool.run(["a"] * 3)


def test_starting_a_process_does_not_count_against_its_attempts() -> None:
    with Pool.open(SlowStart(), 1, limit_s=0.8) as pool:
        assert pool.run(["done"]) == ["done"]
