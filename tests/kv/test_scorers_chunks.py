"""Selectors over chunks and blocks, transforms: against kvpress and against their definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contexts import attention, context, rows
from kvpress_peer import peer, peer_kwargs
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv import transforms
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.pressing import Press, press
from attnkit.kv.scorers import attention as attention_scorers
from attnkit.kv.scorers import load
from attnkit.kv.selectors import Kept, gather

load()


def _ours(spec: str, ctx: ScoreContext, **options: Any) -> tuple[Tensor, Tensor]:
    """Keys and values that stay, [1, Hkv, M, D]."""
    made = press(spec, ratio=ctx.ratio, **options)
    assert isinstance(made, Press)
    scores = made.scorer.score(ctx)
    kept = made.selector.select(ctx, scores, made.schedule.kept(ctx.stored.length, ctx.ratio, ctx.seen), made.scorer)
    stored = ctx.stored if made.transform is None else made.transform.change(ctx, scores, kept)
    assert kept.lengths is None
    return gather(stored.keys, kept.index), gather(stored.values, kept.index)


def _theirs(made: Any, ctx: ScoreContext) -> tuple[Tensor, Tensor]:
    kwargs = peer_kwargs(ctx.module, ctx.stored.keys.shape[2]) | {"hidden_states": ctx.hidden}
    with torch.no_grad():
        keys, values = made.compress(ctx.module, ctx.hidden, ctx.stored.keys.clone(), ctx.stored.values.clone(), None, kwargs)
    return keys, values


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Equal as sets of tokens: the peer leaves them in the order of their scores."""
    assert ours[0].shape == theirs[0].shape
    mine, other = (torch.cat(pair, -1) for pair in (ours, theirs))
    mine, other = (x.take_along_dim(x[..., :1].argsort(-2), -2) for x in (mine, other))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


WRAPPED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "chunk": ("chunk:knorm", {"chunk_length": 10}, "ChunkPress", {"chunk_length": 10}, 64),
    "chunkkv": ("chunkkv:knorm", {"chunk_length": 10}, "ChunkKVPress", {"chunk_length": 10}, 100),
    "entropy": ("entropy_chunkkv:knorm", {}, "EntropyGatedChunkKVPress", {}, 117),
    "entropy-one": (
        "entropy_chunkkv:knorm",
        {"short_length": 2},
        "EntropyGatedChunkKVPress",
        {"low_entropy_chunk_length": 2},
        101,
    ),
    "block": ("block:keydiff", {"block_length": 8}, "BlockPress", {"block_size": 8}, 61),
    "merge": ("merge:keydiff", {}, "MergingPress", {}, 61),
    "merge-similar": ("merge:keydiff", {"similarity": 0.6}, "MergingPress", {"similarity_threshold": 0.6}, 61),
    "merge-share": ("merge:keydiff", {"fraction": 0.4}, "MergingPress", {"merge_fraction": 0.4}, 62),
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_what_stays_is_what_kvpress_keeps(case: str, ratio: float) -> None:
    spec, options, theirs, their_options, length = WRAPPED[case]
    if ratio == 0.7 and case == "chunk":
        length = 60  # a whole number of tokens stays of every chunk, so that rounding does not matter
    kvpress = peer()
    base = {"knorm": kvpress.KnormPress, "keydiff": kvpress.KeyDiffPress}[spec.split(":")[1]](compression_ratio=ratio)
    ctx = context(rows(length), ratio=ratio)
    _same(_ours(spec, ctx, **options), _theirs(getattr(kvpress, theirs)(base, **their_options), ctx))


