"""Every operator x case x dtype x backend against float64, and proof that a broken operator is caught."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.opspec import Case, OpSpec
from attnkit.lab.numerics import conformance
from attnkit.ops import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS = [(spec, case) for spec in OPS.values() for case in spec.cases if case.level == "fast"]
FULL = [(spec, case) for spec in OPS.values() for case in spec.cases if case.level == "full"]


def _id(value: OpSpec | Case) -> str:
    return value.name.replace(" ", "_")


def _assert_ok(rows: list[conformance.Row]) -> None:
    assert rows
    bad = [row for row in rows if not row.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CELLS, ids=_id)
def test_within_budget(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    _assert_ok(conformance.check(spec, case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), FULL, ids=_id)
def test_within_budget_full(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    _assert_ok(conformance.check(spec, case, dtype))


def _wrong_scale(q: Tensor, *args: Any, **kwargs: Any) -> Any:
    kwargs["scale"] = q.shape[-1] ** -0.5 * (1 + 2**-9)
    return ops.attention(q, *args, **kwargs)


def _off_by_one(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    kwargs.pop("causal", None)
    return ops.attention(q, k, v, window_size=(None, 1), **kwargs)


def _one_key_short(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    kwargs.pop("causal", None)
    return ops.attention(q, k, v, causal=True, window_size=(q.shape[1] - 2, 0), **kwargs)


def _dropped_rescale(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    """The flash recurrence over tiles of 64 keys, with the old sums not rescaled to the new maximum."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    top = queries.new_full(queries.shape[:-1], -torch.inf).float()
    total, summed = torch.zeros_like(top), 0
    for start in range(0, k.shape[1], 64):
        s = queries.float() @ keys[:, :, start : start + 64].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.arange(start, start + s.shape[-1]) > torch.arange(q.shape[1])[:, None], -torch.inf)
        top = torch.maximum(top, s.amax(-1))
        p = torch.exp(s - top[..., None])
        total = total + p.sum(-1)
        summed = summed + p @ values[:, :, start : start + 64].float()
    lse = (top + torch.log(total)).transpose(1, 2)
    return (summed / total[..., None]).transpose(1, 2).to(q.dtype), lse


def _unrounded_sum(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    """A one-sided rounding of the values: the kind of error that only a signed test sees."""
    out, lse = ops.attention(q, k, v, **kwargs)
    ulp = torch.exp2(torch.floor(torch.log2(out.float().abs()))) * torch.finfo(out.dtype).eps
    return (out.float() + 0.5 * ulp * (torch.rand(out.shape) < 0.2)).to(out.dtype), lse


@pytest.mark.parametrize(
    ("broken", "case", "dtype"),
    [
        (_wrong_scale, "causal, grouped heads", torch.float32),
        (_off_by_one, "causal, grouped heads", torch.float32),
        (_off_by_one, "causal, grouped heads", torch.bfloat16),
        (_one_key_short, "causal, grouped heads", torch.bfloat16),
        (_dropped_rescale, "causal, grouped heads", torch.float32),
        (_dropped_rescale, "causal, grouped heads", torch.bfloat16),
        (_unrounded_sum, "values around 2", torch.bfloat16),
    ],
)
def test_broken_operator_is_caught(broken: Callable[..., Any], case: str, dtype: torch.dtype) -> None:
    spec = OPS["attention"]
    chosen = next(c for c in spec.cases if c.name == case)
    rows = conformance.check(spec, chosen, dtype, operator=broken)
    assert any(not row.ok for row in rows), rows


def test_bias_gate_alone_catches_a_signed_error() -> None:
    spec = OPS["attention"]
    chosen = next(c for c in spec.cases if c.bias)
    rows = conformance.check(spec, chosen, torch.bfloat16, operator=_unrounded_sum)
    assert [row.quantity for row in rows if not row.ok] == ["bias"]


def test_nan_and_wrong_shape_are_caught() -> None:
    spec = OPS["attention"]
    chosen = next(c for c in spec.cases if c.name == "rows that see nothing")

    def nan_rows(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        out, lse = ops.attention(q, k, v, **kwargs)
        return out.masked_fill(torch.isneginf(lse)[..., None], torch.nan), lse

    rows = conformance.check(spec, chosen, torch.float32, operator=nan_rows)
    assert any("NaN" in row.note for row in rows)

    def one_row_short(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return tuple(t[:, :-1] for t in ops.attention(q, k, v, **kwargs))

    rows = conformance.check(spec, dataclasses.replace(chosen, grads=()), torch.float32, operator=one_row_short)
    assert any("shape" in row.note for row in rows)


def test_run_reports_every_cell_once() -> None:
    seen: list[conformance.Row] = []
    rows = conformance.run(["merge_partials"], dtypes=(torch.float32,), on_row=seen.append)
    assert rows == seen
    cases = {row.case for row in rows}
    assert len(cases) == conformance.plan(["merge_partials"], dtypes=(torch.float32,))
    assert {row.backend for row in rows} == {"torch", "reference"}
