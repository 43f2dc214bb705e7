"""Merging partial results."""

import re

import pytest
import torch
from torch.library import opcheck

from attnkit import errors, ops


def test_gradcheck() -> None:
    outs = torch.randn(3, 1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.merge_partials, (outs, lses))


def test_opcheck() -> None:
    args = (torch.randn(2, 1, 3, 2, 4, requires_grad=True), torch.randn(2, 1, 3, 2, requires_grad=True))
    opcheck(torch.ops.attnkit.merge_partials.default, args)


def test_compiles_without_a_break() -> None:
    args = (torch.randn(2, 1, 3, 2, 4), torch.randn(2, 1, 3, 2))
    compiled = torch.compile(ops.merge_partials, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), ops.merge_partials(*args), strict=True))


def test_union_of_parts_is_attention_over_all_keys() -> None:
    q, k, v = (torch.randn(2, 40, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    parts = [ops.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 1), (1, 1), (1, 25), (25, 40))]
    out, lse = ops.merge_partials(*(torch.stack(x) for x in zip(*parts, strict=True)))
    whole, whole_lse = ops.attention(q, k, v, return_lse=True)
    assert (out - whole).abs().max() < 1e-14
    assert (lse - whole_lse).abs().max() < 1e-14


def test_order_of_parts_does_not_matter() -> None:
    outs, lses = torch.randn(4, 1, 9, 2, 16, dtype=torch.float64), torch.randn(4, 1, 9, 2, dtype=torch.float64)
    a, b = ops.merge_partials(outs, lses), ops.merge_partials(outs.flip(0), lses.flip(0))
    assert all((x - y).abs().max() < 1e-14 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ((2, 1, 3, 2, 4), (2, 1, 3), errors.ShapeError, "lses has shape (2, 1, 3); expected 4 dimensions [P, B, T, H]"),
        ((2, 1, 3, 2, 4), (3, 1, 3, 2), errors.ShapeError, "P must be 2 as in outs"),
        ((0, 1, 3, 2, 4), (0, 1, 3, 2), errors.ShapeError, "outs has no part (P = 0)"),
    ],
)
def test_bad_input_is_refused_by_name(outs: tuple[int], lses: tuple[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.merge_partials(torch.zeros(outs), torch.zeros(lses))


def test_lse_dtype_is_checked() -> None:
    with pytest.raises(errors.DTypeError, match="lses is bfloat16; allowed: float32"):
        ops.merge_partials(torch.zeros(2, 1, 3, 2, 4, dtype=torch.bfloat16), torch.zeros(2, 1, 3, 2, dtype=torch.bfloat16))
