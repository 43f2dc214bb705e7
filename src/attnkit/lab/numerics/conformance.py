"""Conformance: every operator, case, dtype and backend against a float64 oracle, forward and gradients, and its invariances.

An operator passes where its error stays within its budget (`attnkit._core.opspec.Budget`): a multiple of the error that
the plain form of the same precision makes on the same inputs, measured here and now, plus a little rounding. No tolerance
is set by hand. What must be exact is judged exactly: NaN never appears where the oracle is finite, infinities agree.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit._core.invariance import Invariance
from attnkit._core.opspec import Case, OpSpec
from attnkit._core.settings import settings
from attnkit.lab.numerics.cells import Cell, auto_jobs, judge_cells
from attnkit.lab.numerics.verdicts import Row, Subject, judge, judge_bias, judge_by_row, judge_exact
from attnkit.ops import OPS

__all__ = ["Row", "check", "check_invariances", "plan", "run"]

Results = dict[str, Tensor]
Run = Callable[..., Any]


def run(
    names: Sequence[str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    device: str | torch.device = "cpu",
    level: str = "fast",
    backends: Sequence[str] | None = None,
    jobs: int | None = 1,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Check operators (all of them by default) and return every judged quantity.

    Args:
        names: operators of `attnkit.ops`.
        level: "fast" or "full" cases.
        backends: only these; default all. A backend that refuses a call is not judged on it.
        jobs: processes, which import attnkit anew; one is this process. None: as many as cores and memory allow, if there is
            enough to do.
        on_row: called as each row is ready; rows of a case in a dtype come behind each other, of several jobs in any order.
    Raises:
        OptionError: an unknown operator, or less than one job.
        CheckFailed: a process died; the message names the case.
    """
    cells = list(_cells(names, dtypes, level))
    judge = partial(_judged, device=device, backends=backends)
    count = auto_jobs(len(cells), torch.device(device)) if jobs is None else jobs
    rows: dict[Cell, list[Row]] = {}
    for cell, judged in judge_cells(cells, judge, count):
        rows[cell] = judged
        if on_row:
            for row in judged:
                on_row(row)
    return [row for cell in cells for row in rows[cell]]


def plan(names: Sequence[str] | None = None, *, dtypes: Sequence[torch.dtype], level: str = "fast") -> int:
    """How many (operator, case, dtype) cells `run` would go through, for progress."""
    return sum(1 for _ in _cells(names, dtypes, level))


def _cells(names: Sequence[str] | None, dtypes: Sequence[torch.dtype], level: str) -> Iterator[Cell]:
    for name in names or list(OPS):
        spec = OPS[name]
        for case in spec.cases:
            if level == "full" or case.level == "fast":
                yield from (Cell(name, case.name, dtype) for dtype in dtypes if dtype in spec.dtypes)


def _judged(cell: Cell, *, device: str | torch.device, backends: Sequence[str] | None) -> list[Row]:
    spec = OPS[cell.op]
    case = next(case for case in spec.cases if case.name == cell.case)
    options: dict[str, Any] = {"device": device, "backends": backends}
    return [row for judge in (check, check_invariances) for row in judge(spec, case, cell.dtype, **options)]


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    backends: Sequence[str] | None = None,
    operator: Run | None = None,
) -> list[Row]:
    """Judge one case in one dtype on every backend that takes it, or one given `operator` in their place."""
    low = _inputs(case, dtype, device)
    high = _retarget(_widen(low), torch.float64)
    first = spec.outputs[0]
    rows = []
    with _full_precision():
        oracle = _evaluate(spec, spec.oracle, high, case)
        naive = _evaluate(spec, spec.naive, low, case)
        scale = spec.row_scale(**spec.arguments(high)).cpu() if spec.row_scale else oracle[first]
        for name, function in _operators(spec, low | _leaves(low, case), backends, operator):
            subject = Subject(spec, case, dtype, name)
            results = _evaluate(spec, function, low, case)
            judged = [judge(subject, key, results[key], oracle[key], naive[key]) for key in oracle]
            rows += judged
            if judged[0].error == float("inf"):
                continue  # the wrong shape, or not finite: there is no error to speak of
            outputs = results[first], oracle[first], naive[first]
            rows.append(judge_by_row(subject, *outputs, scale))
            if dtype in case.bias and name not in case.biased:
                rows.append(judge_bias(subject, *outputs))
    return rows


