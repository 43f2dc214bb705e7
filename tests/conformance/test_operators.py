"""Every operator x case x dtype x backend against float64, the invariances of each, and what a spec names."""

import dataclasses
from typing import Any

import pytest
import torch

from attnkit._core.dispatch import Backend
from attnkit._core.invariance import Invariance
from attnkit._core.opspec import Case, OpSpec
from attnkit.lab.numerics import BACKWARD_SITES, BF16, FORWARD_SITES, SitePolicy, conformance
from attnkit.ops import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS = [(spec, case) for spec in OPS.values() for case in spec.cases if case.level == "fast"]
FULL = [(spec, case) for spec in OPS.values() for case in spec.cases if case.level == "full"]


def _id(value: OpSpec | Case) -> str:
    return value.name.replace(" ", "_")


def _changes(spec: OpSpec, case: Case) -> list[Invariance]:
    return [invariance for invariance in spec.invariances if case.name in invariance.cases]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), [cell for cell in CELLS if _changes(*cell)], ids=_id)
def test_invariances(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    rows = conformance.check_invariances(spec, case, dtype)
    assert not [row for row in rows if not row.ok], "\n".join(map(str, rows))
    judged = {row.quantity for row in rows}
    expected = {f"{name}, {change.name}" for change in _changes(spec, case) for name in spec.outputs if change.name != "alone"}
    assert expected <= judged


@pytest.mark.parametrize("spec", OPS.values(), ids=_id)
def test_what_a_spec_names_exists(spec: OpSpec) -> None:
    """A misspelt case would be judged by nothing."""
    cases = {case.name: case for case in spec.cases}
    assert len(cases) == len(spec.cases)
    backends = {backend.name for backend in spec.backends}
    assert set(spec.sites) <= {*FORWARD_SITES, *BACKWARD_SITES}
    for invariance in spec.invariances:
        assert invariance.cases
        assert set(invariance.cases) <= set(cases)
        assert set(invariance.backends) <= backends
    for case in spec.cases:
        assert set(case.biased) <= backends


@pytest.mark.parametrize("name", ["attention", "query_sparse_attention"])
def test_sites_of_attention_are_those_of_the_emulated_kernel(name: str) -> None:
    kernel = SitePolicy.preset("kernel", BF16)
    assert {site for site, rounding in kernel.sites.items() if rounding.format == BF16} == set(OPS[name].sites)


def test_run_reports_every_cell_once() -> None:
    seen: list[conformance.Row] = []
    rows = conformance.run(["merge_partials"], dtypes=(torch.float32,), on_row=seen.append)
    assert rows == seen
    cases = {row.case for row in rows}
    assert len(cases) == conformance.plan(["merge_partials"], dtypes=(torch.float32,))
    assert {row.backend for row in rows} == {"torch", "reference"}
    assert {"out", "d_outs", "ulp_row", "bias", "out, parts permuted", "lse, outs x 8", "out, alone"} <= {
        row.quantity for row in rows
    }


def test_a_backend_that_takes_no_gradients_is_not_asked_for_them() -> None:
    """FlashAttention-4 is such a one, at some widths."""
    spec = OPS["attention"]
    forward_only = Backend("forward only", spec.backends[0].run, lambda call: ["gradients"] if call.needs_grad else [])

    def function(*, backend: str, **inputs: Any) -> Any:
        assert backend == "forward only"
        assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs.values())
        return spec.function(**inputs, backend="reference")

    picky = dataclasses.replace(spec, backends=(forward_only,), function=function)
    case = next(case for case in spec.cases if case.name == "one token")
    assert case.grads
    assert conformance.check(picky, case, torch.float32) == []
    _assert_ok(conformance.check(picky, dataclasses.replace(case, grads=()), torch.float32))
