"""Window policies against attention written out token by token, with and without the bounded cache."""

import pytest
import torch
from oracles import assert_within, oracle_logits, padded, prompt, special_models, window_rules
from transformers import DynamicCache

from attnkit._core.errors import PolicyError
from attnkit.inference import Policy, Window, apply
from attnkit.inference.prefill import window as module
from attnkit.testing import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
rerotated = pytest.mark.parametrize("rerotate", [False, True], ids=["original", "rerotate"])


def windowed(**options):
    return Policy(prefill=Window(**options))


def judge(model, out, ids, mask=None, **rules):
    oracle, naive = (oracle_logits(model, ids, mask, dtype=dtype, **rules) for dtype in (torch.float64, torch.float32))
    assert_within(out, naive, oracle, None if mask is None else mask.bool())


def feed(model, ids, mask, position_ids, cache, sizes):
    """Logits [B, T, V], the tokens fed in pieces of these sizes."""
    pieces, start = [], 0
    for size in sizes:
        stop = start + size
        arguments = {} if mask is None else {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
        pieces.append(model(ids[:, start:stop], past_key_values=cache, **arguments).logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(pieces, dim=1)


@every_family
@rerotated
@pytest.mark.parametrize(("window", "sink"), [(8, 3), (1, 2), (5, 0)])
def test_logits_are_those_of_the_written_out_window(family, rerotate, window, sink):
    model, ids = tiny_model(family), prompt(2, 30)
    rules = {"window": window, "sink": sink, "rerotate": rerotate}
    with torch.no_grad(), apply(model, windowed(**rules)):
        out = model(ids).logits
    judge(model, out, ids, **rules)


@every_family
@rerotated
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_sinks_and_windows_of_their_own(family, rerotate, side):
    model = tiny_model(family)
    ids, mask, position_ids = padded([30, 19, 2], side=side)
    rules = {"window": 6, "sink": 3, "rerotate": rerotate}
    with torch.no_grad(), apply(model, windowed(**rules)):
        out = model(ids, attention_mask=mask, position_ids=position_ids).logits
    judge(model, out, ids, mask, **rules)


@every_family
@rerotated
@pytest.mark.parametrize("lengths", [[48, 48], [48, 31, 4]], ids=["equal", "padded"])
def test_the_bounded_cache_changes_nothing(family, rerotate, lengths, small_slack):
    model = tiny_model(family)
    ids, mask, position_ids = padded(lengths, side="left")
    mask = None if min(lengths) == max(lengths) else mask
    rules = {"window": 6, "sink": 3, "rerotate": rerotate}
    limit = 3 + 6 - 1 + 2 * 5
    outs = []
    with torch.no_grad(), apply(model, windowed(**rules)) as h:
        for sizes in ([20, 1, 1, 1, 4, *[1] * 9, 7, *[1] * 5], [48], [5] * 9 + [3]):
            bounded, growing = h.new_cache(), DynamicCache(config=model.config)
            outs += [feed(model, ids, mask, position_ids, cache, sizes) for cache in (bounded, growing)]
            full = [layer for layer in bounded.layers if hasattr(layer, "positions")]
            assert full
            assert all(layer.stored <= limit < layer.seen == 48 for layer in full)
    for out in outs:
        judge(model, out, ids, mask, **rules)


def test_rows_that_are_all_padding_in_the_first_chunk(small_slack):
    model = tiny_model("llama")
    ids, mask, position_ids = padded([40, 9], side="left")
    rules = {"window": 4, "sink": 3}
    with torch.no_grad(), apply(model, windowed(**rules)) as h:
        out = feed(model, ids, mask, position_ids, h.new_cache(), [20, 8, *[1] * 12])
    judge(model, out, ids, mask, **rules)


def test_the_cache_keeps_sinks_and_the_recent_tokens_in_order(small_slack):
    model = tiny_model("llama")
    ids, mask, position_ids = padded([40, 21], side="left")
    with torch.no_grad(), apply(model, windowed(window=6, sink=3)) as h:
        cache = h.new_cache()
        feed(model, ids, mask, position_ids, cache, [40])
        recent = list(range(40 - (6 - 1 + 5), 40))
        assert cache.layers[0].positions[:, 0].tolist() == [[0, 1, 2, *recent], [19, 20, 21, *recent]]
        cache = h.new_cache()
        ids, mask, position_ids = padded([40, 9], side="left")
        feed(model, ids, mask, position_ids, cache, [40])
        assert cache.layers[0].positions[1, 0].tolist() == [0, 0, 0, *recent]  # its sinks are recent; token 0 is padding


def test_the_bound_is_the_documented_one():
    model, ids = tiny_model("llama"), prompt(1, 300)
    limit = 4 + 16 - 1 + 2 * module.CROP_SLACK
    with torch.no_grad(), apply(model, windowed(window=16, sink=4)) as h:
        cache = h.new_cache()
        most = 0
        for piece in ids.split([100, *[1] * 60, 140], dim=1):
            model(piece, past_key_values=cache)
            most = max(most, *(layer.stored for layer in cache.layers))
        assert most == limit
        cache.crop(-module.CROP_SLACK)
        cache = h.new_cache()
        model(ids, past_key_values=cache)
        with pytest.raises(PolicyError, match="propose at most 64 tokens a step"):
            cache.crop(-module.CROP_SLACK - 1)


@every_family
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 5}, {"assistant": True}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_generation_is_the_same_in_any_cache(family, options, small_slack):
    model, options = tiny_model(family), dict(options)
    speculative = {"prompt_lookup_num_tokens", "assistant"} & set(options)
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", seed=1)
        options["assistant_model"].generation_config.num_assistant_tokens = 5
    ids = prompt(1, 6).repeat(1, 5)
    with apply(model, windowed(window=6, sink=2)) as h:
        run = lambda cache, **options: model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache, **options)  # noqa: E731
        bounded = h.new_cache()
        out = run(bounded, **options)
        assert torch.equal(out, run(DynamicCache(config=model.config), **options))
        assert bounded.layers[-1].stored < bounded.layers[-1].seen
        if speculative:
            assert torch.equal(out, run(h.new_cache()))  # proposals change the speed, not the result