def check_invariances(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    backends: Sequence[str] | None = None,
    operator: Run | None = None,
) -> list[Row]:
    """Judge the spec's invariances that name this case, as `check` judges the case; no rows where none does."""
    case = dataclasses.replace(case, grads=())
    low = _inputs(case, dtype, device)
    rows: list[Row] = []
    with _full_precision():
        for invariance in spec.invariances:
            if case.name in invariance.cases:
                rows += _judge_change(spec, case, dtype, invariance, low, backends, operator)
    return rows


def _judge_change(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    invariance: Invariance,
    low: dict[str, Any],
    backends: Sequence[str] | None,
    operator: Run | None,
) -> list[Row]:
    """One invariance, on whoever promises it and takes the inputs both before and after the change."""
    changed = invariance.change(low)
    promised = invariance.backends or [backend.name for backend in spec.backends]
    only = [name for name in promised if backends is None or name in backends]
    taken = dict(_operators(spec, low, only, operator))
    if not invariance.exact:
        before = _evaluate(spec, spec.oracle, _retarget(_widen(low), torch.float64), case)
        naive = _evaluate(spec, spec.naive, changed, case)
    rows = []
    for name, function in _operators(spec, changed, only, operator):
        if name not in taken:
            continue
        subject = Subject(spec, case, dtype, name)
        after = _evaluate(spec, function, changed, case)
        if invariance.exact:
            before = _evaluate(spec, function, low, case)
        for key, result in before.items():
            expected = invariance.expect(key, result)
            if invariance.exact:
                rows.append(judge_exact(subject, key, after[key], expected, invariance.name))
            else:
                rows.append(judge(subject, key, after[key], expected, naive[key], invariance.name))
    return rows


def _inputs(case: Case, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Draw in float32 on the CPU, so that every device sees the same numbers, then round to the dtype under test."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    inputs = case.make(generator)
    if dtype == torch.float64:
        inputs = _retarget(inputs, torch.float64)
    fixed = torch.promote_types(dtype, torch.float32)
    for name, value in inputs.items():
        if _is_float(value):
            inputs[name] = value.to(device, fixed if name in case.fixed else dtype)
        elif isinstance(value, Tensor):
            inputs[name] = value.to(device)
    return inputs


def _widen(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if _is_float(value) else value for name, value in inputs.items()}


def _retarget(inputs: dict[str, Any], out_dtype: torch.dtype) -> dict[str, Any]:
    return inputs | {"out_dtype": out_dtype} if "out_dtype" in inputs else inputs


def _operators(
    spec: OpSpec, inputs: dict[str, Any], only: Sequence[str] | None, operator: Run | None
) -> Iterator[tuple[str, Run]]:
    if operator is not None:
        yield "given", operator
        return
    disabled = settings().disable
    for backend in spec.backends:
        wanted = only is None or backend.name in only
        if (
            wanted
            and f"{spec.name}.{backend.name}" not in disabled
            and not backend.refuses(spec.prepare(**spec.arguments(inputs)))
        ):
            yield backend.name, lambda name=backend.name, **kwargs: spec.function(**kwargs, backend=name)


def _evaluate(spec: OpSpec, function: Run, inputs: dict[str, Any], case: Case) -> Results:
    """Outputs, and gradients of a fixed random weighting of all outputs."""
    generator = torch.Generator().manual_seed(1)
    leaves = _leaves(inputs, case)
    outputs = _tensors(function(**spec.arguments(inputs | leaves)))
    results = {name: output.detach().double().cpu() for name, output in zip(spec.outputs, outputs, strict=False)}
    if leaves:
        loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
        for output in outputs:
            weight = torch.randn(output.shape, generator=generator).to(output.device, torch.bfloat16)  # exact in every dtype
            loss = loss + (output.masked_fill(torch.isinf(output), 0).double() * weight).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results |= {f"d_{name}": grad.double().cpu() for name, grad in zip(leaves, grads, strict=True)}
    return results


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    """What an operator returns, tensor by tensor; what is not there is left out."""
    if isinstance(outputs, tuple):
        return tuple(tensor for part in outputs for tensor in _tensors(part))
    return () if outputs is None else (outputs,)


def _leaves(inputs: dict[str, Any], case: Case) -> dict[str, Tensor]:
    return {name: inputs[name].detach().clone().requires_grad_() for name in case.grads}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in float32 must not be rounded to TF32 on the way, whichever of torch's switches has allowed it.

    `fp32_precision` is set by either of them; asking the older one, `allow_tf32`, raises once the newer has been used.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    if before != "tf32":
        yield
        return
    products.fp32_precision = "none"  # what the general switch says
    own = "none" if products.fp32_precision == before else before
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = own
