"""kvpress objects at work in models, beside our own methods of the same name."""

import pytest
import torch
from kvpress_peer import peer
from transformers import DynamicCache

from attnkit import inference, kv
from attnkit._core.errors import PolicyError
from attnkit.kv.compat import adapt
from attnkit.testing import tiny_model

SIZE = 40


def tokens(rows=1):
    return torch.randint(1, 61, (rows, SIZE), generator=torch.Generator().manual_seed(1))


def kept(model, made, ids, **arguments):
    """[layers][rows][heads] of positions that stay."""
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=made)) as h:
        cache = h.new_cache()
        model(ids, past_key_values=cache, **arguments)
        views = [layer.view() for layer in cache.kv_layers]
    return [
        [
            [view.positions.expand(view.shape)[b, head, real].tolist() for head, real in enumerate(row)]
            for b, row in enumerate(view.real.expand(view.shape))
        ]
        for view in views
    ]


PAIRS = {
    "snapkv": ("snapkv", {"window": 6}, lambda k: k.SnapKVPress(0.5, window_size=6)),
    "keydiff": ("keydiff", {}, lambda k: k.KeyDiffPress(0.5)),
    "expected": ("expected_attention", {"rope": "mean"}, lambda k: k.ExpectedAttentionPress(0.5)),
    "adakv": ("adakv:snapkv", {"window": 6}, lambda k: k.AdaKVPress(k.SnapKVPress(0.5, window_size=6))),
    "adakv expected": (
        "adakv:expected_attention",
        {"rope": "mean", "eps": 0.02},
        lambda k: k.AdaKVPress(k.ExpectedAttentionPress(0.5, epsilon=0.02)),
    ),
    "chunk": ("chunk:knorm", {"chunk_length": 10}, lambda k: k.ChunkPress(k.KnormPress(0.5), chunk_length=10)),
    "critical": ("criticalkv:snapkv", {"window": 6}, lambda k: k.CriticalKVPress(k.SnapKVPress(0.5, window_size=6))),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", PAIRS)
def test_theirs_keep_what_ours_keep(name, family):
    kvpress = peer()
    spec, options, theirs = PAIRS[name]
    model = tiny_model(family)
    before = [sorted(vars(layer.self_attn)) for layer in model.model.layers]
    found = kept(model, adapt(theirs(kvpress), model), tokens(2))
    assert found == kept(model, kv.press(spec, ratio=0.5, **options), tokens(2))
    assert sum(len(head) for layer in found for row in layer for head in row) == sum(
        SIZE // 2 for layer in found for row in layer for _ in row
    )
    assert [sorted(vars(layer.self_attn)) for layer in model.model.layers] == before


def test_their_heads_with_budgets_of_their_own_hold_all_bytes_and_ours_let_them_go():
    kvpress = peer()
    model, size = tiny_model("llama"), 1024
    ids = torch.randint(1, 61, (1, size), generator=torch.Generator().manual_seed(1))
    layers = [layer.self_attn for layer in model.model.layers]

    def weight(press):
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model(ids, past_key_values=cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    # transformers no longer tells layers where a pass begins, which the peer asks for
    given = {"cache_position": torch.arange(size)}
    hooks = [each.register_forward_pre_hook(lambda _, args, kw: (args, {**kw, **given}), with_kwargs=True) for each in layers]
    dense = weight(kvpress.SnapKVPress(0.0))
    theirs = weight(kvpress.AdaKVPress(kvpress.SnapKVPress(0.5)))
    alike = weight(kvpress.SnapKVPress(0.5))  # the same number of keys in each head: those it cuts off
    hidden = [len(each.masked_key_indices[0]) for each in layers]
    for hook in hooks:
        hook.remove()
    for each in layers:
        del each.masked_key_indices
    assert theirs == dense == 2 * alike
    assert hidden == [size * model.config.num_key_value_heads // 2] * len(layers)  # it did choose half of them
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=kv.press("adakv:snapkv", ratio=0.5))) as h:
        cache = h.new_cache()
        model(ids, past_key_values=cache)
        assert cache.nbytes() < 0.6 * dense  # positions and tails of pages included


@pytest.mark.parametrize("name", ["KeyRerotationPress", "ThinKPress", "MergingPress"])
def test_what_changes_keys_or_values_is_refused(name):
    kvpress = peer()
    made = {"ThinKPress": lambda: kvpress.ThinKPress(0.5, window_size=4)}.get(
        name, lambda: getattr(kvpress, name)(kvpress.KnormPress(0.5))
    )()
    with pytest.raises(PolicyError, match=rf"{name} changes keys or values"):
        kept(tiny_model("llama"), adapt(made), tokens())


@pytest.mark.parametrize("name", ["KVzipPress", "KVComposePress", "FinchPress"])
def test_what_takes_over_the_model_is_refused(name):
    kvpress = peer()
    with pytest.raises(PolicyError, match=rf"{name} has a (__call__|forward_hook) of its own"):
        adapt(getattr(kvpress, name)(compression_ratio=0.5))


def test_what_acts_while_decoding_is_refused():
    kvpress = peer()
    with pytest.raises(PolicyError, match=r"DMSPress has a forward_hook of its own"):
        adapt(kvpress.DMSPress(kvpress.KnormPress(), threshold=0.0))


def test_padding_and_contexts_in_parts_are_refused():
    kvpress = peer()
    model = tiny_model("llama")
    mask = torch.ones(2, SIZE, dtype=torch.long)
    mask[1, :5] = 0
    with pytest.raises(PolicyError, match="SnapKVPress knows nothing of padding"):
        kept(model, adapt(kvpress.SnapKVPress(0.5, window_size=6)), tokens(2), attention_mask=mask)
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=adapt(kvpress.KnormPress(0.5)))) as h:
        cache = h.new_cache(context=SIZE)
        model(tokens()[:, :20], past_key_values=cache)
        with pytest.raises(PolicyError, match="needs the whole context in one pass"):
            model(tokens()[:, 20:], past_key_values=cache)
