"""The entmax mixer: what it hands on, learned alphas, the schedule, and that it trains."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit import errors, ops
from attnkit.modules import AlphaSchedule, EntmaxAttention, MixerContext, RotaryEmbedding, SoftmaxAttention, rotate


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 1.5, "learned"])
def test_attention(alpha: float | str, causal: bool) -> None:
    layer = EntmaxAttention(64, 4, num_kv_heads=2, window=5, alpha=alpha)
    x, rope = torch.randn(2, 9, 64), RotaryEmbedding(16)(torch.arange(9)[None])
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    out = layer(x, MixerContext(causal=causal, rope=rope, padding=padding))
    q, k, v = (p(x).unflatten(-1, (-1, 16)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    bias = torch.zeros(2, 9).masked_fill(~padding, -torch.inf)
    number = 1.5 if isinstance(alpha, str) else alpha
    window = (4, 0 if causal else 4)
    seen: dict[str, Any] = {"causal": causal, "window_size": window, "key_bias": bias}
    inputs = (rotate(q, *rope), rotate(k, *rope), v)
    plain = ops.attention(*inputs, **seen) if number == 1 else ops.entmax_attention(*inputs, alpha=number, **seen)
    assert (out - layer.o_proj(plain.flatten(2))).abs().max() < 1e-5


def test_weights_fit_those_of_softmax_attention() -> None:
    plain, sparse = SoftmaxAttention(64, 4, rope=False), EntmaxAttention(64, 4, rope=False, alpha=1.0)
    sparse.load_state_dict(plain.state_dict())
    x = torch.randn(1, 7, 64)
    assert torch.equal(plain(x), sparse(x))
    sparse.alpha = 1.5
    assert not torch.allclose(plain(x), sparse(x), atol=1e-4)


def test_learned_alphas_move_and_stay_inside() -> None:
    layer = EntmaxAttention(64, 4, rope=False, alpha="learned")
    assert torch.equal(_values(layer), torch.full((4,), 1.5))
    optimiser = torch.optim.SGD([layer.alpha_logits], lr=10.0)
    layer(torch.randn(2, 12, 64)).square().sum().backward()
    optimiser.step()
    assert (_values(layer) != 1.5).all()
    with torch.no_grad():
        layer.alpha_logits.copy_(torch.tensor([-100.0, 100.0, 0.0, 1.0]))
    assert torch.isfinite(layer(torch.randn(1, 5, 64))).all()
    assert _values(layer)[:2].tolist() == pytest.approx([1.001, 2.0])
    with pytest.raises(errors.OptionError, match="alphas of this layer are learned"):
        layer.alpha = 1.5


def _values(layer: EntmaxAttention) -> Tensor:
    assert isinstance(layer.alpha, Tensor)
    return layer.alpha.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 3.0}, "alpha=3 is outside 1..2"),
        ({"alpha": "free"}, "alpha='free' is not allowed"),
        ({"window": 0}, "window=0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        EntmaxAttention(64, 4, **options)


def test_schedule() -> None:
    model = nn.Sequential(EntmaxAttention(32, 2, rope=False), EntmaxAttention(32, 2, rope=False, alpha="learned"))
    schedule = AlphaSchedule(2.0, warmup_tokens=100)
    seen = []
    for _ in range(5):
        assert schedule.apply(model) == 1
        seen.append(model[0].alpha)
        model(torch.randn(1, 4, 32)).sum().backward()
        schedule.advance(30)
    assert seen == pytest.approx([1.0, 1.3, 1.6, 1.9, 2.0])
    other = AlphaSchedule(1.2, warmup_tokens=7)
    other.load_state_dict(schedule.state_dict())
    assert other.state_dict() == schedule.state_dict()
    assert other.alpha == 2.0
    assert AlphaSchedule(1.5, warmup_tokens=10_000).advance(1) == 1.0
    assert AlphaSchedule(1.5, warmup_tokens=0).alpha == 1.5
    with pytest.raises(errors.OptionError, match="no EntmaxAttention layer"):
        schedule.apply(nn.Linear(2, 2))
    with pytest.raises(errors.OptionError, match="warmup_tokens=-1"):
        AlphaSchedule(warmup_tokens=-1)
    with pytest.raises(errors.OptionError, match="alpha=5 is outside"):
        AlphaSchedule(5.0, warmup_tokens=1)


def test_extra_repr() -> None:
    assert "alpha=1.5" in repr(EntmaxAttention(32, 2))
    assert "alpha=learned" in repr(EntmaxAttention(32, 2, alpha="learned"))
