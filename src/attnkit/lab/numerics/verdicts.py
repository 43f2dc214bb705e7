"""The verdicts of conformance: results beside the oracle's and the plain form's -> rows, each with its error and budget."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnkit._core.opspec import Case, OpSpec
from attnkit.lab.numerics.formats import BF16, FP16, FP32, FP64, ulp

__all__ = ["Row", "Subject", "judge", "judge_bias", "judge_by_row", "judge_exact"]

_FORMATS = {torch.float64: FP64, torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}


@dataclass(frozen=True)
class Row:
    """One judged quantity.

    Attributes:
        quantity: an output's name, "d_" and an input's name for a gradient, "ulp_row" for the first output in units of its
            row scale, "bias" for the bias gate, "OUTPUT, CHANGE" for an invariance.
        error: maximum error against the float64 oracle ("ulp_row": in units in the last place of the row scale; "bias": mean
            signed error in units in the last place; exact invariances: against the result without the change).
        budget: what is allowed.
        naive_error: the same for the plain form of the same precision; 0 where results must agree bit for bit.
        note: what went wrong, where it can be said better than with two numbers.
    """

    op: str
    case: str
    dtype: str
    backend: str
    quantity: str
    error: float
    budget: float
    naive_error: float
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """What is judged: one operator on one case in one dtype on one backend."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str

    def row(
        self, quantity: str, error: float, budget: float, naive_error: float, ok: bool | None = None, note: str = ""
    ) -> Row:
        """A row that passes where the error is within the budget, unless `ok` says otherwise."""
        ok = error <= budget if ok is None else ok  # a NaN is not
        name = str(self.dtype).removeprefix("torch.")
        return Row(self.spec.name, self.case.name, name, self.backend, quantity, error, budget, naive_error, ok, note)


def judge(subject: Subject, key: str, got: Tensor, oracle: Tensor, naive: Tensor, change: str = "") -> Row:
    """Largest and root mean square error of an output or a gradient `key` against the error budget.

    Args:
        change: of the inputs, where an invariance is judged.
    """
    case, budget = subject.case, subject.spec.budget
    make = partial(subject.row, f"{key}, {change}" if change else key)
    if got.shape != oracle.shape:
        return make(float("inf"), 0.0, 0.0, False, f"shape {tuple(got.shape)}, expected {tuple(oracle.shape)}")
    finite = torch.isfinite(oracle)
    if not torch.equal(torch.where(finite, 0, got), torch.where(finite, 0, oracle)) or not torch.isfinite(got[finite]).all():
        return make(float("inf"), 0.0, 0.0, False, "NaN or infinities differ from the oracle's")
    if not finite.any():
        return make(0.0, 0.0, 0.0)
    gradient = key.startswith("d_")
    factor, ulps = (budget.backward, budget.backward_ulps) if gradient else (budget.forward, budget.ulps)
    wide = key in (*subject.spec.wide, *(f"d_{name}" for name in case.fixed))
    kept = torch.promote_types(subject.dtype, torch.float32) if wide else subject.dtype
    slack = ulps * torch.finfo(kept).eps / 2 * float(oracle[finite].abs().max())
    error, reference = (got - oracle)[finite], (naive - oracle)[finite]
    worst, allowed = float(error.abs().max()), factor * float(reference.abs().max()) + slack
    spread, allowed_spread = float(error.square().mean().sqrt()), factor * float(reference.square().mean().sqrt()) + slack
    note = "" if spread <= allowed_spread else f"rms {spread:.2e} is over {allowed_spread:.2e}"
    return make(worst, allowed, float(reference.abs().max()), worst <= allowed and not note, note)


def judge_by_row(subject: Subject, got: Tensor, oracle: Tensor, naive: Tensor, scale: Tensor) -> Row:
    """Largest error in units in the last place of the row scale: small rows and columns count as much as large ones."""
    unit, finite = ulp(scale, _FORMATS[subject.dtype]), torch.isfinite(oracle)
    worst, reference = (_largest(((t - oracle) / unit)[finite]) for t in (got, naive))
    budget = subject.spec.budget
    return subject.row("ulp_row", worst, budget.forward * reference + budget.ulps / 2, reference)


def judge_bias(subject: Subject, got: Tensor, oracle: Tensor, naive: Tensor) -> Row:
    """Mean signed error in units in the last place; a row shares its rounding of probabilities, so rows are the samples."""
    ulps = torch.exp2(torch.floor(torch.log2(oracle.abs().clamp(min=1e-30)))) * torch.finfo(subject.dtype).eps
    error, reference = (((t - oracle) / ulps).mean(-1).flatten() for t in (got, naive))
    noise = 4 * float(error.std()) / error.numel() ** 0.5
    return subject.row("bias", abs(float(error.mean())), max(subject.spec.budget.bias, noise), abs(float(reference.mean())))


def judge_exact(subject: Subject, key: str, got: Tensor, expected: Tensor, change: str) -> Row:
    """Whether an output on changed inputs has the bits that the output on the inputs themselves promises."""
    quantity = f"{key}, {change}"
    if got.shape != expected.shape:
        return subject.row(quantity, float("inf"), 0.0, 0.0, False, f"shape {tuple(got.shape)}, {tuple(expected.shape)} before")
    differ = got != expected
    note = f"{int(differ.sum())} of {differ.numel()} elements have other bits" if differ.any() else ""
    return subject.row(quantity, _largest((got - expected)[differ]), 0.0, 0.0, not note, note)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
