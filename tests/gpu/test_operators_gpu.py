"""Conformance on the GPU: forward and gradients of every case, dtype and backend against float64."""

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
    bad = [row for row in conformance.check(spec, case, dtype, device="cuda") if not row.ok]
    assert not bad, "\n".join(map(str, bad))
