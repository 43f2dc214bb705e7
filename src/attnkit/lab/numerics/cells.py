"""The cells of conformance, in this process or shared out among several."""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from attnkit._core.errors import CheckFailed, OptionError
from attnkit.lab.numerics.verdicts import Row
from attnkit.lab.pool import Lost, Pool, cores, workers_for
from attnkit.ops import OPS

__all__ = ["Cell", "auto_jobs", "judge_cells"]

_WORTH_A_PROCESS = 16  # cells; one that imports torch and opens a GPU for less gains nothing

Judge = Callable[["Cell"], list[Row]]


@dataclass(frozen=True)
class Cell:
    """One case of an operator in one dtype, by their names."""

    op: str
    case: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, {self.case!r}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def kin(self) -> tuple[str, torch.dtype]:
        """Equal for cells that are likely to compile the same variants of kernels: operators of one file."""
        return OPS[self.op].function.__module__, self.dtype


def auto_jobs(cells: int, place: torch.device) -> int:
    """As many processes as there are cores and room on the device for, and cells enough."""
    return max(1, min(workers_for(place), cells // _WORTH_A_PROCESS))


def judge_cells(cells: Sequence[Cell], judge: Judge, jobs: int) -> Iterator[tuple[Cell, list[Row]]]:
    """Judge every cell; each as it is done, in their order where there is one job.

    Args:
        judge: a function of a module, or a `partial` of one: other processes import it.
        jobs: processes, each with its share of torch's threads; one is this process.
    Raises:
        OptionError: less than one job.
        CheckFailed: a process died; the message names the cell.
        whatever `judge` raises, with a note that names the cell.
    """
    if jobs < 1:
        raise OptionError(f"jobs={jobs} must be at least 1")
    if jobs == 1:
        yield from ((cell, _named(judge, cell)) for cell in cells)
        return
    # shares of most cells first, so that none of them is begun when the others are over; what a cell costs is not known
    shares: dict[object, list[Cell]] = {}
    for cell in cells:
        shares.setdefault(cell.kin, []).append(cell)
    ordered = [cell for share in sorted(shares.values(), key=len, reverse=True) for cell in share]
    threads = max(1, min(torch.get_num_threads(), cores() // jobs))
    with Pool.open(partial(_caught, judge, threads), jobs, alone="one job") as pool:
        for index, result in pool.finished(ordered, [cell.kin for cell in ordered]):
            if isinstance(result, Lost):
                raise CheckFailed(f"{ordered[index]}: {result.reason}; one job (--jobs 1) shows what it says before")
            if isinstance(result, Exception):
                raise result
            yield ordered[index], result


def _named(judge: Judge, cell: Cell) -> list[Row]:
    try:
        return judge(cell)
    except Exception as error:
        error.add_note(f"while judging {cell}")
        raise


def _caught(judge: Judge, threads: int, cell: Cell) -> list[Row] | Exception:
    """What a worker makes of a cell; an exception goes to the process that asked, with the traceback as a note."""
    torch.set_num_threads(threads)
    try:
        return _named(judge, cell)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # one whose arguments are not those of its constructor
            return RuntimeError(f"{type(error).__name__}: {error}; {cell}\n{traceback.format_exc()}")
        return error