def test_padded_generation_equals_single_runs(small_slack):
    model = tiny_model("llama")
    ids, mask, _ = padded([30, 12], side="left")
    options = {"max_new_tokens": 15, "do_sample": False}
    with apply(model, windowed(window=6, sink=2, rerotate=True)) as h:
        out = model.generate(ids, attention_mask=mask, past_key_values=h.new_cache(), **options)
        for row, real in enumerate(mask.bool()):
            alone = model.generate(ids[row, real][None], past_key_values=h.new_cache(), **options)
            assert torch.equal(out[row, -15:], alone[0, -15:])


@every_family
def test_a_window_that_shows_everything_is_dense(family):
    model, ids = tiny_model(family), prompt(2, 30)
    with torch.no_grad():
        with apply(model, "dense"):
            dense = model(ids).logits
        with apply(model, windowed(window=27, sink=3)):
            assert torch.equal(model(ids).logits, dense)
        with apply(model, windowed(window=26, sink=3)):
            assert not torch.equal(model(ids).logits, dense)


@rerotated
def test_dense_prefill_then_window(rerotate, small_slack):
    model, ids = tiny_model("llama"), prompt(2, 40)
    rules = {"window": 6, "sink": 3, "rerotate": rerotate}
    with torch.no_grad():
        with apply(model, "dense"):
            dense = model(ids[:, :30]).logits
        with apply(model, windowed(**rules, dense_prefill=True)) as h:
            caches = (h.new_cache(), DynamicCache(config=model.config))
            outs = [feed(model, ids, None, None, cache, [30, 1, 4, 5]) for cache in caches]
    for out in outs:
        assert torch.equal(out[:, :30], dense)
        judge(model, out, ids, dense_rows=30, **rules)


@pytest.mark.parametrize(
    ("family", "options"), [("mistral", {"sliding_window": 5}), ("gemma3", {"layer_types": ["sliding_attention"] * 3})]
)
def test_layers_with_a_window_of_their_own_are_left_alone(family, options):
    model, ids = tiny_model(family, **options), prompt(2, 30)
    with torch.no_grad():
        with apply(model, "dense"):
            dense = model(ids).logits
        with apply(model, windowed(window=2, sink=1)):
            assert torch.equal(model(ids).logits, dense)
    judge(model, dense, ids)


def test_softcap_and_learned_sinks_count_once():
    ids = prompt(2, 20)
    real = torch.ones_like(ids, dtype=torch.bool)
    for model in special_models():

        def explicit(dtype, model=model):
            forms = {"full_attention": (5, 2, False), "sliding_attention": (7, 0, False)}
            hidden = {name: ~window_rules(real, *rules)[0][:, None] for name, rules in forms.items()}
            masks = {name: torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf) for name, mask in hidden.items()}
            return model.to(dtype)(ids, attention_mask=masks, use_cache=False).logits

        with torch.no_grad():
            naive = explicit(torch.float32)
            with apply(model, windowed(window=5, sink=2)) as h:
                outs = [model(ids).logits, feed(model, ids, None, None, h.new_cache(), [12, 4, 1, 1, 1, 1])]
            for out in outs:
                assert_within(out, naive, explicit(torch.float64))


def test_what_lies_outside_the_window_changes_no_row():
    model, ids = tiny_model("llama", num_hidden_layers=1), prompt(1, 30)
    changed = ids.clone()
    changed[:, 10] = changed[:, 10] % 60 + 1
    with torch.no_grad(), apply(model, windowed(window=6, sink=3)):
        before, after = model(ids).logits, model(changed).logits
    same = (before == after).all(-1)[0]
    assert same.tolist() == [not 10 <= row < 16 for row in range(30)]


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_later_tokens_change_no_row(family, side):
    model = tiny_model(family)
    ids, mask, position_ids = padded([30, 14], side=side)
    later = ids.clone()
    later[:, 25:] = 7
    with torch.no_grad(), apply(model, windowed(window=5, sink=3)):
        before, filled, after = (
            model(x, attention_mask=mask, position_ids=position_ids).logits
            for x in (ids, ids.masked_fill(mask == 0, 33), later)
        )
    assert torch.equal(before[mask.bool()], filled[mask.bool()])
    assert torch.equal(before[0, :25], after[0, :25])
    assert not torch.equal(before[0, 25:], after[0, 25:])
