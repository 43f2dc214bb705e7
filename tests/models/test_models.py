"""One suite for every model: finite, cached, padded, packed, generated, saved, trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ATTENTION, DECODERS, ENCODERS, VOCABULARY, boundaries, build, checkpoint_blocks, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from attnkit.models import StateCache

ALL = [*DECODERS, *ENCODERS]
PACKED = [*ATTENTION, *ENCODERS]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ALL)
def test_forward_is_finite_and_depends_on_what_it_may_see(name: str) -> None:
    model, ids = build(name), tokens(2, 11)
    logits = model(ids).logits
    assert logits.shape == (2, 11, VOCABULARY)
    assert logits.isfinite().all()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % (VOCABULARY - 1) + 1
    moved = (model(changed).logits - logits).abs().amax((0, 2)) > 1e-4
    before = name in ENCODERS
    assert moved[5] == before, "the token before the change"
    assert moved[6:8].all()


@pytest.mark.parametrize("name", DECODERS)
def test_cached_is_uncached(name: str) -> None:
    model, ids = build(name), tokens(2, 13)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    out = model(ids[:, :4])
    steps = [out.logits]
    for t in range(4, 13):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    close(torch.cat(steps, 1), whole.logits)
    assert out.past_key_values.get_seq_length() == 13


@pytest.mark.parametrize("name", DECODERS)
def test_chunked_prefill_is_one_shot(name: str) -> None:
    model, ids = build(name), tokens(2, 13)
    cache = None
    chunks = []
    for chunk in ids.split([3, 7, 1, 2], 1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chunks.append(out.logits)
    close(torch.cat(chunks, 1), model(ids).logits)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, ids = build(name), tokens(2, 12)
    real = slice(5, 12) if side == "left" else slice(0, 7)
    mask = torch.zeros_like(ids)
    mask[0], mask[1, real] = 1, 1
    logits = model(ids, attention_mask=mask).logits
    close(logits[0], model(ids[:1]).logits[0])
    close(logits[1, real], model(ids[1:, real]).logits[0])
    ids[1, mask[1] == 0] = 3
    close(model(ids, attention_mask=mask).logits[1, real], logits[1, real])


@pytest.mark.parametrize("name", ATTENTION)
def test_left_padded_generation_is_generation_alone(name: str) -> None:
    model, ids = build(name), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(both[1, 9:], alone[0, 5:])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("with_positions", [False, True])
def test_packed_is_separate(name: str, with_positions: bool) -> None:
    model, lengths = build(name), (5, 1, 9)
    ids = tokens(1, 15)
    positions = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]} if with_positions else {}
    packed = model(ids, **boundaries(*lengths), **positions).logits
    close(packed, torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1))


def _contaminates(model: Any, names: tuple[str, ...] = ()) -> bool:
    """Whether NaN or another embedding in the second of three packed sequences reaches the other two."""
    x = torch.randn(1, 15, 64, generator=torch.Generator().manual_seed(1))
    arguments = boundaries(5, 4, 6)
    outside = [*range(5), *range(9, 15)]
    clean = model(inputs_embeds=x, **arguments).logits
    reached = False
    for value in (torch.nan, 100.0):
        dirty = x.clone()
        dirty[:, 5:9] = value
        reached |= not torch.equal(model(inputs_embeds=dirty, **arguments).logits[:, outside], clean[:, outside])
    return reached


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_do_not_contaminate_each_other(name: str) -> None:
    assert not _contaminates(build(name))


@pytest.mark.parametrize("name", ["dense", "encoder"])
def test_the_contamination_test_notices_lost_boundaries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnkit.modules import attention as module

    original = module.attention

    def broken(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        cu = options["cu_seqlens_q"]
        merged = torch.cat([cu[:2], cu[3:]])  # the second sequence is joined with the third
        return original(q, k, v, **(options | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), merged) | _no_lengths))

    _no_lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"))
    monkeypatch.setattr(module, "attention", broken)
    assert _contaminates(build(name))


@pytest.mark.parametrize("name", PACKED)
def test_padding_may_hold_anything(name: str) -> None:
    model = build(name)
    x = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[:, :3] = 0
    clean = model(inputs_embeds=x, attention_mask=mask).logits
    x[:, :3] = torch.nan
    assert torch.equal(model(inputs_embeds=x, attention_mask=mask).logits[:, 3:], clean[:, 3:])


@pytest.mark.parametrize("name", DECODERS)
def test_generation(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    greedy = model.generate(ids, max_new_tokens=7, do_sample=False)
    again = model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)
    assert torch.equal(greedy, again)
    expected = ids
    for _ in range(7):
        expected = torch.cat([expected, model(expected, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, expected)
    beams = [model.generate(ids, max_new_tokens=7, num_beams=3, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    sampled = []
    for cached in (True, False):
        torch.manual_seed(5)
        sampled.append(model.generate(ids, max_new_tokens=7, do_sample=True, temperature=8.0, use_cache=cached))
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], greedy)


@pytest.mark.parametrize("name", ALL)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(2, 8)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path, local_files_only=True).to_dict()
    assert loaded.config.mixer_types == model.config.mixer_types
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    bare = AutoModel.from_pretrained(tmp_path, local_files_only=True)
    assert type(bare) is type(model.model)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ALL)
def test_built_without_memory_then_loaded(name: str) -> None:
    """What is not a weight must not be lost on the meta device."""
    model, ids = build(name), tokens(1, 8)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


def test_tied_weights_are_one(tmp_path: Path) -> None:
    model = build("tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert build("dense").lm_head.weight is not build("dense").model.embed_tokens.weight


@pytest.mark.parametrize("name", ["dense", "tied", "encoder"])
def test_resized_embeddings(name: str) -> None:
    model, ids = build(name), tokens(1, 6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    logits = model(ids).logits
    assert model.config.vocab_size == logits.shape[-1] == VOCABULARY + 3
    close(logits[..., :VOCABULARY], before)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model, ids = build(name).train(), tokens(2, 7)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            model(ids, labels=ids).loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        return [weight.grad.clone() for weight in model.parameters()]

    plain = gradients()
    calls = []
    for layer in model.model.layers:
        layer.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_blocks(model, use_reentrant=reentrant)
    for found, expected in zip(gradients(), plain, strict=True):
        close(found, expected)
    assert len(calls) == 2 * len(model.model.layers), "every block runs again in the backward pass"


def _qk_ratio(config: Any) -> float:
    return getattr(config, "mlstm", {}).get("qk_ratio", 0.5)


def _mlstm_weights(config: Any) -> float:
    """Queries, keys, values, output gate and output; two gates with biases; the norm."""
    width, heads = config.hidden_size, config.num_attention_heads
    return width * width * (3 + 2 * _qk_ratio(config)) + 2 * heads * (width + 1) + width


@pytest.mark.parametrize("name", ALL)
def test_parameter_count(name: str) -> None:
    """Counted from the configuration alone."""
    model = build(name)
    c, width = model.config, 64
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm = width * (2 if c.norm_type == "layernorm" else 1)
    inner = c.intermediate_size
    mixers = {"test_average": width**2, "test_producer": width**2, "test_consumer": width**2}
    attention = 2 * width * (queries + keys) + c.attention_bias * (queries + 2 * keys + width)
    if getattr(c, "sparse", {}).get("qk_shared"):  # no projection of keys, and a temperature of each head
        attention += c.num_attention_heads - width * keys
    bias = c.attention_bias
    mixers["mlstm"] = mixers["mlstm_sigmoid"] = _mlstm_weights(c) + bias * (width * 3 + 2 * width * _qk_ratio(c))
    mixers["lightning"] = mixers["lightning_nope"] = 5 * width * width + 2 * c.head_dim + width + bias * 5 * width
    mixers["simple_gla"] = 4 * width * width + c.num_attention_heads * (width + 1) + width + bias * 4 * width
    mlps = {
        "swiglu": 3 * width * inner + c.mlp_bias * (2 * inner + width) + norm,
        "mlp": 2 * width * inner + c.mlp_bias * (inner + width) + norm,
        "none": 0,
    }
    total = VOCABULARY * width * (1 if c.tie_word_embeddings else 2) + norm
    for mixer, mlp in zip(c.mixer_types, c.mlp_types, strict=True):
        total += norm + mixers.get(mixer, attention) + mlps[mlp]
        total += c.num_attention_heads if "entmax" in mixer and getattr(c, "entmax_alpha", None) == "learned" else 0
    assert sum(weight.numel() for weight in model.parameters()) == total


def test_caches_hold_what_the_layers_need() -> None:
    model = build("sliding")
    cache = model(tokens(1, 12)).past_key_values
    assert isinstance(cache, DynamicCache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [4, 12, 4]
    cache = build("no_keys")(tokens(1, 12)).past_key_values
    assert isinstance(cache, StateCache)
    assert cache.get_seq_length() == 12
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["dense", "encoder"])
def test_hidden_states_and_tuples(name: str) -> None:
    model, ids = build(name), tokens(1, 5)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_some_logits() -> None:
    model, ids = build("dense"), tokens(2, 9)
    logits = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    index = torch.tensor([1, 7])
    close(model(ids, logits_to_keep=index).logits, logits[:, index])


@pytest.mark.parametrize("name", ["dense", "encoder"])
def test_loss(name: str) -> None:
    model, ids = build(name), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits
    shift = 0 if name == "encoder" else 1
    rows, targets = logits[:, : 9 - shift], labels[:, shift:]
    summed = torch.nn.functional.cross_entropy(rows.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    close(model(ids, labels=labels).loss, summed / int((targets != -100).sum()))
    close(model(ids, labels=labels, num_items_in_batch=40).loss, summed / 40)


def test_packed_loss_is_the_separate_losses() -> None:
    """Also where an empty sequence stands at the end: no target is lost, none crosses a boundary."""
    model, lengths = build("dense"), (5, 1, 6)
    ids = tokens(1, 12)
    alone = sum(model(part, labels=part, num_items_in_batch=1).loss for part in ids.split(lengths, 1) if part.shape[1] > 1)
    close(model(ids, labels=ids, num_items_in_batch=1, **boundaries(*lengths)).loss, alone)
    close(model(ids, labels=ids, num_items_in_batch=1, **boundaries(*lengths, 0)).loss, alone)


@pytest.mark.parametrize("name", ["dense", "sliding"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    model, ids = build(name), tokens(2, 40)
    exact = model(ids).logits
    rounded = model.bfloat16()(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_positions_are_counted_in_every_packed_sequence() -> None:
    model, seen = build("dense"), []
    model.model.rotary.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(tokens(1, 9), **boundaries(4, 0, 5, 0))
    assert seen[0].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["attention", "sliding_attention", "attention_nope", "sliding_attention_nope"])
def test_positions_matter_where_the_name_says_so(kind: str) -> None:
    model, ids = build("dense", mixer_types=kind, sliding_window=4), tokens(1, 9)
    apart = (model(ids, position_ids=2 * torch.arange(9)[None]).logits - model(ids).logits).abs().max()
    assert (apart == 0) == kind.endswith("nope")
    assert (model.model.rotary is None) == kind.endswith("nope")


@pytest.mark.parametrize("name", ["dense", "shared", "no_keys", "encoder"])
def test_gradients_are_differences(name: str) -> None:
    """Along a random direction of all weights, in float64; also through what layers share."""
    model, ids = build(name).double(), tokens(2, 7)
    weights = list(model.parameters())
    draw = torch.Generator().manual_seed(2)
    directions = [torch.randn(weight.shape, generator=draw, dtype=torch.float64) for weight in weights]

    def value() -> Tensor:  # transformers' loss rounds logits to float32
        return model(ids).logits.square().mean()

    def stepped(step: float) -> float:
        for weight, direction in zip(weights, directions, strict=True):
            weight += step * direction
        moved = float(value())
        for weight, direction in zip(weights, directions, strict=True):
            weight -= step * direction
        return moved

    with torch.enable_grad():
        value().backward()
    slope = sum(float((weight.grad * direction).sum()) for weight, direction in zip(weights, directions, strict=True))
    assert slope == pytest.approx((stepped(1e-6) - stepped(-1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("name", ["dense", "encoder"])
def test_compiles_as_one_graph(name: str) -> None:
    model, ids = build(name).model, tokens(1, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for arguments in ({}, boundaries(4, 5)):
        found = compiled(ids, **arguments, **({} if name == "encoder" else {"use_cache": False})).last_hidden_state
        close(found, model(ids, **arguments).last_hidden_state)
