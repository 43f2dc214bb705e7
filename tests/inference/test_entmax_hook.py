"""Entmax as an attention implementation of transformers: padding, windows, caches, training, refusals."""

import pytest
import torch
from transformers import BertConfig, BertModel, StaticCache

from attnkit import ops
from attnkit._core.errors import UnsupportedError
from attnkit.inference import compat, register_entmax
from attnkit.testing import FAMILIES, tiny_model


@pytest.fixture(autouse=True)
def _registered():
    register_entmax()
    yield
    compat.unregister("entmax")


def entmax_model(family, alpha=1.5, **options):
    model = tiny_model(family, **options)
    model.set_attn_implementation("entmax")
    model.config.entmax_alpha = alpha
    return model


def prompt(rows=2, length=12):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_is_the_model_itself(family):
    """With padding on the left, windows (gemma3) and grouped heads."""
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    wanted = tiny_model(family)(ids, attention_mask=mask).logits
    model = entmax_model(family, 1.0)
    found = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert (found - wanted)[real].abs().max() < 1e-4
    model.config.entmax_alpha = 1.5
    assert (model(ids, attention_mask=mask).logits - wanted)[real].abs().max() > 1e-4


def test_layers_call_the_operator(monkeypatch):
    calls = []
    plain = ops.entmax_attention
    monkeypatch.setattr(ops, "entmax_attention", lambda *args, **options: calls.append(options) or plain(*args, **options))
    entmax_model("gemma3", 1.25)(prompt())
    assert [call["window_size"] for call in calls] == [(6, 0), None, None]
    assert all(call["alpha"] == 1.25 and call["causal"] and call["key_bias"] is None for call in calls)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_kept(side):
    model, ids = entmax_model("llama"), prompt(1, 9)
    alone = model(ids).logits
    padded, mask = torch.full((2, 14), 7), torch.zeros(2, 14, dtype=torch.long)
    place = slice(5, 14) if side == "left" else slice(0, 9)
    padded[0, place], mask[0, place] = ids[0], 1
    padded[1], mask[1] = 9, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits
    assert (found[0, place] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_with_a_cache_is_the_model_without(family):
    model, ids = entmax_model(family), prompt(1, 10)
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_encoders_see_both_sides():
    config = BertConfig(vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    config.attention_probs_dropout_prob = 0.0
    model = BertModel(config).eval()
    ids, mask = prompt(), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    wanted = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("entmax")
    config.entmax_alpha = 1.0
    found = model(ids, attention_mask=mask).last_hidden_state
    assert (found - wanted)[mask.bool()].abs().max() < 1e-5


def test_it_trains():
    model, ids = entmax_model("llama").train(), prompt()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_refusals():
    ids = prompt()
    with pytest.raises(UnsupportedError, match=r"attention dropout 0\.1 is on"):
        entmax_model("llama", attention_dropout=0.1).train()(ids)
    model = entmax_model("llama")
    with pytest.raises(UnsupportedError, match="attention_mask has 4 dimensions"):
        model(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 2)
    with pytest.raises(UnsupportedError, match="neither causal nor bidirectional"):
        model(ids, position_ids=packed, use_cache=False)
    cache = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(UnsupportedError, match="a static cache"):
        model(ids, past_key_values=cache)
    module, q = model.model.layers[0].self_attn, torch.zeros(2, 4, 12, 16)
    attention, build = compat.AttentionInterface()["entmax"], compat.AttentionMaskInterface()["entmax"]
    mask = build(batch_size=2, q_length=12, kv_length=12, mask_function=lambda b, h, q, k: k >= 0)
    with pytest.raises(UnsupportedError, match="attention module asks for"):
        attention(module, q, q, q, mask)
    with pytest.raises(UnsupportedError, match="sinks are logits of a softmax"):
        attention(module, q, q, q, None, s_aux=torch.zeros(4))
