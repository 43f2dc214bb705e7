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
