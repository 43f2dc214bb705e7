"""Conformance in several processes: the same rows in the same order, and what happens when one of them fails."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from attnkit._core.errors import CheckFailed, OptionError, ShapeError
from attnkit.lab.numerics import cells, conformance
from attnkit.lab.numerics.cells import Cell, auto_jobs, judge_cells
from attnkit.lab.numerics.verdicts import Row

NAMES = ("merge_partials", "mlstm_step", "scalar_decay_step")
DTYPES = (torch.float32, torch.bfloat16)


def judge(cell: Cell, *, bad: str, how: str) -> list[Row]:
    """A row that says where it was made; one cell goes wrong."""
    row = Row(cell.op, cell.case, str(cell.dtype), "none", str(os.getpid()), 0.0, float(torch.get_num_threads()), 0.0, True)
    if cell.case == bad and how == "die":
        os._exit(9)
    if cell.case == bad and how == "wrong shape":
        raise ShapeError("q has shape (1,)")
    if cell.case == bad and how == "odd":
        raise Odd(1, 2)
    return [row]


class Odd(Exception):
    """One that cannot be pickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd one")


def some(count: int) -> list[Cell]:
    return [Cell(name, f"case {i}", torch.float32) for name in ("entmax", "merge_partials") for i in range(count)]


def test_rows_are_those_of_one_process(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    alone = conformance.run(NAMES, dtypes=DTYPES)
    seen: list[Row] = []
    together = conformance.run(NAMES, dtypes=DTYPES, jobs=2, on_row=seen.append)
    assert together == alone
    assert len(seen) == len(alone)
    assert set(seen) == set(alone)
    places = [(row.op, row.case, row.dtype) for row in seen]
    begun = [place for place, before in zip(places, [None, *places], strict=False) if place != before]
    assert len(begun) == len(set(begun)) == conformance.plan(NAMES, dtypes=DTYPES), "a cell's rows come behind each other"


def test_every_process_has_its_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for cores, expected in ((6, 3.0), (1, 1.0)):
        monkeypatch.setattr(cells, "cores", lambda cores=cores: cores)
        rows = [row for _, judged in judge_cells(some(4), partial(judge, bad="", how=""), 2) for row in judged]
        assert {row.budget for row in rows} == {expected}
        assert len({row.quantity for row in rows}) == 2
        assert str(os.getpid()) not in {row.quantity for row in rows}


def test_one_job_is_this_process_and_keeps_its_threads() -> None:
    found = list(judge_cells(some(2), partial(judge, bad="", how=""), 1))
    assert [cell for cell, _ in found] == some(2)
    assert {(row.quantity, row.budget) for _, rows in found for row in rows} == {(str(os.getpid()), torch.get_num_threads())}


@pytest.mark.parametrize(
    ("how", "error", "message", "note"),
    [
        ("die", CheckFailed, r"entmax, 'case 1', float32: its process died \(exit code 9\); one job \(--jobs 1\)", ""),
        ("wrong shape", ShapeError, r"^q has shape \(1,\)", "while judging entmax, 'case 1', float32"),
        ("odd", RuntimeError, r"^Odd: odd one; entmax, 'case 1', float32", ""),
    ],
)
def test_what_goes_wrong_names_the_cell(how: str, error: type[Exception], message: str, note: str) -> None:
    with pytest.raises(error, match=message) as caught:
        list(judge_cells(some(3)[:3], partial(judge, bad="case 1", how=how), 2))
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert note in notes
    assert ("in judge\n" in f"{notes}{caught.value}") == (how != "die"), "the traceback of the worker"


def test_one_job_names_the_cell_too() -> None:
    with pytest.raises(ShapeError) as caught:
        list(judge_cells(some(3), partial(judge, bad="case 1", how="wrong shape"), 1))
    assert caught.value.__notes__ == ["while judging entmax, 'case 1', float32"]


def test_operators_of_one_file_are_kin() -> None:
    kin = {name: Cell(name, "", torch.float32).kin for name in ("attention", "query_sparse_attention", "mlstm", "mlstm_step")}
    assert kin["attention"] == kin["query_sparse_attention"] != kin["mlstm"] == kin["mlstm_step"]
    assert dataclasses.replace(Cell("mlstm", "", torch.float32), dtype=torch.bfloat16).kin != kin["mlstm"]


def test_how_many_processes_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = torch.device("cpu")
    monkeypatch.setattr(cells, "workers_for", lambda place: 8)
    assert [auto_jobs(count, place) for count in (0, 1, 31, 32, 128, 1000)] == [1, 1, 1, 2, 8, 8]
    with pytest.raises(OptionError, match="jobs=0 must be at least 1"):
        conformance.run(["merge_partials"], jobs=0)
