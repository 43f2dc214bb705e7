"""Attempts in processes of their own: one that dies, hangs or loses its device costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pool_examples import NoStart, SlowStart, attempt, pid

from attnkit._core.errors import BackendUnavailable
from attnkit.lab.pool import Lost, Pool, _Worker


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
    pool = Pool(pid, 2)
    first, second = pool._workers = [_Worker(None, None, 0.0) for _ in range(2)]  # type: ignore[arg-type]
    todo = {"a": deque(range(6)), "b": deque([10, 11])}

    def take(worker: _Worker) -> int:
        worker.task = pool._choose(worker, todo)
        return worker.task

    assert [take(first), take(second), take(first), take(second)] == [0, 10, 1, 11]
    assert [take(second), take(first), take(second)] == [5, 2, 3], "it begins to help at the end"
    assert [take(first)] == [4]
    assert not any(todo.values())


def test_tasks_that_are_kin_are_all_done_whoever_does_them() -> None:
    tasks = [str(number) for number in range(9)]
    with Pool.open(attempt, 2) as pool:
        assert pool.run(tasks, ["a", "b", "a", "a", "c", "a", "b", "a", "a"]) == tasks


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
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
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
