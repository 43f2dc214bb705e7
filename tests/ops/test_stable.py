"""Stable modes: the sum of a row's score gradients, which is 0 in exact arithmetic, and the moved maximum."""

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import BackendUnavailable, OptionError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, KEYS, HEADS, WIDTH = 512, 64, 4, 64


def _tied(dtype: torch.dtype, *, ties: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """One query a row; its maximum is shared by `ties` equal keys, the others lie 12 to 20 below; values around -2."""
    scores = -12 - 8 * torch.rand(ROWS, KEYS, HEADS, 1)
    scores[:, :ties] = 0
    q = torch.zeros(ROWS, 1, HEADS, WIDTH)
    q[..., 0] = WIDTH**0.5
    k = torch.zeros(ROWS, KEYS, HEADS, WIDTH)
    k[..., :1] = scores
    v = -2 + 0.6 * torch.randn(ROWS, KEYS, HEADS, WIDTH)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def _leak(dtype: torch.dtype, stable: str) -> Tensor:
    """Sum over the keys of the gradient of their scores, of every row and head [ROWS, HEADS]: read off a key bias."""
    torch.manual_seed(1)
    q, k, v = _tied(dtype)
    bias = torch.zeros(ROWS, KEYS, HEADS, device=DEVICE, requires_grad=True)
    out = ops.attention(q, k, v, key_bias=bias, stable=stable)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out, bias, torch.randn(out.shape).to(out))
    return gradient.sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stable", ["delta", "exact_delta"])
def test_score_gradients_of_a_row_sum_to_nothing(dtype: torch.dtype, stable: str) -> None:
    """Tied maxima: probabilities are exact, and what remains is the rounded output in delta."""
    plain, mended = (_leak(dtype, mode).square().mean().sqrt() for mode in ("off", stable))
    assert plain > 50 * mended


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exact_delta_holds_where_probabilities_are_rounded(dtype: torch.dtype) -> None:
    """Scores of any size: the unrounded output is of rounded probabilities there, and only sum(p * dp) gives a sum of 0."""

    def leak(stable: str) -> Tensor:
        torch.manual_seed(2)
        q, k, v = (torch.randn(1, 300, 2, 64, device=DEVICE, dtype=dtype) for _ in range(3))
        bias = torch.zeros(1, 300, 2, device=DEVICE, requires_grad=True)
        rows = [q[:, i : i + 1] for i in range(0, 300, 30)]
        sums = []
        for row in rows:
            out = ops.attention(row, k, v + 2, key_bias=bias, stable=stable, backend="triton")
            assert isinstance(out, Tensor)
            (gradient,) = torch.autograd.grad(out, bias, torch.randn(out.shape).to(out))
            sums.append(gradient.sum(1))
        return torch.stack(sums).square().mean().sqrt()

    plain, split, exact = (leak(mode) for mode in ("off", "delta", "exact_delta"))
    assert plain > 50 * exact
    assert plain > split > exact


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num", [512, 2048, 8192, 16384])
@pytest.mark.parametrize("causal", [False, True])
def test_consistent_sums_are_closer_on_values_with_a_mean(num: int, dtype: torch.dtype, causal: bool) -> None:
    """At least three times, root mean square, before the output is rounded, against our own kernel with exact sums."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, num, 2, 128, device=DEVICE, dtype=dtype) for _ in range(2))
    v = (2 + 0.4 * torch.randn(1, num, 2, 128, device=DEVICE)).to(dtype)
    true = ops.attention(q.double(), k.double(), v.double(), causal=causal, backend="torch")

    def error(stable: str) -> Tensor:
        out = ops.attention(q, k, v, causal=causal, stable=stable, out_dtype=torch.float32, backend="triton")
        assert isinstance(out, Tensor)
        assert isinstance(true, Tensor)
        return (out.double() - true).square().mean().sqrt()

    exact = error("off")
    assert all(exact > 3 * error(mode) for mode in ("delta", "exact_delta", "dynamic_max"))


@pytest.mark.parametrize("stable", ["delta", "exact_delta", "dynamic_max"])
@pytest.mark.parametrize("ties", [2, 3, 8])
def test_results_are_those_of_attention(stable: str, ties: int) -> None:
    q, k, v = (t[:8].detach().requires_grad_() for t in _tied(torch.float32, ties=ties))
    grads = []
    for options in ({"stable": stable, "backend": "triton"}, {"backend": "reference"}):
        out, lse = ops.attention(q, k, v, return_lse=True, **options)  # type: ignore[arg-type]
        grads.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("top", [1e4, 30.0, 0.5, 0.0, -0.5, -30.0, -120.0, -1e4])
def test_a_moved_maximum_never_loses_the_row(top: float) -> None:
    """Tied keys wherever they lie, as far as 1e4 from 0, with keys that nobody sees beside them."""
    q, k, v = _tied(torch.float32)
    k[..., 0] += top
    bias = torch.zeros(ROWS, KEYS, device=DEVICE)
    bias[:, KEYS // 2 :] = -torch.inf
    for dtype in (torch.float32, torch.float16) if DEVICE == "cuda" else (torch.float32,):
        some = [t[:4].to(dtype) for t in (q, k, v)]
        ours, expected = (
            ops.attention(*some, key_bias=bias[:4], stable=mode, backend="triton", return_lse=True)
            for mode in ("dynamic_max", "off")
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-5)


def test_who_serves_a_stable_call() -> None:
    q, k, v = (t[:2] for t in _tied(torch.bfloat16))
    for backend in ("sdpa", "cudnn", "fa4"):
        with pytest.raises(BackendUnavailable, match=r"stable='delta'|not installed|device cpu"):
            ops.attention(q, k, v, stable="delta", backend=backend)
    with pytest.raises(OptionError, match="stable"):
        ops.attention(q, k, v, stable="stochastic")
