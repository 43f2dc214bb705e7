"""Learned methods, patterns and second readings in whole models."""

import pytest
import torch
from learned_files import learned
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from attnkit import inference, kv
from attnkit._core.errors import InputError, OptionError, PolicyError, ShapeError, UnsupportedArchitecture
from attnkit.inference import calibrate
from attnkit.kv.projection import output_norms
from attnkit.kv.scorers.gates import FastKVzip, KVzap
from attnkit.testing import tiny_model

SPECS = {
    "kvzip": {"chunk": 13},
    "kvzip_plus": {"chunk": 13, "prompt_ids": (3, 4), "suffix_ids": (7,)},
    "kvcompose": {},
    "kvgrad": {"chunk": 13},
    "duo_attention": {"sink": 2, "recent": 6},
    "simlayerkv": {"initial": 2, "recent": 8, "lazy": 0.2},
    "criticalkv:snapkv": {"window": 6},
    "attention_matching": {"window": 20},
}


def row(length, seed):
    return torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch(rows, right=False):
    size = max(map(len, rows))
    pads = [[0] * (size - len(ids)) for ids in rows]
    ids = [[*ids, *pad] if right else [*pad, *ids] for ids, pad in zip(rows, pads, strict=True)]
    mask = [[1] * len(ids) + pad if right else pad + [1] * len(ids) for ids, pad in zip(rows, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def prefill(model, made, ids, mask=None, *, counted=False, **options):
    """The cache after the prefill, and the logits of the two tokens that follow."""
    with inference.apply(model, inference.Policy(cache=made)) as h:
        cache = h.new_cache(**options)
        mask = torch.ones_like(ids) if mask is None else mask
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, past_key_values=cache, **({"position_ids": places} if counted else {}))
        views = [layer.view() for layer in cache.kv_layers]
        held = [(view.positions.expand(view.shape), view.real.expand(view.shape)) for view in views]
        more = torch.full((ids.shape[0], 2), 9)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        after = {"position_ids": (mask.cumsum(-1) - 1)[:, -2:]} if counted else {}
        return cache, held, model(more, attention_mask=mask, past_key_values=cache, **after).logits


def places_of(held, row, mask):
    """[layer][head]: the places, among the row's real tokens, of those that stay."""
    rank = mask[row].cumsum(-1) - 1
    return [
        [rank[positions[row, head][real[row, head]].long()].tolist() for head in range(positions.shape[1])]
        for positions, real in held
    ]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_row_alone_keeps_what_it_keeps_in_a_padded_batch(spec, family, counted):
    model = tiny_model(family)
    made = kv.press(spec, **SPECS[spec])
    rows = [row(40, 1), row(29, 2)]
    with torch.no_grad():
        ids, mask = batch(rows)
        _, held, logits = prefill(model, made, ids, mask, counted=counted)
        dropped = 0
        for place, own in enumerate(rows):
            _, alone, expected = prefill(model, made, torch.tensor([own]), counted=counted)
            found = places_of(held, place, mask)
            assert found == places_of(alone, 0, torch.ones(1, len(own), dtype=torch.long))
            torch.testing.assert_close(logits[place], expected[0], rtol=1e-4, atol=1e-4)
            dropped += sum(len(own) - len(head) for layer in found for head in layer)
        assert dropped > 0


@pytest.mark.parametrize("spec", ["kvzip", "kvzip_plus", "kvcompose", "kvgrad"])
def test_right_padding_does_not_disturb_a_second_reading(spec):
    model = tiny_model("llama")
    rows = [row(40, 1), row(29, 2)]
    with torch.no_grad():
        ids, mask = batch(rows, right=True)
        _, held, _ = prefill(model, kv.press(spec, **SPECS[spec]), ids, mask, counted=True)
        _, alone, _ = prefill(model, kv.press(spec, **SPECS[spec]), torch.tensor([rows[1]]), counted=True)
    assert places_of(held, 1, mask) == places_of(alone, 0, torch.ones(1, 29, dtype=torch.long))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spec", ["kvzip_plus", "kvcompose", "kvgrad"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_reading_leaves_the_first_as_it_was(spec, mode, family):
    model = tiny_model(family)
    ids = torch.tensor([row(40, 1)])
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=plain)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    with mode():
        cache, held, _ = prefill(model, kv.press(spec, **SPECS[spec]), ids)
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert cache.get_seq_length() == 42
    checked = 0
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        if not isinstance(layer, kv.KVLayer):
            assert layer.keys.shape[2] == min(42, model.config.sliding_window - 1)
            continue
        stored = layer.view()
        checked += 1
        assert layer.listener is None
        real, positions = stored.real.expand(stored.shape), stored.positions.expand(stored.shape)
        for head in range(stored.shape[1]):
            old = real[0, head] & (positions[0, head] < 40)
            assert 4 <= old.sum() < 40
            torch.testing.assert_close(stored.keys[0, head, old], other.keys[0, head, positions[0, head, old].long()])
    assert checked == len(held)


