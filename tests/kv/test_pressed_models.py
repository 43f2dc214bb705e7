"""Models with compressed caches against the same models reading everything with a mask over what was dropped."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from attnkit import inference, kv
from attnkit._core.errors import InputError, OptionError, PolicyError
from attnkit.testing import tiny_model

PROMPT, MORE = 40, 45
SPECS = ["knorm", "adakv:knorm", "streaming_llm", "random"]


def ids_of(batch=2, length=PROMPT + MORE, pads=(0, 7)):
    torch.manual_seed(1)
    ids = torch.randint(1, 61, (batch, length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads[:batch]):
        ids[row, :pad] = 0
        mask[row, :pad] = 0
    return ids, mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def run(model, policy, ids, mask, pieces, **options):
    """Logits of what follows the prompt, read in passes of these lengths, and the cache."""
    with torch.no_grad(), inference.apply(model, policy) as h:
        cache = h.new_cache(**options)
        done, outs, held = 0, [], None
        for piece in pieces:
            end = done + piece
            step = {"attention_mask": mask[:, :end], "position_ids": positions_of(mask)[:, done:end], "past_key_values": cache}
            outs.append(model(ids[:, done:end], **step).logits)
            done = end
            if done == PROMPT:
                held = [(layer.view().positions, layer.view().real) for layer in cache.kv_layers]
        return torch.cat(outs, 1)[:, PROMPT:], cache, held


def masked(model, ids, mask, held):
    """The same logits from one pass over everything, in which later queries miss what each head has dropped."""
    total = ids.shape[1]
    keep = {}
    full = [index for index, layer in enumerate(kv.KVCache(model.config).layers) if isinstance(layer, kv.KVLayer)]
    for index, (positions, real) in zip(full, held, strict=True):
        kept = torch.zeros(*real.shape[:2], total, dtype=torch.bool)
        for row in range(real.shape[0]):
            for head in range(real.shape[1]):
                kept[row, head, positions.expand_as(real)[row, head, real[row, head]]] = True
        keep[index] = kept

    def attention(module, q, k, v, attention_mask, *, scaling, sliding_window=None, **_):
        groups = q.shape[1] // k.shape[1]
        place = torch.arange(total)
        seen = (place <= place[:, None])[None, None] & mask[:, None, None].bool()
        if sliding_window is not None:
            seen = seen & (place > place[:, None] - sliding_window)
        seen = seen.expand(q.shape[0], k.shape[1], -1, -1)
        if module.layer_idx in keep:
            later = (place >= PROMPT)[:, None] & (place < PROMPT)
            seen = seen & (~later | keep[module.layer_idx][:, :, None])
        scores = q.double() @ k.double().repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        weights = scores.masked_fill(~seen.repeat_interleave(groups, 1), -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v.double().repeat_interleave(groups, 1)).to(q.dtype).transpose(1, 2), None

    AttentionInterface.register("kv_oracle", attention)
    AttentionMaskInterface.register("kv_oracle", lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("kv_oracle")
    try:
        with torch.no_grad():
            return model(ids, position_ids=positions_of(mask), use_cache=False).logits[:, PROMPT:]
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("pieces", [(PROMPT, *[1] * MORE), (PROMPT, 20, 1, 1, 3, 20)])
def test_a_compressed_model_is_the_model_that_masks_what_was_dropped(family, spec, pieces):
    model = tiny_model(family)
    ids, mask = ids_of()
    got, cache, held = run(model, inference.Policy(cache=kv.press(spec, ratio=0.6)), ids, mask, pieces)
    assert not torch.allclose(got, run(model, "dense", ids, mask, pieces)[0], atol=1e-4)  # something was dropped
    torch.testing.assert_close(got, masked(model, ids, mask, held), atol=2e-5, rtol=1e-4)
    lengths = torch.stack([real.sum(-1) for _, real in held])
    real = mask[:, :PROMPT].sum(-1)
    assert torch.equal(lengths.sum(-1), (real * 0.4).long().expand(len(held), 2) * lengths.shape[-1])
    assert cache.get_seq_length() == PROMPT + MORE


@pytest.mark.parametrize("spec", SPECS)
def test_ratio_0_changes_nothing(spec):
    model = tiny_model("llama")
    ids, mask = ids_of(length=PROMPT)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with inference.apply(model, "dense"):
        plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    with inference.apply(model, inference.Policy(cache=kv.press(spec, ratio=0))) as h:
        pressed = model.generate(ids, past_key_values=h.new_cache(), **options)
    assert torch.equal(plain.sequences, pressed.sequences)
    assert all(map(torch.equal, plain.logits, pressed.logits))


@pytest.mark.parametrize("spec", SPECS)
def test_ratio_0_is_the_model_as_it_was(spec):
    model = tiny_model("llama")
    ids, _ = ids_of(length=PROMPT, pads=(0, 0))
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    stock = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    with inference.apply(model, inference.Policy(cache=kv.press(spec, ratio=0))) as h:
        pressed = model.generate(ids, past_key_values=h.new_cache(), **options)
    assert torch.equal(stock.sequences, pressed.sequences)
    assert all(map(torch.equal, stock.logits, pressed.logits))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "random"])  # whose numbers go by place in the batch
def test_a_row_alone_is_the_row_in_a_padded_batch(spec):
    model = tiny_model("llama")
    ids, mask = ids_of()
    policy = inference.Policy(cache=kv.press(spec, ratio=0.5))
    both = run(model, policy, ids, mask, (PROMPT, *[1] * MORE))[0]
    with torch.no_grad(), inference.apply(model, policy) as h:
        cache = h.new_cache()
        alone = [model(ids[1:, 7:PROMPT], past_key_values=cache).logits]
        alone += [model(ids[1:, place : place + 1], past_key_values=cache).logits for place in range(PROMPT, PROMPT + MORE)]
    torch.testing.assert_close(torch.cat(alone, 1)[:, PROMPT - 7 :], both[1:], atol=2e-5, rtol=1e-4)


def test_a_context_may_come_in_several_passes():
    model = tiny_model("llama")
    ids, mask = ids_of()
    policy = inference.Policy(cache=kv.press("adakv:knorm", ratio=0.5))
    rest = [1] * MORE
    whole = run(model, policy, ids, mask, (PROMPT, *rest))[0]
    parts = run(model, policy, ids, mask, (15, 1, PROMPT - 16, *rest), context=PROMPT)[0]
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)
    with pytest.raises(InputError, match="beyond the context of 40 tokens"):
        run(model, policy, ids, mask, (PROMPT + 1,), context=PROMPT)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples(options):
    model = tiny_model("llama")
    ids, mask = ids_of(length=PROMPT)
    with inference.apply(model, inference.Policy(cache=kv.press("adakv:knorm", ratio=0.5))) as h:
        cache = h.new_cache()
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **options)
        assert out.shape[1] == PROMPT + 40
        pools = [layer.pages.store.pool for layer in cache.kv_layers]
        cache.reset()
        assert [pool.used for pool in pools] == [0, 0]


def test_cropping_after_compression_restores():
    model = tiny_model("llama")
    ids, _ = ids_of(pads=(0, 0))
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=kv.press("adakv:knorm", ratio=0.5))) as h:
        cache = h.new_cache()
        model(ids[:, :PROMPT], past_key_values=cache)
        twin = cache.clone()
        expected = model(ids[:, PROMPT : PROMPT + 3], past_key_values=twin).logits
        for _ in range(2):
            model(ids[:, PROMPT : PROMPT + 40], past_key_values=cache)
            cache.crop(-40)
            again = model(ids[:, PROMPT : PROMPT + 3], past_key_values=cache).logits
            torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
            cache.crop(-3)
        with pytest.raises(PolicyError, match=r"goes back to 39 tokens, but adakv:knorm@0\.5 has dropped keys"):
            cache.crop(-1)


def test_decoding_keeps_the_cache_small():
    model = tiny_model("llama")
    ids, mask = ids_of(length=PROMPT)
    for spec, most in (("decode:knorm", 28), ("adakv:decode:knorm", 28)):
        press = kv.press(spec, interval=8, target=20)
        with inference.apply(model, inference.Policy(cache=press)) as h:
            cache = h.new_cache()
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, do_sample=False)
            lengths = [layer.pages.store.lengths for layer in cache.kv_layers]
            assert all(int(length.sum()) <= most * length.numel() for length in lengths)


@dataclass(frozen=True)
class Shared:
    """A budget that waits for all layers, and says how often it was asked."""

    asked: list = field(hash=False, compare=False)

    def share(self, contexts, scores, kept):
        self.asked.append(contexts[0].seen)
        return kept


def test_a_budget_over_layers_is_asked_once_an_interval():
    model = tiny_model("llama")
    ids, mask = ids_of(length=PROMPT, pads=(0, 0))
    budget = Shared([])
    press = replace(kv.press("decode:knorm", interval=8, target=20), budget=budget)
    with inference.apply(model, inference.Policy(cache=press)) as h:
        model.generate(ids, attention_mask=mask, past_key_values=h.new_cache(), max_new_tokens=30, do_sample=False)
    assert budget.asked == [PROMPT + 8, PROMPT + 16, PROMPT + 24]


@pytest.mark.parametrize(("spec", "kept"), [("tova", None), ("decode:tova", 12)])
def test_queries_are_kept_while_decoding_only_for_who_asks_for_them_then(spec, kept):
    model = tiny_model("llama")
    ids, mask = ids_of(length=PROMPT)
    press = kv.press(spec)
    with inference.apply(model, inference.Policy(cache=press)) as h:
        cache = h.new_cache()
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=13, do_sample=False)
    queries = [layer.notes[press].queries for layer in cache.kv_layers]
    assert [None if held is None else held.shape[2] for held in queries] == [kept, kept]


def test_a_foreign_attention_reads_even_heads_and_is_refused_ragged_ones():
    model = tiny_model("llama")
    ids, _ = ids_of(pads=(0, 0))
    for spec in ("knorm", "adakv:knorm"):
        with torch.no_grad():
            with inference.apply(model, inference.Policy(cache=kv.press(spec, ratio=0.5))) as h:
                cache = h.new_cache()
                model(ids[:, :PROMPT], past_key_values=cache)
                twin = cache.clone()
                expected = model(ids[:, PROMPT : PROMPT + 1], past_key_values=twin).logits
            if spec == "knorm":
                got = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
            else:
                with pytest.raises(PolicyError, match="hold different numbers of tokens"):
                    model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)


def test_messages():
    model = tiny_model("llama")
    ids, _ = ids_of(pads=(0, 0))
    with pytest.raises(OptionError, match="ratio=1 is not allowed; it is the fraction removed"):
        kv.press("knorm", ratio=1)
    with pytest.raises(OptionError, match="'streaming_llm' has no option 'sinks'; it has sink"):
        kv.press("streaming_llm", sinks=3)
    with pytest.raises(OptionError, match="cannot be told apart"):
        kv.press("knorm+decode:knorm", target=3)
    with inference.apply(model, inference.Policy(cache="knorm")) as h:
        with pytest.raises(PolicyError, match="a DynamicCache cannot be compressed; pass h"):
            model(ids, past_key_values=DynamicCache(config=model.config))
        cache = h.new_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
    other = inference.apply(model, inference.Policy(cache="random"))
    with torch.no_grad(), other, pytest.raises(PolicyError, match="needs a cache of its own"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("spec", ["rerotate:knorm", "rerotate:kvzip", "decode:rerotate:knorm"])
def test_keys_are_not_turned_over_padding_between_tokens(spec):
    model = tiny_model("llama")
    ids, _ = ids_of(pads=(0, 0))
    options = {"interval": 2, "target": 20} if spec.startswith("decode") else {}
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=kv.press(spec, **options))) as h:
        for holes, refused in (
            (slice(0, 5), False),
            (slice(PROMPT - 5, PROMPT), spec.startswith("decode")),
            (slice(9, 12), True),
        ):
            mask = torch.ones(2, PROMPT, dtype=torch.long)
            mask[1, holes] = 0
            cache = h.new_cache()
            with pytest.raises(PolicyError, match="padding between real tokens") if refused else nullcontext():
                for part in (ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 2]):
                    mask = mask if part.shape[1] == PROMPT else torch.cat([mask, torch.ones_like(part)], 1)
                    model(part, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(("codec", "error"), [("raw", 1e-5), ("int8", 0.02), ("int4", 0.3), ("fp8", 0.12)])
@pytest.mark.parametrize("spec", ["dense", "adakv:knorm"])
def test_codecs_are_close_to_what_they_store(codec, error, spec):
    model = tiny_model("llama")
    ids, mask = ids_of()
    policy = spec if spec == "dense" else inference.Policy(cache=kv.press(spec, ratio=0.5))
    pieces = (PROMPT, 20, *[1] * (MORE - 20))
    plain, _, _ = run(model, policy, ids, mask, pieces)
    coded, cache, _ = run(model, policy, ids, mask, pieces, codec=codec, page_size=16)
    assert all(layer.pages is not None for layer in cache.kv_layers)
    difference = float((coded - plain).square().mean().sqrt() / plain.std())
    assert difference <= error
    assert (difference > 1e-4) is (codec != "raw")