def test_whole_chunks_stay_and_the_last_gives_the_rest() -> None:
    ctx = context(rows(60), ratio=0.45)  # 33 of 60 tokens
    made = press("chunkkv:knorm", chunk_length=10)
    assert isinstance(made, Press)
    scores = made.scorer.score(ctx)
    mask = made.selector.select(ctx, scores, 33, made.scorer).mask(60).unflatten(-1, (6, 10))
    order = scores.unflatten(-1, (6, 10)).mean(-1).sum(1).argsort(descending=True)[0]
    assert bool(mask[0, :, order[:3]].all())
    assert bool((mask[0, :, order[3]].sum(-1) == 3).all())
    for head in range(2):
        best = scores.unflatten(-1, (6, 10))[0, head, order[3]].topk(3).indices
        assert bool(mask[0, head, order[3], best].all())


def test_shares_of_chunks_add_up() -> None:
    ctx = context(rows(50), ratio=0.5)
    made = press("chunk:knorm", chunk_length=8)
    assert isinstance(made, Press)
    for counts in (1, 7, 25, 49, 50):
        mask = made.selector.select(ctx, made.scorer.score(ctx), counts, made.scorer).mask(50)
        assert mask.sum(-1).tolist() == [[counts, counts]]
        shares = torch.stack([part.sum(-1) for part in mask.split(8, -1)], -1)
        assert float((shares - counts * torch.tensor([8] * 6 + [2]) / 50).abs().max()) < 1


def test_think_zeroes_the_channels_that_kvpress_zeroes() -> None:
    ctx = context(rows(61), ratio=0.5)
    keys, _ = _ours("think", ctx, window=6)
    expected, _ = _theirs(peer().ThinKPress(key_channel_compression_ratio=0.5, window_size=6), ctx)
    assert torch.equal(keys, expected)
    assert int((keys[0, 0] == 0).all(0).sum()) == 4


def test_think_judges_by_real_queries_alone() -> None:
    made = press("think", window=12)
    assert isinstance(made, Press)
    assert made.transform is not None
    hidden = rows(30, 5)
    for part, rank in ((hidden, 25), (hidden[1:], 0)):
        ctx = context(part, queries=12)
        scores = made.scorer.score(ctx)
        kept = made.selector.select(ctx, scores, 1, made.scorer)
        zeros = (made.transform.change(ctx, scores, kept).keys[-1, :, rank:] == 0).all(1)
        if rank:
            expected = zeros
    assert torch.equal(zeros, expected)
    assert zeros.sum(-1).tolist() == [4, 4]


def test_a_value_whose_key_is_unlike_all_that_stay_is_dropped() -> None:
    ctx = context(rows(6))
    keys = torch.ones(1, 2, 6, 8) * torch.tensor([1.0, -1.0, -2.0, -1.0, 1.0, -3.0])[:, None]
    ctx = replace(ctx, stored=replace(ctx.stored, keys=keys))
    kept = Kept(torch.tensor([[[0], [0]]]))
    values = transforms.MergeNearest().change(ctx, keys[..., 0], kept).values
    old = ctx.stored.values
    share = old[:, :, 4].norm(dim=-1) / (old[:, :, 4].norm(dim=-1) + old[:, :, 0].norm(dim=-1))
    expected = (old[:, :, 0] + share[..., None] * old[:, :, 4]) / (1 + share[..., None])
    torch.testing.assert_close(values[:, :, 0], expected)
    assert torch.equal(transforms.MergeNearest(fraction=0.5).change(ctx, keys[..., 0], kept).values, values)


def test_rerotated_keys_are_those_of_kvpress_moved_to_the_end() -> None:
    ctx = context(rows(61))
    keys, values = _ours("rerotate:keydiff", ctx)
    rope = attention().rope
    back = rope.rotate(keys.transpose(1, 2), torch.full((keys.shape[2],), -(61 - 30))).transpose(1, 2)
    _same((back, values), _theirs(peer().KeyRerotationPress(peer().KeyDiffPress(compression_ratio=0.5)), ctx))