def test_a_codec_waits_for_the_second_reading():
    model = tiny_model("llama")
    ids = torch.tensor([row(40, 1)])
    with torch.no_grad():
        _, held, _ = prefill(model, kv.press("kvzip", chunk=13), ids)
        cache, coded, _ = prefill(model, kv.press("kvzip", chunk=13), ids, codec="int8")
    ones = torch.ones_like(ids)
    assert places_of(held, 0, ones) == places_of(coded, 0, ones)
    assert all(layer.pages.store.pool.codec.__class__.__name__ == "IntN" for layer in cache.kv_layers)


def test_a_second_reading_needs_the_tokens_of_a_whole_context():
    model = tiny_model("llama")
    ids = torch.tensor([row(40, 1)])
    policy = inference.Policy(cache=kv.press("kvzip"))
    with torch.no_grad(), inference.apply(model, policy) as h:
        with pytest.raises(PolicyError, match="needs its tokens; pass input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=h.new_cache())
        cache = h.new_cache(context=40)
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(PolicyError, match="knows 20 of its 40 tokens"):
            model(ids[:, 20:], past_key_values=cache)
    with pytest.raises(PolicyError, match="cannot score layer 1 alone"):
        kv.press("kvzip").scorer.score(type("Context", (), {"index": 1})())
    with pytest.raises(OptionError, match="chunk=0 is not allowed"):
        kv.press("kvzip", chunk=0)


def hidden_states(model, ids):
    """[layer] of what goes into each attention module, [1, n, width]."""
    held = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: held.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return held


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("method", ["kvzap", "fastkvzip"])
def test_gates_judge_each_token_once_it_has_left_the_window(method, interval):
    """What stays after the prefill and each look while decoding is what the gate says of the text as it is read by then."""
    model = tiny_model("llama")
    weights = learned(method, kv_heads=2, width=48, layers=2)
    options = {"sink": 0, "recent": 0.0, "recent_long": 0} if method == "fastkvzip" else {}
    made = kv.press(
        f"dms:{method}",
        weights=weights,
        threshold=0.5 if method == "fastkvzip" else 0.0,
        sliding_window=5,
        interval=interval,
        **options,
    )
    ids = torch.tensor([row(30, 1)])
    more = row(9, 2)
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=made)) as h:
        states, cache, judged = [], h.new_cache(), []
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
            )
            for layer in model.model.layers
        ]
        seen = [[], []]
        for step, new in enumerate([ids, *(torch.tensor([[token]]) for token in more)]):
            states.clear()
            model(new, past_key_values=cache)
            for index in range(2):
                seen[index].append(states[index])
            if step % interval:
                continue
            for index, layer in enumerate(cache.kv_layers):
                text = torch.cat(seen[index], 1)
                size = text.shape[1]
                scorer = KVzap(weights) if method == "kvzap" else FastKVzip(weights, 0, 0.0, 0)
                whole = type("Context", (), {"hidden": text, "index": index, "seen": size, "memory": {}})()
                shape = torch.Size((1, 2, size))
                whole.stored = type(
                    "Stored", (), {"shape": shape, "positions": torch.arange(size)[None, None], "length": size}
                )()
                whole.rank = torch.arange(size)[None, None]
                scores = scorer.score(whole)
                stays = (scores >= made.budget.threshold) | (torch.arange(size) >= size - 5)
                view = layer.view()
                real = view.real.expand(view.shape)
                found = [view.positions.expand(view.shape)[0, head, real[0, head]].tolist() for head in range(2)]
                assert found == [stays[0, head].nonzero()[:, 0].tolist() for head in range(2)]
                judged.append(stays.float().mean())
        for hook in hooks:
            hook.remove()
    assert all(0.1 < share < 0.95 for share in judged)


