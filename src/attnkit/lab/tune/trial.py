"""One kernel with one configuration: does it compile and run?"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from attnkit._core.triton.configs import Config
from attnkit._core.triton.probe import Probe
from attnkit.lab.bench.timing import reason
from attnkit.lab.tune.tunables import TUNABLES

__all__ = ["Problem", "Trial", "attempt", "dtype_name", "probe"]


@dataclass(frozen=True)
class Problem:
    """What is tuned at a time: one kernel of an operator for one dtype and padded head width on one device."""

    op: str
    kernel: str
    dtype: torch.dtype
    width: int
    device: torch.device

    @property
    def key(self) -> tuple[str, int, int]:
        """Its place in a table of configurations."""
        return self.kernel, self.dtype.itemsize * 8, self.width

    def __str__(self) -> str:
        return f"{self.kernel}, {dtype_name(self.dtype)}, width {self.width}"


@dataclass(frozen=True)
class Trial:
    """A configuration on trial."""

    problem: Problem
    config: Config


def dtype_name(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=1)  # many trials in a row are about one problem
def probe(problem: Problem) -> Probe:
    """The kernel on inputs of its own."""
    return TUNABLES[problem.op]().probe(problem.kernel, problem.dtype, problem.width, problem.device)


def attempt(trial: Trial) -> str:
    """Run once, so that Triton's cache holds the compiled kernel; why that failed, "" where it did not.

    Raises:
        SystemExit: with the reason, where it failed in a way that leaves this process without its device.
    """
    device = trial.problem.device
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        probe(trial.problem).run(trial.config)
        _finish(device)
    except Exception as error:  # compilers and drivers raise what they like
        why = reason(error)
        try:
            _finish(device)
        except Exception:
            raise SystemExit(why) from error
        return why
    return ""


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
