"""Conformance on the GPU: forward and gradients of every case, dtype and backend against float64."""

import pytest
import torch

from attnkit import ops
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


def test_auto_prefers_the_fused_kernels() -> None:
    q, k = (torch.randn(1, 128, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
    assert ops.explain("attention", q, k, k, causal=True).chosen == "sdpa"
    assert ops.explain("attention", q, k, k, causal=True, return_lse=True).chosen == "torch"
    assert ops.explain("attention", *(t.float() for t in (q, k, k)), causal=True).chosen == "torch"


def test_deterministic_gradients() -> None:
    q, k = (torch.randn(2, 333, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2))
    first, *rest = (
        torch.autograd.grad(ops.attention(q, k, k, causal=True, deterministic=True).float().square().sum(), (q, k))
        for _ in range(10)
    )
    assert all(torch.equal(a, b) for run in rest for a, b in zip(run, first, strict=True))
