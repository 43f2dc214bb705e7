"""Attempts in processes of their own: one that dies, hangs or loses its device costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pool_examples import NoStart, SlowStart, attempt, pid, pid_in_a_while

from attnkit._core.errors import BackendUnavailable
from attnkit.lab.pool import Lost, Pool


def test_every_attempt_gets_its_own_answer_whatever_happens_to_its_process() -> None:
    with Pool.open(attempt, 2, limit_s=1.0) as pool:
        reasons = pool.run(["", "does not fit", "die", "hang", "break", "", "too large"])
        processes = [worker.process for worker in pool._workers]
    assert reasons == [
        "",
        "does not fit",
        Lost("its process died (exit code 7)"),
        Lost("not done after 1 s"),
        Lost("the device is gone"),
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
        assert pool.run(["", "break", "x"]) == ["", Lost("the device is gone"), "x"]


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


def test_what_is_kin_stays_in_one_process_until_others_have_nothing_to_do() -> None:
    kin = ["a", "b"] * 4 + ["a"] * 8
    with Pool.open(pid_in_a_while, 2) as pool:
        order, where = zip(*pool.finished(range(16), kin), strict=True)
    of = dict(zip(order, where, strict=True))
    first, second = of[0], of[1]
    assert first != second
    assert {of[index] for index in range(1, 8, 2)} == {second}
    assert {of[index] for index in range(0, 8, 2)} == {first}
    assert second in {of[index] for index in range(8, 16)}, "the other helps with what is left"
    assert of[15] == second, "from its end"
    assert sorted(order) == list(range(16))
    assert order != tuple(range(16))


def test_ctrl_c_ends_the_processes_and_is_for_the_one_that_asked_only() -> None:
    """As a terminal sends it: to all of them at once, while workers import and while they work."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pool_examples; pool_examples.interrupted()"
    )
    for moment in ("starting", "working"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, moment],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        told, *worker = process.stdout.readline().split()
        assert told == moment
        for pid_of_worker in worker:
            os.kill(int(pid_of_worker), signal.SIGINT)
            time.sleep(1.0)  # in which it would die and be missed
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "interrupted, 0 left\n", "")