def test_gates_refuse_to_guess_tokens_whose_states_are_gone():
    model = tiny_model("llama")
    made = kv.press("decode:kvzap", weights=learned("kvzap", kv_heads=2, width=48, layers=2), interval=2, target=10)
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=made)) as h:
        cache = h.new_cache()
        model(torch.tensor([row(30, 1)]), past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        with pytest.raises(
            PolicyError, match=r"tokens 0 to 29 are gone; let it judge at the end of the prefill too \(dms:kvzap\)"
        ):
            model(torch.tensor([[3]]), past_key_values=cache)


def test_what_was_learnt_for_another_model_is_refused(tmp_path):
    model = tiny_model("llama")
    ids = torch.tensor([row(30, 1)])
    for spec, option, method in [
        ("kvzap", "weights", "kvzap"),
        ("fastkvzip", "weights", "fastkvzip"),
        ("lukv:knorm", "curves", "lukv"),
        ("duo_attention", "pattern", "duo_attention"),
    ]:
        made = kv.press(spec, **{option: learned(method, kv_heads=3, width=48, layers=2)})
        with torch.no_grad(), pytest.raises(ShapeError, match="model"):
            prefill(model, made, ids)
        bare = kv.press(spec, **{option: str(tmp_path / "none.safetensors")})
        with torch.no_grad(), pytest.raises(InputError, match="none"):
            prefill(model, bare, ids)
    (tmp_path / "pickled.pt").write_bytes(b"\x80\x04N.")
    made = kv.press("kvzap", weights=str(tmp_path / "pickled.pt"))
    with torch.no_grad(), pytest.raises(InputError, match="a safetensors file is expected"):
        prefill(model, made, ids)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("kvzap", {}, "kvzap needs weights"),
        ("fastkvzip", {}, "fastkvzip needs weights"),
        ("lukv:knorm", {}, "lukv needs curves"),
        ("dms:knorm", {}, "dms needs threshold"),
        ("dms:knorm", {"threshold": 0.0, "sliding_window": 0}, "sliding_window=0 is not allowed"),
        ("dms:knorm", {"threshold": 0.0, "interval": 0}, "interval=0 is not allowed"),
        ("criticalkv:snapkv", {"first": 1.5}, "first=1.5 is not allowed"),
        ("criticalkv:think", {}, "use one of them"),
        ("simlayerkv", {"lazy": 2.0}, "lazy=2.0 is not allowed"),
        ("simlayerkv", {"window": 0}, "window=0 is not allowed"),
        ("duo_attention", {"sink": 0}, "sink=0 is not allowed"),
        ("finch", {"window": 0}, "window=0 is not allowed"),
        ("kvcompose", {"queries": "sum"}, "queries='sum' is not allowed"),
        ("kvcompose", {"heads": "sum"}, "heads='sum' is not allowed"),
        ("attention_matching", {"ridge": 0.0}, "ridge=0.0 is not allowed"),
    ],
)
def test_options_are_checked(spec, options, message):
    with pytest.raises(OptionError, match=message):
        kv.press(spec, **options)