def test_rerotated_keys_are_those_of_a_shorter_text() -> None:
    layer = attention()
    hidden = rows(40)
    ctx = context(hidden, layer)
    kept = Kept(torch.tensor([[[0, 5, 6, 20, 39], [1, 2, 30, 31, 38]]]))
    after = transforms.Rerotate().change(ctx, ctx.stored.keys[..., 0], kept)
    assert gather(after.positions[..., None].expand(1, 2, 40, 1), kept.index)[..., 0].tolist() == [[[35, 36, 37, 38, 39]] * 2]
    for head in range(2):
        short = hidden[0][kept.index[0, head]][None]
        _, expected, _ = layer.heads_of(short, torch.arange(35, 40)[None])
        torch.testing.assert_close(gather(after.keys, kept.index)[:, head], expected[:, head], rtol=1e-4, atol=1e-5)


def test_cam_merges_as_kvpress_does(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attention(4, 1, 8)  # with one key head, since the peer drops the same tokens in all
    ctx = replace(context(rows(40), layer, queries=12, phase="decode"))
    made = press("cam:knorm", interval=28, target=18, targets=5)
    assert isinstance(made, Press)
    scores = made.scorer.score(ctx)
    kept = made.selector.select(ctx, scores, made.schedule.kept(40, 0.5, 40), made.scorer)
    assert made.buffer == 28
    assert isinstance(made.transform, transforms.MergeWindow)
    stored = made.transform.change(ctx, scores, kept)
    gone = (~kept.mask(40))[0, 0].nonzero()[:, 0]
    draws = made.transform._draws(ctx)[..., gone]
    drawn: list[Tensor] = []

    def bernoulli(chance: Tensor) -> Tensor:
        drawn.append(chance)
        return (draws < chance).float()

    theirs = peer().CAMPress(peer().KnormPress(), compression_interval=28, target_size=18, merge_budget=5)
    theirs.layer_step_counts[1] = 28
    attention_sum = attention_scorers.received(ctx)[0]
    theirs._running_attn_sum[1] = attention_sum
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    keys, values = theirs.compress(ctx.module, None, ctx.stored.keys.clone(), ctx.stored.values.clone(), attention_sum, {})
    assert bool(((drawn[0] > 0) & (drawn[0] < 1)).any())
    _same((gather(stored.keys, kept.index), gather(stored.values, kept.index)), (keys, values))
    assert not torch.equal(values, gather(ctx.stored.values, kept.index))


def test_work_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(rows(40, 31))
    total, count = attention_scorers.received(ctx)
    merged = _merge(ctx)
    monkeypatch.setattr(attention_scorers, "_BLOCK", 40 * 7)
    monkeypatch.setattr(transforms, "_BLOCK", 40 * 7)
    again, same = attention_scorers.received(ctx)
    torch.testing.assert_close(again, total)
    assert torch.equal(count, same)
    torch.testing.assert_close(_merge(ctx).values, merged.values)


def _merge(ctx: ScoreContext) -> Stored:
    kept = Kept.of_mask((ctx.rank % 3 == 0).expand(ctx.stored.shape))
    return transforms.MergeNearest().change(ctx, ctx.stored.keys[..., 0], kept)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("merge:knorm", {"similarity": 1.5}, "similarity=1.5"),
        ("merge:knorm", {"fraction": 0.0}, "fraction=0.0"),
        ("cam:knorm", {"targets": 0}, "targets=0"),
        ("chunk:knorm", {"chunk_length": 0}, "length=0"),
        ("entropy_chunkkv:knorm", {"short_length": 10}, "short=10"),
        ("merge:rerotate:knorm", {}, "use one of them"),
        ("chunk:chunkkv:knorm", {}, "use one of them"),
        ("snapkv", {"window": 0}, "window=0"),
        ("snapkv", {"kernel": 4}, "kernel=4"),
        ("pyramidkv", {"beta": 0.5}, r"beta=0\.5"),
        ("lagkv", {"lag": 0}, "lag=0"),
        ("cur", {"leverage": "keys"}, "leverage"),
        ("non_causal_attention", {"chunk": 0}, "chunk=0"),
        ("qfilter", {}, "needs filters"),
    ],
)
def test_bad_options_are_named(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        press(spec, **options)
