"""Conformance on the GPU: every case, dtype and backend against float64, forward and gradients, and the invariances."""

import pytest
import torch

from attnkit._core.opspec import Case, OpSpec
from attnkit.lab.numerics import conformance
from attnkit.ops import OPS

pytestmark = pytest.mark.gpu
CELLS = [(spec, case) for spec in OPS.values() for case in spec.cases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CELLS, ids=lambda value: value.name.replace(" ", "_"))
def test_within_budget(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    rows = [
        row for judged in (conformance.check, conformance.check_invariances) for row in judged(spec, case, dtype, device="cuda")
    ]
    bad = [row for row in rows if not row.ok]
    assert not bad, "\n".join(map(str, bad))
