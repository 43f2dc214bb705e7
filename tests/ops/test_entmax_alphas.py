"""Entmax attention's kernels with an alpha for each head: results and gradients against float64, alphas included."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import ops
from attnkit._core.triton import interpreted
from attnkit.ops._attention_core._triton import launch

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cpu" if interpreted() else "cuda"
MIXED = (1.5, 2.0, 1.3, 1.75)
NEAR_ONE = (1.02, 1.05, 1.1, 1.2)
LENGTHS = (40, 0, 33)


def _inputs(rows: int, keys: int, kv_heads: int = 2) -> tuple[Tensor, ...]:
    """q, k, v, and a weight for the output."""
    q, weight = (torch.randn(2, rows, 4, 16, device=DEVICE) for _ in range(2))
    return 2 * q, *(torch.randn(2, keys, kv_heads, 16, device=DEVICE) for _ in range(2)), weight


def _results(
    inputs: tuple[Tensor, ...], alphas: tuple[float, ...], dtype: torch.dtype, backend: str, **options: Any
) -> tuple[Tensor, ...]:
    """The output, and gradients of q, k, v and alpha."""
    q, k, v, weight = (t.to(dtype) for t in inputs)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, torch.tensor(alphas, device=DEVICE).to(dtype))]
    out = ops.entmax_attention(*leaves[:3], alpha=leaves[3], backend=backend, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, weight)


def _assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for name, ours, expected in zip(("out", "d_q", "d_k", "d_v", "d_alpha"), found, wanted, strict=True):
        apart = float((ours.double() - expected).abs().max() / expected.abs().max())
        assert apart < 1e-5, f"{name} is off by {apart:.1e} of its largest"


@pytest.mark.parametrize(
    ("alphas", "rows", "keys", "kv_heads", "options"),
    [
        (MIXED, 70, 70, 2, {}),
        (MIXED, 150, 150, 2, {"causal": True}),  # with lists of tiles
        (NEAR_ONE, 33, 90, 4, {"causal": True}),
        (MIXED, 70, 70, 1, {"causal": True, "window_size": (20, 0), "softcap": 2.0}),
        (NEAR_ONE, 70, 70, 1, {"causal": True, "window_size": (20, 0), "softcap": 2.0}),
        (MIXED, 5, 70, 2, {"causal": True}),
        (NEAR_ONE, 5, 70, 2, {"causal": True}),
    ],
    ids=str,
)
def test_results_and_gradients(alphas: tuple[float, ...], rows: int, keys: int, kv_heads: int, options: dict[str, Any]) -> None:
    inputs = _inputs(rows, keys, kv_heads)
    wanted = _results(inputs, alphas, torch.float64, "reference", **options)
    _assert_close(_results(inputs, alphas, torch.float32, "triton", **options), wanted)


def test_packed_with_masked_keys_and_rows_that_see_nothing() -> None:
    rows = sum(LENGTHS)
    inputs = tuple(t[0] for t in _inputs(rows, rows))
    bias = torch.zeros(rows, device=DEVICE).masked_fill(torch.rand(rows, device=DEVICE) < 0.3, -torch.inf)
    bias[:3] = -torch.inf
    cu = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True}
    wanted = _results(inputs, MIXED, torch.float64, "reference", key_bias=bias.double(), **options)
    assert (wanted[0][:3] == 0).all()
    _assert_close(_results(inputs, MIXED, torch.float32, "triton", key_bias=bias, **options), wanted)


def test_heads_with_alpha_one_and_a_half_and_two_equal_those_of_a_number() -> None:
    q, k, v, _ = _inputs(40, 40, 4)
    mixed = ops.entmax_attention(q, k, v, alpha=torch.tensor(MIXED, device=DEVICE), causal=True, backend="triton")
    for head, alpha in enumerate(MIXED):
        alone = ops.entmax_attention(q, k, v, alpha=alpha, causal=True, backend="triton")
        torch.testing.assert_close(mixed[:, :, head], alone[:, :, head], rtol=1e-5, atol=2e-6)


def test_runs_repeat_and_what_o2_lost_is_given_back() -> None:
    """O2 as 16 bits keep it moves the mean of dP of a row; the gradient of alpha takes the mean from its own sums."""
    inputs = _inputs(40, 70)
    wanted = _results(inputs, NEAR_ONE, torch.float64, "reference")[-1]
    first, again = (_results(inputs, NEAR_ONE, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    backward = launch.backward

    def rounded(p: launch.Launch, d_out: Tensor, d_lse: None, second: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return backward(p, d_out, d_lse, second.bfloat16().float(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backward", rounded)
        found = _results(inputs, NEAR_ONE, torch.float32, "triton")
    assert not torch.equal(found[1], first[1])
    assert float((found[-1] - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_alphas_without_a_gradient_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    backward = launch.backward

    def watched(p: launch.Launch, *args: Any) -> tuple[Tensor, ...]:
        seen.append(p.slopes is not None)
        return backward(p, *args)

    monkeypatch.setattr(launch, "backward", watched)
    q, k, v, weight = _inputs(20, 20)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for learned in (False, True):
        alpha = torch.tensor(MIXED, device=DEVICE, requires_grad=learned)
        out = ops.entmax_attention(*leaves, alpha=alpha, causal=True, backend="triton")
        out.backward(weight.clone())
        assert (alpha.grad is not None) is learned
    assert seen == [False, True]


def test_opcheck() -> None:
    q, k, v = (t.detach().requires_grad_() for t in _inputs(20, 20)[:3])
    alphas = torch.tensor(MIXED, device=DEVICE, requires_grad=True)
    left = 12
    args = (q, k, v, alphas, None, None, None, None, 0.25, left, 0, 2.0, 0.0, 2, True, True)
    opcheck(torch.ops.attnkit.entmax_attention_triton.default, args)


def test_every_tensor_of_alphas_goes_to_the_kernels_and_numbers_near_one_do_not() -> None:
    q, k, v, _ = _inputs(20, 20)
    alphas = torch.tensor(NEAR_ONE, device=DEVICE)
    assert ops.explain("entmax_attention", q, k, v, alpha=alphas, backend="triton").chosen == "triton"
    found = ops.explain("entmax_attention", q, k, v, alpha=1.2, backend="triton")
    assert found.rejected == {"triton": ["alpha below 1.25"]}
