"""Hash attention in whole models, against attention written out under an explicit mask of buckets."""

import copy

import pytest
import torch
from oracles import padded, prompt, special_models
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache

from attnkit._core.errors import OptionError, PolicyError, ShapeError, UnsupportedError
from attnkit.inference import Hashed, Policy, apply, register_hash_attention
from attnkit.modules import LSHHasher
from attnkit.testing import tiny_model

METHOD = Hashed(num_buckets=4, rounds=2, dense_decode=False)


def oracle_logits(model, ids, mask=None, method=METHOD):
    """A copy in float64 whose attention is written out: pairs are weighed by the rounds that they share."""
    model = copy.deepcopy(model).double()
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        hasher = LSHHasher(key.shape[1], key.shape[3], method.num_buckets, rounds=method.rounds, seed=method.seed)
        group = query.shape[1] // key.shape[1]
        mine, theirs = (hasher(t.transpose(1, 2).float()).transpose(2, 3) for t in (query, key))  # [P, B, heads, T]
        theirs = theirs.repeat_interleave(group, 2)
        count = (mine[..., :, None] == theirs[..., None, :]).sum(0)
        order = torch.ones(count.shape[-2:], dtype=torch.bool).tril()
        count = count * order * real[:, None, None] * real[:, None, :, None]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling + count.double().log()
        return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2), None

    AttentionInterface.register("hash_oracle", attention)
    AttentionMaskInterface.register("hash_oracle", lambda **kwargs: None)
    model.set_attn_implementation("hash_oracle")
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


@pytest.fixture
def implementation():
    name = register_hash_attention(num_buckets=4, rounds=2, dense_decode=False)
    yield name
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_policy(family):
    model, ids = tiny_model(family), prompt(2, 40)
    expected = oracle_logits(model, ids)
    with torch.no_grad(), apply(model, Policy(prefill=METHOD)) as h:
        torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-3, atol=1e-4)
        cache, pieces = h.new_cache(), ids.split([17, 1, 22], 1)  # one query too, hashed against the whole cache
        chunks = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(chunks, 1).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(implementation, side):
    model = copy.deepcopy(tiny_model("llama"))
    ids, mask, _ = padded([30, 17], side=side)
    real = mask.bool()
    policy_model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        with apply(policy_model, Policy(prefill=METHOD)):
            policy = policy_model(ids, attention_mask=mask).logits
    expected = oracle_logits(policy_model, ids, mask)
    torch.testing.assert_close(ours[real].double(), expected[real], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(policy[real], ours[real], rtol=1e-5, atol=1e-5)


def test_training_under_its_name(implementation):
    model = copy.deepcopy(tiny_model("llama")).train()
    model.set_attn_implementation(implementation)
    ids = prompt(2, 24)
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].self_attn
    assert all(part.weight.grad.abs().sum() > 0 for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    model.eval()
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    again = [ids]
    with torch.no_grad():
        for _ in range(4):
            again.append(model(torch.cat(again, 1)).logits[:, -1:].argmax(-1))
    assert torch.equal(out, torch.cat(again, 1))


def test_dense_decoding_is_dense():
    model, ids = tiny_model("llama"), prompt(1, 20)
    with torch.no_grad():
        with apply(model, "dense") as h:
            cache = h.new_cache()
            model(ids[:, :-1], past_key_values=cache)
            dense = model(ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits
        with apply(model, Policy(prefill=Hashed(num_buckets=4))):
            assert torch.equal(model(ids[:, -1:], past_key_values=cache).logits, dense)


def test_refusals(implementation):
    for options in ({"num_buckets": 3}, {"num_buckets": 0}, {"rounds": 0}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            Hashed(**options)
    model = copy.deepcopy(tiny_model("llama"))
    model.set_attn_implementation(implementation)
    ids = prompt(1, 10)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="static cache"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=16))
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"packed sequences|neither causal"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]), use_cache=False)
    with torch.no_grad(), pytest.raises(ShapeError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.zeros(1, 1, 10, 10))
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(PolicyError, match="dropout"):
        model.train()(ids)


@pytest.mark.parametrize("model", special_models())
def test_softcap_and_sinks_are_refused(model):
    ids = prompt(1, 10)
    with torch.no_grad(), apply(model, "hash"), pytest.raises(UnsupportedError, match=r"softcap|sinks"):
        model(ids)
