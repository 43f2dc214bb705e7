import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from attnkit._core.errors import DTypeError, InputError, PolicyError, ShapeError
from attnkit.kv import KVCache, KVLayer
from attnkit.testing import FAMILIES, tiny_model

BATCH, HEADS, WIDTH = 2, 3, 4


def tokens(start, stop, *, batch=BATCH):
    """Keys that say which row, head and token they are, and values that are their negatives."""
    row, head, token = torch.meshgrid(torch.arange(batch), torch.arange(HEADS), torch.arange(start, stop), indexing="ij")
    keys = (row * 10_000 + head * 1_000 + token)[..., None].expand(-1, -1, -1, WIDTH).float()
    return keys, -keys


def filled(length):
    layer = KVLayer()
    layer.update(*tokens(0, length))
    return layer


def names(layer):
    """What each stored key says its token is, and what the layer says."""
    said = layer.keys[..., 0].long() % 1_000
    assert torch.equal(layer.values, -layer.keys)
    return said, layer.positions.expand_as(said)


def test_an_empty_layer_has_seen_and_stored_nothing():
    layer = KVLayer()
    assert (layer.get_seq_length(), layer.stored, layer.nbytes, layer.get_mask_sizes(5)) == (0, 0, 0, (5, 0))


def test_update_appends_and_numbers_tokens():
    layer = filled(5)
    keys, values = layer.update(*tokens(5, 7))
    assert torch.equal(keys, tokens(0, 7)[0])
    assert torch.equal(values, tokens(0, 7)[1])
    assert layer.positions.tolist() == [[list(range(7))]] * BATCH
    assert (layer.seen, layer.stored) == (7, 7)


def test_keep_drops_keys_but_seen_stays():
    layer = filled(6)
    layer.keep(torch.tensor([[[0, 3, 5]], [[1, 3, 4]]]))
    assert layer.positions.tolist() == [[[0, 3, 5]], [[1, 3, 4]]]
    said, positions = names(layer)
    assert torch.equal(said, positions)
    assert (layer.seen, layer.get_seq_length(), layer.stored) == (6, 6, 3)
    assert layer.get_mask_sizes(2) == (5, 3)
    layer.update(*tokens(6, 8))
    assert layer.positions[0].tolist() == [[0, 3, 5, 6, 7]]


def test_heads_keep_tokens_of_their_own():
    layer = filled(6)
    index = torch.tensor([[[0, 1], [2, 3], [4, 5]], [[0, 5], [1, 4], [2, 3]]])
    layer.keep(index)
    assert torch.equal(layer.positions, index)
    layer.update(*tokens(6, 7))
    layer.keep(torch.tensor([[[1, 2]]] * BATCH))  # one list for heads that hold different tokens
    said, positions = names(layer)
    assert torch.equal(said, positions)
    assert positions[0].tolist() == [[1, 6], [3, 6], [5, 6]]


def test_keep_frees_memory_and_nbytes_is_what_is_held():
    layer = filled(100)
    token = BATCH * HEADS * WIDTH * 4 * 2 + BATCH * 8
    assert layer.nbytes == 100 * token
    layer.keep(torch.arange(10).expand(BATCH, 1, -1))
    assert layer.nbytes == 10 * token
    layer.crop(0)
    layer.update(*tokens(100, 101))
    layer.crop(-1)
    assert layer.nbytes == 11 * token  # a crop is a view; the memory behind it stays until the next update


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.zeros(BATCH, 2, 1, dtype=torch.long), ShapeError, r"index has shape \(2, 2, 1\); expected \[2, 3 or 1, S'\]"),
        (torch.zeros(1, 1, 1, dtype=torch.long), ShapeError, r"index has shape \(1, 1, 1\)"),
        (torch.zeros(BATCH, 1, dtype=torch.long), ShapeError, r"index has shape \(2, 1\)"),
        (torch.zeros(BATCH, 1, 1, dtype=torch.int32), DTypeError, "index is int32; allowed: int64"),
    ],
)
def test_keep_refuses_a_wrong_index(index, error, message):
    with pytest.raises(error, match=message):
        filled(4).keep(index)