def test_the_output_projection_must_be_there():
    with pytest.raises(
        UnsupportedArchitecture, match=r"Linear.o_proj must be a linear layer of 4 heads of width 3; found nothing"
    ):
        output_norms(torch.zeros(1, 2, 5, 3), torch.nn.Linear(2, 2), 4, 1)


def test_calibration_is_what_the_queries_are(tmp_path):
    model = tiny_model("llama")
    texts = [row(30, seed) for seed in range(4)]
    plain, turned = [[], []], [[], []]
    for text in texts:
        with torch.no_grad():
            for index, states in enumerate(hidden_states(model, torch.tensor([text]))):
                q = model.model.layers[index].self_attn.q_proj(states).unflatten(-1, (4, 16))
                plain[index].append(q[0, 4:])
                turned[index].append(inference.RopeSpec.from_model(model).rotate(q, torch.arange(30))[0, 4:])
    events = []
    found = calibrate(model, texts, path=tmp_path / "stats.safetensors", on_event=events.append)
    assert [(event.kind, event.done) for event in events] == [("plan", 0), ("step", 1), ("step", 2), ("step", 3), ("step", 4)]
    for index in range(2):
        q = torch.cat(plain[index]).double()  # [N, H, D]
        torch.testing.assert_close(found["query_mean"][index].double(), q.mean(0), rtol=1e-4, atol=1e-6)
        for head in range(4):
            torch.testing.assert_close(found["query_cov"][index, head].double(), q[:, head].T.cov(), rtol=1e-4, atol=1e-6)
        r = torch.cat(turned[index]).double()
        for head in range(2):
            own = []
            for place in (2 * head, 2 * head + 1):
                first = torch.linalg.svd(r[:, place]).Vh[0]
                own.append(first * (r[:, place].mean(0) @ first).sign())
            torch.testing.assert_close(found["q_filters"][index, head].double(), -(own[0] + own[1]) / 2, rtol=1e-3, atol=1e-4)
    path = str(tmp_path / "stats.safetensors")
    for spec, option in [("qfilter", "filters"), ("expected_attention_stats", "stats"), ("duo_attention", "pattern")]:
        with torch.no_grad():
            _, held, _ = prefill(model, kv.press(spec, **{option: path}), torch.tensor([row(40, 9)]))
        assert held


def test_calibration_refuses_what_it_cannot_use():
    model = tiny_model("llama")
    with pytest.raises(OptionError, match="names one or more of expected_attention_stats, qfilter, duo"):
        calibrate(model, [row(30, 1)], what=["lukv"])
    with pytest.raises(InputError, match="rows is empty"):
        calibrate(model, [])
    with pytest.raises(InputError, match="a text has 4 tokens"):
        calibrate(model, [row(30, 1), row(4, 1)])


def test_attention_matching_comes_nearer_than_dropping_alone():
    """The mean error of the outputs that the newest queries see, over all heads, at a fifth of the keys."""
    from dataclasses import replace

    from contexts import context, rows

    ctx = context(rows(80, 61))
    made = kv.press("attention_matching", ratio=0.8, window=30)
    scores = made.scorer.score(ctx).masked_fill(~ctx.stored.real, -torch.inf)
    kept = made.selector.select(ctx, scores, made.schedule.kept(ctx.stored.length, 0.8, ctx.seen), made.scorer)
    matched = made.transform.change(ctx, scores, kept)
    assert bool((matched.bias[~kept.mask(80)] == 0).all())
    assert bool((matched.bias.abs() <= 3.0 + 1e-6).all())
    last = replace(ctx, query_positions=torch.full_like(ctx.query_positions, ctx.seen))

    def outputs(stored):
        weights = replace(last, stored=stored).attention(30)
        return torch.einsum("bkgws,bksd->bkgwd", weights.unflatten(1, (2, 2)), stored.values)

    truth = outputs(ctx.stored)
    real = ctx.stored.real & kept.mask(80)
    plain = (outputs(replace(ctx.stored, real=real)) - truth).square().sum()
    fitted = (outputs(replace(matched, real=real)) - truth).square().sum()
    assert fitted < 0.1 * plain


