"""The true value, against fifty digits and against the operator's definition."""

from typing import Any

import mpmath
import pytest
import torch
from numerics_examples import drawn

from attnkit import ops
from attnkit._core.errors import DTypeError, InputError, ShapeError
from attnkit.lab.numerics import golden
from attnkit.lab.numerics.formats import FP64
from attnkit.lab.numerics.golden import golden_attention


def test_against_fifty_digits() -> None:
    q, k, v = (t[0, :, 0] for t in drawn(FP64, 8, width=4))
    out, lse = golden_attention(*(t[None, :, None] for t in (q, k, v)), scale=1.7, return_lse=True)
    with mpmath.workdps(50):
        for row in range(8):
            scores = [mpmath.mpf("1.7") * mpmath.fdot(zip(q[row].tolist(), key.tolist(), strict=True)) for key in k]
            weights = [mpmath.exp(score) for score in scores]
            total = mpmath.fsum(weights)
            assert abs(mpmath.log(total) - lse[0, row, 0].item()) < 1e-15 * 4
            for column in range(4):
                exact = mpmath.fdot(zip(weights, v[:, column].tolist(), strict=True)) / total
                assert abs(exact - out[0, row, 0, column].item()) < 1e-15


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(65, 65), (33, 90), (90, 33)])
@pytest.mark.parametrize("elements", [1, 2**21], ids=["row by row", "at once"])
def test_against_the_definition(causal: bool, rows: int, keys: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "_ELEMENTS", elements)
    q, k, v = drawn(FP64, rows, keys, heads=(4, 2), batch=2)
    out, lse = golden_attention(q, k, v, causal=causal, return_lse=True)
    expected, expected_lse = ops.attention(q, k, v, causal=causal, return_lse=True, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-14)
    assert torch.equal(golden_attention(q, k, v, causal=causal), out)


@pytest.mark.parametrize("batched", [False, True])
def test_masks(batched: bool) -> None:
    q, k, v = drawn(FP64, 20, 30, heads=(4, 2), batch=2)
    mask = torch.rand(2, 20, 30) < 0.5
    mask[:, 3] = False
    mask = mask if batched else mask[0]
    out, lse = golden_attention(q, k, v, mask=mask, return_lse=True)
    assert not out[:, 3].any()
    assert torch.isneginf(lse[:, 3]).all()
    for element in range(2):
        for row in (0, 19):
            seen = (mask[element] if batched else mask)[row]
            alone = golden_attention(*(t[element : element + 1] for t in (q[:, row : row + 1], k[:, seen], v[:, seen])))
            torch.testing.assert_close(out[element, row], alone[0, 0], rtol=0, atol=1e-14)


def test_gradients_are_those_of_the_definition() -> None:
    inputs = [t.requires_grad_() for t in drawn(FP64, 20, 30, heads=(4, 2))]
    weight = torch.randn(1, 20, 4, 32, dtype=torch.float64)
    ours = torch.autograd.grad((golden_attention(*inputs, causal=True) * weight).sum(), inputs)
    theirs = torch.autograd.grad((ops.attention(*inputs, causal=True, backend="reference") * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_low_precision_inputs_are_taken_as_they_are() -> None:
    q, k, v = (t.bfloat16() for t in drawn(FP64, 20))
    assert torch.equal(golden_attention(q, k, v), golden_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 8, 3, 32, dtype=torch.float64)}, ShapeError, "v has shape .*; Hkv must be 3 as in k"),
        ({"q": torch.zeros(1, 8, 32, dtype=torch.float64)}, ShapeError, "q has shape .*; expected 4 dimensions"),
        ({"q": torch.zeros(1, 0, 4, 32, dtype=torch.float64)}, ShapeError, "every size must be at least 1"),
        ({"q": torch.zeros(1, 8, 5, 32, dtype=torch.float64)}, ShapeError, "q has 5 heads and k has 2"),
        ({"q": torch.zeros(1, 8, 4, 32)}, DTypeError, "convert one of them"),
        ({"q": torch.zeros(1, 8, 4, 32).int()}, DTypeError, "q is int32; allowed: float16"),
        ({"v": torch.full((1, 8, 2, 32), torch.nan, dtype=torch.float64)}, InputError, "v holds NaN or infinities"),
        ({"mask": torch.ones(8, 8)}, DTypeError, "mask is float32; allowed: bool"),
        ({"mask": torch.ones(8, 9).bool()}, ShapeError, "mask has shape .*; S must be 8 as in k"),
        ({"mask": torch.ones(3, 8, 8).bool()}, ShapeError, "mask has shape .*; B must be 1 as in q"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = drawn(FP64, 8, heads=(4, 2))
    with pytest.raises(error, match=message):
        golden_attention(**{"q": q, "k": k, "v": v} | change)