def test_keep_needs_stored_tokens():
    with pytest.raises(InputError, match="the layer is empty"):
        KVLayer().keep(torch.zeros(1, 1, 1, dtype=torch.long))


def test_crop_goes_back_as_if_the_tokens_had_not_been():
    layer = filled(8)
    layer.crop(-3)
    assert (layer.seen, layer.stored) == (5, 5)
    layer.update(*tokens(5, 6))
    assert layer.positions[0, 0].tolist() == list(range(6))
    assert torch.equal(layer.keys, tokens(0, 6)[0])


@pytest.mark.parametrize(
    ("remove", "error", "message"),
    [
        (3, InputError, r"crop\(3\) is not allowed; crop\(-n\) removes the newest n tokens"),
        (-9, InputError, r"crop\(-9\) removes more tokens than the 8 that the cache has seen"),
    ],
)
def test_crop_refuses_what_it_cannot_do(remove, error, message):
    with pytest.raises(error, match=message):
        filled(8).crop(remove)


def test_crop_stops_at_the_floor():
    layer = filled(8)
    layer.keep(torch.tensor([[[0, 5, 6, 7]]] * BATCH), floor=6, owner="the test")
    with pytest.raises(PolicyError, match=r"goes back to 5 tokens, but the test has dropped keys .* propose at most 2 tokens"):
        layer.crop(-3)
    layer.crop(-2)
    assert (layer.seen, layer.positions[0, 0].tolist()) == (6, [0, 5])


def test_without_a_floor_nothing_older_than_the_drop_can_be_cropped():
    layer = filled(8)
    layer.keep(torch.tensor([[[0, 7]]] * BATCH))
    layer.update(*tokens(8, 10))
    layer.crop(-2)
    with pytest.raises(PolicyError, match="tokens before 8"):
        layer.crop(-1)


def test_reset_forgets_everything():
    layer = filled(4)
    layer.keep(torch.tensor([[[3]]] * BATCH), owner="the test")
    layer.reset()
    assert (layer.seen, layer.stored, layer.floor, layer.owner, layer.nbytes) == (0, 0, 0, None, 0)
    layer.update(*tokens(0, 2))
    assert layer.positions[0, 0].tolist() == [0, 1]


def test_empty_layers_take_batch_operations():
    layer = KVLayer()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.crop(0)
    assert layer.stored == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_operations_keeps_keys_and_positions_together(seed):
    draw = random.Random(seed)
    layer, seen, floor = filled(6), 6, 0
    rows = list(range(BATCH))  # which original row each row came from
    for _ in range(40):
        batch, stored = len(rows), layer.stored
        match draw.choice(["update", "keep", "keep heads", "crop", "reorder", "repeat", "select"]):
            case "update":
                n = draw.randint(1, 4)
                layer.update(*(t[rows] for t in tokens(seen, seen + n)))
                seen += n
            case "keep" | "keep heads" as kind if stored > 2:
                heads = HEADS if kind == "keep heads" else 1
                size = draw.randint(1, stored)
                index = [[sorted(draw.sample(range(stored), size)) for _ in range(heads)] for _ in rows]
                layer.keep(torch.tensor(index))
                floor = seen
            case "crop" if seen > floor:
                n = draw.randint(1, seen - floor)
                layer.crop(-n)
                seen -= n
            case "reorder":
                order = [draw.randrange(batch) for _ in rows]
                layer.reorder_cache(torch.tensor(order))
                rows = [rows[i] for i in order]
            case "repeat" if batch < 4:
                layer.batch_repeat_interleave(2)
                rows = [row for row in rows for _ in range(2)]
            case "select" if batch > 1:
                order = sorted(draw.sample(range(batch), draw.randint(1, batch)))
                layer.batch_select_indices(torch.tensor(order))
                rows = [rows[i] for i in order]
        said, positions = names(layer)
        assert torch.equal(said, positions)
        assert (layer.keys[:, 0, :, 0].long() // 10_000).unique(dim=1).tolist() == (
            [[row] for row in rows] if layer.stored else []
        )
        assert (layer.seen, layer.get_mask_sizes(3)) == (seen, (layer.stored + 3, seen - layer.stored))