def restore_files(folder, model, *, width=48, rank=3):
    generator = torch.Generator().manual_seed(4)
    save_file({"restore_embeddings": torch.randn(5, width, generator=generator)}, folder / "tokens.safetensors")
    adapter = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("q_proj", "v_proj"):
            size, given = getattr(layer.self_attn, name).weight.shape
            stem = f"base_model.model.model.layers.{index}.self_attn.{name}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(rank, given, generator=generator)
            adapter[f"{stem}.lora_B.weight"] = torch.randn(size, rank, generator=generator)
    save_file(adapter, folder / "adapter.safetensors")
    return str(folder / "tokens.safetensors"), str(folder / "adapter.safetensors"), adapter


def test_restored_tokens_are_those_of_the_adapted_model(tmp_path):
    """With nothing dropped but what the tokens replace, keys are the context's and those that a model with merged weights
    gives the tokens after it.
    """
    model = tiny_model("llama")
    tokens, adapter, weights = restore_files(tmp_path, model)
    ids = torch.tensor([row(40, 1)])
    made = kv.press("restorekv", ratio=0.25, embeddings=tokens, adapter=adapter, scaling=0.5, chunk=13)
    with torch.no_grad():
        cache, held, logits = prefill(model, made, ids)
        plain = DynamicCache(config=model.config)
        model(ids, past_key_values=plain)
        merged = tiny_model("llama")
        for index, layer in enumerate(merged.model.layers):
            for name in ("q_proj", "v_proj"):
                stem = f"base_model.model.model.layers.{index}.self_attn.{name}"
                change = 0.5 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
                getattr(layer.self_attn, name).weight += change
        merged(inputs_embeds=load_file(tokens)["restore_embeddings"][None], past_key_values=plain)
    assert cache.get_seq_length() == 42
    assert sum(int(real.sum()) for _, real in held) == 2 * 2 * 30
    for layer, other in zip(cache.kv_layers, plain.layers, strict=True):
        stored = layer.view()
        for head in range(2):
            real = stored.real.expand(stored.shape)[0, head]
            positions = stored.positions.expand(stored.shape)[0, head, real]
            keys, values = stored.keys[0, head, real], stored.values[0, head, real]
            assert positions[-2:].tolist() == [40, 41]
            assert positions[-7:-2].tolist() == [39] * 5
            torch.testing.assert_close(keys[-7:-2], other.keys[0, head, 40:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values[-7:-2], other.values[0, head, 40:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(keys[:-7], other.keys[0, head, positions[:-7].long()])
    assert not any(module._forward_hooks for module in model.modules())
    alone, _, _ = prefill_twice(model, made, ids)
    torch.testing.assert_close(alone, logits)


def prefill_twice(model, made, ids):
    """The logits of a row that stands in a batch beside a shorter one, which is padded."""
    with torch.no_grad():
        both, mask = batch([ids[0].tolist(), row(29, 2)])
        cache, held, logits = prefill(model, made, both, mask)
    return logits[:1], cache, held


def test_restored_tokens_of_another_model_are_refused(tmp_path):
    tokens, adapter, _ = restore_files(tmp_path, tiny_model("llama"), width=32)
    with torch.no_grad(), pytest.raises(ShapeError, match="this model's are 48 wide"):
        prefill(tiny_model("llama"), kv.press("restorekv", embeddings=tokens), torch.tensor([row(30, 1)]))
    tokens, adapter, _ = restore_files(tmp_path, tiny_model("llama", head_dim=8))
    with torch.no_grad(), pytest.raises(ShapeError, match="is for a layer of"):
        prefill(tiny_model("llama"), kv.press("restorekv", embeddings=tokens, adapter=adapter), torch.tensor([row(30, 1)]))
    with pytest.raises(OptionError, match="restorekv needs embeddings, the safetensors file of restore tokens"):
        kv.press("restorekv")
