"""The layers with recurrent states: what they compute, and that models of them learn."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit import errors, ops
from attnkit.models import PRESETS, AttnkitDecoderForCausalLM
from attnkit.modules import GroupNormGate, LightningAttention, MixerContext, MLSTMLayer, RotaryEmbedding, SimpleGLA


def test_mlstm_layer_is_its_formula() -> None:
    """Of xLSTM-7B: capped gates, LayerNorm of each head, a sigmoid gate on the output."""
    layer = MLSTMLayer(32, 4, igate_bias_init=-0.5, gate_soft_cap=2.0).double()
    with torch.no_grad():
        layer.head_norm.add_(0.3 * torch.randn(32))
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert (q.shape[-1], v.shape[-1]) == (4, 8)
    i, f = (
        2 * torch.tanh((p(x) + b) / 2) for p, b in ((layer.igate_proj, layer.igate_bias), (layer.fgate_proj, layer.fgate_bias))
    )
    h, _ = ops.mlstm_recurrent(q, k, v, i, f)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    wanted = layer.o_proj(torch.sigmoid(layer.ogate_proj(x)) * h.flatten(-2) * layer.head_norm)
    assert (layer(x) - wanted).abs().max() < 1e-12


def test_gates_stay_in_float32_and_begin_as_published() -> None:
    layer = MLSTMLayer(32, 4)
    assert torch.equal(layer.igate_bias, torch.full((4,), -10.0))
    assert torch.equal(layer.fgate_bias, torch.linspace(3, 6, 4))
    i, f = layer.bfloat16().gates(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert i.dtype == f.dtype == torch.float32
    assert i.abs().max() <= 15
    config = PRESETS["decoder-tiny"](mixer_types="mlstm")
    begun = AttnkitDecoderForCausalLM(config).model.layers[1].mixer
    assert torch.equal(begun.fgate_bias, torch.linspace(3, 6, 4)), "a model draws weights anew"
    assert torch.equal(begun.igate_bias, torch.full((4,), -10.0))


def test_lightning_layer_is_its_formula() -> None:
    layer = LightningAttention(32, 2, layer_idx=1, num_layers=4, norm_groups=4).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    cos, sin = (t.double() for t in RotaryEmbedding(16)(torch.arange(11)[None]))
    q, k, v = (p(x).unflatten(-1, (2, 16)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (F.rms_norm(t, (16,), eps=1e-6) for t in (q, k))
    half_cos, half_sin = (t.double() for t in RotaryEmbedding(8)(torch.arange(11)[None]))  # of half the channels
    q, k = (
        torch.cat([a * half_cos - b * half_sin, b * half_cos + a * half_sin, rest], -1)
        for a, b, rest in (t.split([4, 4, 8], -1) for t in (q, k))
    )
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64) * (1 - 1 / 3 + 1e-5)
    h, _ = ops.scalar_decay_attention(q, k, v, (-slopes).expand(2, 11, 2), backend="reference")
    h = F.rms_norm(h.flatten(-2).unflatten(-1, (4, 8)), (8,), eps=1e-6).flatten(-2)
    wanted = layer.o_proj(h * torch.sigmoid(layer.gate_proj(x)))
    assert (layer(x, MixerContext(rope=(cos, sin))) - wanted).abs().max() < 1e-7  # slopes are float32


def test_simple_gla_layer_is_its_formula() -> None:
    """A log decay for each token and head, RMSNorm of each head, a SiLU gate on the output."""
    layer = SimpleGLA(32, 4, gate_logit_normalizer=2.0).double()
    with torch.no_grad():
        layer.head_norm.add_(0.3 * torch.randn(32))
        layer.fgate_bias.add_(torch.randn(4))
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert (q.shape[-1], v.shape[-1]) == (4, 8)
    keep = torch.sigmoid(layer.fgate_proj(x) + layer.fgate_bias).sqrt()  # [B, T, H]
    state, rows = torch.zeros(2, 4, 4, 8, dtype=torch.float64), []
    for t in range(11):
        state = keep[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2) / 2)  # 1 / sqrt(4)
    h = torch.stack(rows, 1)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = layer.gate_proj(x)
    wanted = layer.o_proj(gate * torch.sigmoid(gate) * h.flatten(-2) * layer.head_norm)
    assert (layer(x) - wanted).abs().max() < 1e-12
    assert layer.bfloat16().log_decay(x.bfloat16()).dtype == torch.float32


def test_group_norm_gate_in_one_group_is_a_norm() -> None:
    norm = GroupNormGate(12, 1)
    x, gate = torch.randn(3, 12), torch.randn(3, 12)
    assert torch.allclose(norm(x, gate), F.rms_norm(x, (12,), eps=1e-6) * torch.sigmoid(gate), atol=1e-6)


@pytest.mark.parametrize("mixer", ["mlstm", "mlstm_sigmoid", "lightning", "lightning_nope", "simple_gla"])
def test_a_model_learns_and_its_state_does_not_grow(mixer: str) -> None:
    """Thirty steps on a text that repeats; then greedy generation from the state is generation without a cache."""
    torch.manual_seed(1)
    config = PRESETS["decoder-tiny"](mixer_types=mixer, mlstm={"igate_bias_init": None})
    model = AttnkitDecoderForCausalLM(config)
    text = (torch.arange(240) % 11 + 1).view(4, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    prompt = text[:1, :9]
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))
    with torch.no_grad():
        sizes = [_bytes(model(text[:, :length]).past_key_values) for length in (5, 60)]
    assert sizes[0] == sizes[1] > 0


def _bytes(cache: Any) -> int:
    return sum(layer.recurrent_states[0].nbytes for layer in cache.layers)


@pytest.mark.parametrize("mixer", ["mlstm", "lightning", "simple_gla"])
def test_gradients_through_a_cached_prefix(mixer: str) -> None:
    """A cache writes states in place; what the first half of a sequence is owed must still be right."""
    torch.manual_seed(2)
    config = PRESETS["decoder-tiny"](mixer_types=mixer, num_hidden_layers=1, mlstm={"igate_bias_init": 0.0})
    model, ids = AttnkitDecoderForCausalLM(config).eval(), torch.randint(1, 64, (1, 10))

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), tuple(model.parameters())))

    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    split = gradients(torch.cat([first.logits, second.logits], 1))
    for a, b in zip(split, gradients(model(ids, use_cache=False).logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Kept:
    """A cache of one layer that only remembers what is written."""

    def __init__(self) -> None:
        self.layers = [SimpleNamespace(recurrent_states={0: None}, is_recurrent_states_initialized={0: False})]
        self.state: Tensor = torch.empty(0)

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        self.state = state


@pytest.mark.parametrize(
    "layer",
    [MLSTMLayer(32, 4, igate_bias_init=-3.0), LightningAttention(32, 4, rope=False), SimpleGLA(32, 4)],
    ids=["mlstm", "lightning", "simple_gla"],
)
def test_padding_anywhere_leaves_the_state_as_it_is(layer: Any) -> None:
    """Before, between and behind real tokens: nothing is put in, and nothing forgotten meanwhile."""
    real = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]]).bool()
    x = torch.randn(1, 11, 32).masked_fill(~real[..., None], torch.nan)
    padded, plain = Kept(), Kept()
    out = layer(x, MixerContext(cache=padded, padding=real))
    wanted = layer(x[:, real[0]], MixerContext(cache=plain))
    torch.testing.assert_close(out[:, real[0]], wanted)
    torch.testing.assert_close(padded.state, plain.state)


@pytest.mark.parametrize("options", [{"chunk_size": 16}, {"gate_soft_cap": math.inf}, {"input_gate": "sigmoid"}])
def test_options_of_the_mlstm_layer(options: dict[str, Any]) -> None:
    layer = MLSTMLayer(32, 4, igate_bias_init=0.0, **options)
    x = torch.randn(1, 40, 32, requires_grad=True)
    assert torch.autograd.grad(layer(x).square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("no multiple of 3 heads", lambda: MLSTMLayer(32, 3)),
        ("qk_ratio makes 12.8 channels", lambda: MLSTMLayer(32, 4, qk_ratio=0.4)),
        ("gate_soft_cap=0 must be positive", lambda: MLSTMLayer(32, 4, gate_soft_cap=0)),
        ("chunk_size=20 must be", lambda: MLSTMLayer(32, 4, chunk_size=20)),
        ('normalize=False with input_gate="exp"', lambda: MLSTMLayer(32, 4, normalize=False)),
        ("rotary_share=0.3 must be", lambda: LightningAttention(32, 4, rotary_share=0.3)),
        ("32 channels are no multiple of 5 groups", lambda: LightningAttention(32, 4, norm_groups=5)),
        ("gate_logit_normalizer=0 must be positive", lambda: SimpleGLA(32, 4, gate_logit_normalizer=0)),
        ("qk_ratio makes 12.8 channels", lambda: SimpleGLA(32, 4, qk_ratio=0.4)),
        ("context.rope is missing", lambda: LightningAttention(32, 4)(torch.ones(1, 2, 32))),
        (
            "mlstm has no option 'ratio'",
            lambda: AttnkitDecoderForCausalLM(PRESETS["decoder-tiny"](mixer_types="mlstm", mlstm={"ratio": 1})),
        ),
    ],
)
def test_refusals(message: str, build: Any) -> None:
    with pytest.raises(errors.InputError, match=message):
        build()


def test_a_state_of_another_batch_is_refused() -> None:
    layer = MLSTMLayer(32, 4)
    cached = SimpleNamespace(
        recurrent_states={0: torch.zeros(3, 4 * (4 * 8 + 4 + 1))}, is_recurrent_states_initialized={0: True}
    )
    context = MixerContext(cache=SimpleNamespace(layers=[cached], update_recurrent_state=lambda *_: None))
    with pytest.raises(errors.ShapeError, match=r"initial_state\.S has shape \(3, 4, 4, 8\)"):
        layer(torch.randn(2, 5, 32), context)