def test_a_layer_moves_positions_with_beams():
    layer = filled(3)
    layer.keep(torch.tensor([[[0, 2]], [[1, 2]]]))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.positions.tolist() == [[[1, 2]], [[1, 2]]]


def test_only_full_attention_layers_are_ours():
    kinds = {family: [type(layer).__name__ for layer in KVCache(tiny_model(family).config).layers] for family in FAMILIES}
    assert kinds.pop("gemma3") == ["DynamicSlidingWindowLayer", "KVLayer", "KVLayer"]
    assert all(names == ["KVLayer"] * 2 for names in kinds.values())
    sliding = KVCache(tiny_model("mistral", sliding_window=5).config)
    assert [type(layer).__name__ for layer in sliding.layers] == ["DynamicSlidingWindowLayer"] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_policy_the_cache_is_a_dynamic_cache(family):
    model = tiny_model(family)
    ids = torch.arange(1, 25)[None].repeat(2, 1)
    ids[1, 5:] = 7
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 5}):
        runs = [
            model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache, **options)
            for cache in (KVCache(model.config), DynamicCache(config=model.config))
        ]
        assert torch.equal(*runs)


def test_a_thinned_cache_stays_causal_without_a_policy():
    model = tiny_model("llama")
    ids = torch.arange(1, 13)[None]
    logits = []
    with torch.no_grad():
        for last in (12, 13):
            cache = KVCache(model.config)
            model(ids[:, :8], past_key_values=cache)
            for layer in cache.layers:
                layer.keep(torch.tensor([[[0, 6, 7]]]))
            ids[0, -1] = last
            logits.append(model(ids[:, 8:], past_key_values=cache).logits)
    assert torch.equal(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])


def test_nbytes_counts_layers_of_any_kind():
    model = tiny_model("gemma3")
    cache = KVCache(model.config)
    before = cache.nbytes()  # a sliding-window layer keeps its size as a tensor of its own
    with torch.no_grad():
        model(torch.arange(1, 31)[None], past_key_values=cache)
    states = 30 * 2 * 16 * 4 * 2  # tokens, heads, width, bytes, keys and values; the sliding layer's view holds all 30 too
    assert cache.nbytes() - before == 3 * states + 2 * 30 * 8


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_clone_goes_its_own_way(family):
    model = tiny_model(family)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        cache = KVCache(model.config)
        model(ids, past_key_values=cache)
        twin = cache.clone()
        size = cache.nbytes()
        expected = model(ids[:, :3], past_key_values=cache).logits
        assert (twin.get_seq_length(), twin.nbytes() <= size) == (19, True)
        assert torch.equal(model(ids[:, :3], past_key_values=twin).logits, expected)
        twin.reset()
        assert cache.get_seq_length() == 22


def test_a_clone_shares_no_memory():
    model = tiny_model("gemma3")
    cache = KVCache(model.config)
    with torch.no_grad():
        model(torch.arange(1, 20)[None], past_key_values=cache)
    twin = cache.clone()
    for old, new in zip(cache.layers, twin.layers, strict=True):
        for name in ("keys", "values"):
            assert torch.equal(getattr(old, name), getattr(new, name))
            assert getattr(old, name).untyped_storage().data_ptr() != getattr(new, name).untyped_storage().data_ptr()


def test_a_cache_takes_the_config_of_a_whole_model():
    assert len(KVCache(LlamaConfig(num_hidden_layers=5)).layers) == 5
