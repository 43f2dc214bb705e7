"""The lists of tiles that entmax attention's kernels keep: they miss nothing of the support; the backward pass uses them."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import ops
from attnkit._core.triton import interpreted
from attnkit.ops._attention_core._triton import launch
from attnkit.ops.entmax_attention._register import _launch

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cpu" if interpreted() else "cuda"
ROWS, HEADS = 448, 1


def _near(heads: int) -> Tensor:
    """Vectors [1, T, heads, 16] that are alike where their tokens are near."""
    angle = torch.arange(ROWS)[:, None] * torch.linspace(0.008, 0.016, 8)
    points = 0.4 * torch.cat([angle.cos(), angle.sin()], -1)
    return (points[None, :, None] + 0.02 * torch.randn(1, ROWS, heads, 16)).to(DEVICE)


def _run(alpha: float) -> tuple[launch.Launch, Tensor, tuple[Tensor, ...]]:
    """A launch after its forward pass, the probabilities [H, T, S] of float64, and what the backward pass needs."""
    q, k, v = _near(HEADS), _near(HEADS), torch.randn(1, ROWS, HEADS, 16, device=DEVICE)
    p = _launch((q, k, v, None, None, None, None, None, 1.0, -1, 0, 0.0, alpha, 2, False))
    _, tau, second = launch.forward(p, torch.float32)
    scores = torch.einsum("thd,shd->hts", q[0].double(), k[0].double())
    causal = torch.ones(ROWS, ROWS, dtype=torch.bool, device=DEVICE).tril()
    assert second is not None
    return p, ops.entmax(scores.masked_fill(~causal, -torch.inf), alpha), (v, tau, second)


@pytest.mark.parametrize("alpha", [1.5, 1.75, 2.0])
def test_lists_miss_nothing_of_the_support_and_leave_most_out(alpha: float) -> None:
    p, prob, _ = _run(alpha)
    assert p.tiles is not None
    config = p.config("fwd")
    tiles, listed, walked = ROWS // config.block_m, 0, 0
    for pid, (count, *firsts) in enumerate(p.tiles.tolist()):
        head, row = pid // tiles, (tiles - 1 - pid % tiles) * config.block_m
        behind = range(0, (row + 1) // config.block_n * config.block_n, config.block_n)  # what every row of the tile sees
        hit = {key for key in behind if (prob[head, row : row + config.block_m, key : key + config.block_n] > 1e-9).any()}
        assert hit <= set(firsts[:count]) <= set(behind)
        assert sorted(firsts[:count], reverse=True) == firsts[:count]
        listed, walked = listed + count, walked + len(behind)
    assert listed < walked / 2


def test_the_backward_pass_walks_the_lists_of_the_forward_pass() -> None:
    p, _, (v, tau, second) = _run(1.5)
    d_out = torch.randn_like(v)

    def gradients() -> tuple[Tensor, ...]:
        return launch.backward(p, d_out, None, second, tau, None, False)[:3]

    whole, lists = gradients(), p.tiles
    assert lists is not None
    p.tiles = None
    for one, other in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    p.tiles = lists.clone()
    p.tiles[:, 0] = 0
    apart = [float((one - other).abs().max()) for one, other in zip(gradients(), whole, strict=True)]
    assert min(apart) > 1e-2, apart


def test_the_operator_hands_its_lists_to_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    backward = launch.backward

    def watched(p: launch.Launch, *args: object) -> tuple[Tensor, ...]:
        seen.append(p.tiles)
        return backward(p, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "backward", watched)
    q, k, v = (t.requires_grad_() for t in (_near(HEADS), _near(HEADS), _near(HEADS)))
    out = ops.entmax_attention(q, k, v, causal=True, scale=1.0, backend="triton")
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    (lists,) = seen
    assert lists is not None
    assert lists.shape[0] == HEADS * ROWS // 64


def test_lists_longer_than_threads_gather_at_a_time() -> None:
    """More tiles than a number has bits; the highest scores in the middle, the next at either end, nothing between."""
    rows, keys = 32, 1500
    q = torch.ones(1, rows, 1, 16, device=DEVICE)
    score = torch.full((keys,), -9.0, device=DEVICE)
    score[700:702], score[3], score[-40] = 2.0, 1.5, 1.6
    k = (score / 16)[None, :, None, None].expand(1, keys, 1, 16) + 0.001 * torch.randn(1, keys, 1, 16, device=DEVICE)
    v = torch.randn(1, keys, 1, 16, device=DEVICE)
    p = _launch((q, k, v, None, None, None, None, None, 1.0, -1, -1, 0.0, 1.5, 2, False))
    out, _, _ = launch.forward(p, torch.float32)
    prob = ops.entmax(torch.einsum("bthd,bshd->bts", q.double(), k.double()), 1.5)
    assert (out[:, :, 0] - prob @ v[:, :, 0].double()).abs().max() < 1e-5
    assert p.tiles is not None
    assert p.tiles.shape[1] > 33
    size = p.config("fwd").block_n
    wanted = [key // size * size for key in (keys - 40, 700, 3)]
    for count, *firsts in p.tiles.tolist():
        assert firsts == wanted + [0] * (len(firsts) - 3)
        assert count == 3


def test_opcheck() -> None:
    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (40, 130, 130))
    args = (q, k, v, None, None, None, None, None, 0.5, -1, 0, 0.0, 1.5, 2, False, True)
    opcheck(torch.ops.attnkit.entmax_attention_triton.default, args)
