"""The parts of models against formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.modules import MLP, MixerContext, RotaryEmbedding, SoftmaxAttention, SwiGLU, make_norm, rotate
from attnkit.modules.projection import project

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Channels i and i + D/2 as one complex number, multiplied with exp(i p theta^(-2i/D)), in float64."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    number = number * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag], -1)


def attended(layer: SoftmaxAttention, x: Tensor, seen: Tensor, theta: float | None) -> Tensor:
    """Softmax attention of one row [T, C] with a mask [T, T], written out in float64."""
    x = x.double()
    heads = []
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        bias = None if projection.bias is None else projection.bias.double()
        heads.append(F.linear(x, projection.weight.double(), bias).unflatten(-1, (-1, HEAD_DIM)))
    q, k, v = heads
    if theta:
        q, k = (turned(t, torch.arange(len(x)), theta) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD_DIM)
    out = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)
    bias = None if layer.o_proj.bias is None else layer.o_proj.bias.double()
    return F.linear(out, layer.o_proj.weight.double(), bias)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(causal: bool, window: int | None, rope: bool, bias: bool) -> None:
    layer = SoftmaxAttention(WIDTH, HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=window, rope=rope, bias=bias)
    x = 3 * torch.randn(1, 9, WIDTH)
    rotary = RotaryEmbedding(HEAD_DIM, theta=50.0)
    context = MixerContext(causal=causal, rope=rotary(torch.arange(9)[None]) if rope else None)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = distance >= 0 if causal else torch.ones(9, 9, dtype=torch.bool)
    if window:
        seen &= distance.abs() < window
    expected = attended(layer, x[0], seen, 50.0 if rope else None)
    torch.testing.assert_close(layer(x, context)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_rotation() -> None:
    x, positions = torch.randn(2, 7, 3, 16), torch.tensor([0, 1, 5, 200, 9, 9, 3_000])
    cos, sin = RotaryEmbedding(16, theta=500.0)(positions[None])
    assert cos.shape == sin.shape == (1, 7, 1, 8)
    for row in range(2):
        torch.testing.assert_close(rotate(x, cos, sin)[row].double(), turned(x[row], positions, 500.0), rtol=1e-4, atol=1e-3)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_a_cast_does_not_round_frequencies() -> None:
    positions = torch.tensor([[2_001]])
    rotary = RotaryEmbedding(16)
    before = rotary(positions)[0]
    after = rotary.bfloat16()(positions)[0]
    assert after.dtype == torch.float32
    assert torch.equal(before, after)
    assert not rotary.state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_mlps(bias: bool) -> None:
    x = torch.randn(2, 3, 8)
    gated = SwiGLU(8, 12, bias=bias)
    inner = gated.gate_proj(x) * gated.gate_proj(x).sigmoid() * gated.up_proj(x)
    torch.testing.assert_close(gated(x), gated.down_proj(inner))
    plain = MLP(8, 12, bias=bias)
    up = plain.up_proj(x)
    torch.testing.assert_close(plain(x), plain.down_proj(up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))))
    assert len(list(gated.parameters())) == (6 if bias else 3)
    assert len(list(plain.parameters())) == (4 if bias else 2)


def test_norms() -> None:
    x = torch.randn(2, 8) + 1
    torch.testing.assert_close(make_norm("rmsnorm", 8, 0.1)(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        make_norm("layernorm", 8, 0.1)(x), centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    )


def test_context() -> None:
    context = MixerContext(padding=torch.tensor([[False, True, True], [True, True, True]]))
    bias = context.key_bias(3, torch.float64)
    assert bias is not None
    assert bias.tolist() == [[-math.inf, 0, 0], [0, 0, 0]]
    newest = context.key_bias(2, torch.float32)
    assert newest is not None
    assert newest.tolist() == [[0, 0], [0, 0]]
    assert MixerContext().key_bias(3, torch.float32) is None
    assert MixerContext().read_state(0) is None
    MixerContext().write_state(torch.zeros(1), 0)


def test_joint_projections_are_the_single_ones() -> None:
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    first, second = (nn.Linear(WIDTH, width, bias=False) for width in (16, 24))
    parameters = [x, first.weight, second.weight]
    weights = [torch.randn(2, 5, width) for width in (16, 24)]

    def run(*layers: nn.Module) -> list[Tensor]:
        outs = project(x, *layers)
        return [*outs, *torch.autograd.grad([(o * w).sum() for o, w in zip(outs, weights, strict=True)], parameters)]

    joint, single = run(first, second), run(nn.Sequential(first), nn.Sequential(second))
    for a, b in zip(joint, single, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(project(x, first, second)[1], second(x))


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_projection_are_kept(register: str) -> None:
    layer = SoftmaxAttention(WIDTH, 3, rope=False)
    called: list[str] = []
    getattr(layer.k_proj, register)(lambda *_: called.append("hook"))
    layer(torch.randn(1, 4, WIDTH, requires_grad=True)).sum().backward()
    assert called == ["hook"]


def test_hooks_and_adapters_of_a_projection_are_kept() -> None:
    layer = SoftmaxAttention(WIDTH, 3, rope=False)
    called: list[str] = []
    layer.k_proj.register_forward_hook(lambda *_: called.append("hook"))

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            called.append("adapter")
            return super().forward(x)

    layer.q_proj = Adapter(WIDTH, WIDTH, bias=False)
    layer(torch.randn(1, 4, WIDTH, requires_grad=True))
    assert called == ["adapter", "hook"]


def test_adapters_of_a_projection_are_kept() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain, adapted = nn.Linear(WIDTH, 8, bias=False), Twice(WIDTH, 8, bias=False)
    x = torch.randn(3, WIDTH, requires_grad=True)
    torch.testing.assert_close(project(x, plain, adapted)[1], 2 * x @ adapted.weight.T)
