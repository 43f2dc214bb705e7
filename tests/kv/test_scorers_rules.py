"""What scorers promise beyond what kvpress does: short prompts, raggedness, blocks, rounding."""

from dataclasses import replace

import pytest
import torch
from contexts import Attention, context, rows
from safetensors.torch import save_file

from attnkit._core.errors import InputError, PolicyError, ShapeError
from attnkit.kv.budgets import HeadAdaptive
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import Line, must_stay
from attnkit.kv.pressing import Press, press
from attnkit.kv.scorers import leverage, load
from attnkit.kv.scorers.attention import ObservedAttention, SnapKV, Tova
from attnkit.kv.scorers.keys import LagKV, QFilter
from attnkit.kv.scorers.leverage import Compactor, LeverageScore, NonCausalAttention
from attnkit.kv.selectors import Kept, best
from attnkit.kv.transforms import MergeNearest

load()


def _ragged(ctx: ScoreContext) -> tuple[ScoreContext, Kept]:
    kept = Kept.of_mask(torch.rand(ctx.stored.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    return ctx.restricted(kept.index, kept.live()), kept


def test_a_line_brings_tokens_together_and_back() -> None:
    ctx, kept = _ragged(context(rows(30)))
    line = Line.of(ctx, ctx.stored.real & (ctx.rank % 2 == 0))
    assert kept.lengths is not None
    assert torch.equal(line.counts[..., 0], (kept.lengths + 1) // 2)
    inside = line.take(ctx.stored.keys)
    for head in range(2):
        count = int(line.counts[0, head])
        expected = ctx.stored.keys[0, head, : int(kept.lengths[0, head])][::2]
        assert torch.equal(inside[0, head, :count], expected)
        assert bool((inside[0, head, count:] == 0).all())
    back = line.put(line.take(ctx.rank.float()))
    chosen = ctx.stored.real & (ctx.rank % 2 == 0)
    assert torch.equal(back[chosen], ctx.rank[chosen].float())


def test_what_must_stay_stays_in_order() -> None:
    ctx = context(rows(50))
    scores = must_stay(1e9 * torch.rand(1, 2, 50), ctx, sink=3, recent=10)
    assert scores[0, 0].argsort(descending=True)[:13].tolist() == [2, 1, 0, *range(49, 39, -1)]
    assert bool(scores.isfinite().all())
    assert float(scores.sum()) < torch.finfo(torch.float32).max


@pytest.mark.parametrize("window", [64, 20, 19])
def test_a_snapkv_window_longer_than_the_prompt_keeps_the_newest(window: int) -> None:
    ctx = context(rows(20))
    kept = best(SnapKV(window=window).score(ctx), 10)
    assert kept.index.tolist() == [[list(range(10, 20))] * 2]


def test_snapkv_by_hand() -> None:
    ctx = context(rows(12))
    scores = SnapKV(window=3, kernel=3).score(ctx)
    older = ctx.attention(3).mean(-2)[..., :9].unflatten(1, (2, 2)).mean(2)
    padded = torch.nn.functional.pad(older, (1, 1))
    torch.testing.assert_close(scores[..., :9], (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3)


def test_tova_gives_all_heads_the_same() -> None:
    scores = Tova().score(context(rows(30)))
    assert torch.equal(scores[:, 0], scores[:, 1])


def test_observed_attention_counts_only_queries_that_see_a_key() -> None:
    ctx = context(rows(24), queries=10)
    weights = ctx.attention(10).unflatten(1, (2, 2)).mean(2)
    expected = weights.sum(-2) / torch.tensor([10.0] * 15 + list(range(9, 0, -1)))
    torch.testing.assert_close(ObservedAttention().score(ctx), expected)


def test_non_causal_attention_by_hand() -> None:
    """With a last chunk of 3 tokens, which kvpress fills up with keys that take part."""
    ctx = context(rows(11))
    sums = torch.zeros(2, 11)
    for start, end in ((0, 8), (8, 11)):
        for head in range(4):
            dots = ctx.queries[0, head, start:end] @ ctx.stored.keys[0, head // 2, start:end].mT
            sums[head // 2, start:end] += dots.softmax(-1).sum(0) / 2
    sums = sums * ctx.stored.values[0].norm(dim=-1)
    padded = torch.nn.functional.pad(sums, (1, 1))
    pooled = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    expected = (pooled - pooled.mean()) / pooled.std()
    torch.testing.assert_close(NonCausalAttention(chunk=8).score(ctx)[0], expected)


def test_chunks_are_worked_on_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(rows(45, 33))
    whole = NonCausalAttention(chunk=8).score(ctx)
    monkeypatch.setattr(leverage, "_TOKENS", 16)
    again = NonCausalAttention(chunk=8).score(ctx)
    real = ctx.stored.real
    assert real is not None
    torch.testing.assert_close(again.masked_fill(~real, 0), whole.masked_fill(~real, 0))


@pytest.mark.parametrize("scorer", [NonCausalAttention(), Compactor()])
def test_methods_that_need_every_query_say_so(scorer: NonCausalAttention | Compactor) -> None:
    with pytest.raises(PolicyError, match="12 queries and 30 keys"):
        scorer.score(context(rows(30), queries=12))


def test_unrotated_keys_are_those_of_the_projection() -> None:
    layer = Attention(4, 2, 7)  # of which six channels are rotated
    plain = layer.rope
    layer.rope = replace(plain, attention_factor=1.3)
    hidden = rows(30, 22)
    ctx = context(hidden, layer)
    keys = leverage.unrotated(ctx)
    layer.rope = plain
    for row, length in ((0, 30), (1, 22)):
        _, expected, _ = layer.heads_of(hidden[row][None], torch.zeros(1, length, dtype=torch.int64))
        torch.testing.assert_close(keys[row, :, 30 - length :], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(leverage.unrotated(replace(ctx, rope=None)), ctx.stored.keys)


def test_leverage_survives_keys_that_rounding_makes_singular() -> None:
    ctx = context(rows(200))
    one = ctx.stored.keys[:, :, :, :1] * torch.tensor([3e4] * 4 + [-2e4] * 4)  # all on one line, and long
    huge = replace(ctx, rope=None, stored=replace(ctx.stored, keys=one))
    x = (one - one.mean(2, keepdim=True)) @ leverage._sketch(0, 8, 48, torch.device("cpu"))
    assert bool((torch.linalg.cholesky_ex(x.mT @ x + 0.01 * torch.eye(48)).info > 0).any())
    assert bool(LeverageScore().score(huge).isfinite().all())


def test_lagkv_with_constant_channels_is_finite() -> None:
    ctx = context(rows(40))
    flat = replace(ctx, stored=replace(ctx.stored, values=torch.ones_like(ctx.stored.values)))
    assert bool(LagKV(lag=8).score(flat).isfinite().all())


def test_lagkv_of_a_short_head_keeps_sinks_and_the_newest() -> None:
    ctx = context(rows(40))
    kept = best(LagKV(lag=32).score(ctx), 10)
    assert kept.index.tolist() == [[[0, 1, 2, 3, *range(34, 40)]] * 2]


def test_filters_come_from_a_file_or_say_what_is_wrong(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ctx = context(rows(20))
    filters = torch.randn(3, 2, 8)
    save_file({"q_filters": filters}, tmp_path / "good.safetensors")
    save_file({"other": filters}, tmp_path / "bad.safetensors")
    made = QFilter(str(tmp_path / "good.safetensors"))
    torch.testing.assert_close(made.score(ctx), -torch.einsum("bhsd,hd->bhs", ctx.stored.keys, filters[1]))
    with pytest.raises(InputError, match="no tensor 'q_filters'; it has other"):
        QFilter(str(tmp_path / "bad.safetensors")).score(ctx)
    with pytest.raises(ShapeError, match=r"\(3, 2, 8\) \(layers, key heads, width\)"):
        QFilter(filters[:, :1]).score(ctx)


def test_a_pyramid_that_would_not_keep_the_window_is_flat() -> None:
    made = press("pyramidkv", window=30)
    assert isinstance(made, Press)
    ctx = context(rows(40))
    for index in range(3):
        assert made.budget.counts(replace(ctx, index=index), ctx.stored.keys[..., 0], 20) == 20


@pytest.mark.parametrize("scorer", [SnapKV(window=8, kernel=3), Tova(), ObservedAttention()])
def test_scores_of_a_row_with_fewer_queries_than_the_window_do_not_depend_on_padding(
    scorer: SnapKV | Tova | ObservedAttention,
) -> None:
    hidden = rows(30, 10)
    together, alone = (context(part, queries=5) for part in (hidden, hidden[1:]))
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    some = replace(together, query_real=real)
    few = replace(alone, queries=alone.queries[:, :, 2:], query_positions=alone.query_positions[:, 2:])
    torch.testing.assert_close(scorer.score(some)[1:, :, 20:], scorer.score(few))


@pytest.mark.parametrize("tensor", [False, True])
def test_heads_keep_their_sure_share_beside_tokens_that_must_stay(tensor: bool) -> None:
    ctx = context(rows(20))
    scores = torch.zeros(1, 2, 20)
    scores[:, 0] = torch.inf
    kept = torch.full((1, 2), 10) if tensor else 10
    assert torch.as_tensor(HeadAdaptive(alpha=0.3).counts(ctx, scores, kept)).tolist() == [[17, 3]]


def test_merging_into_nothing_is_no_nan() -> None:
    ctx = context(rows(6))
    kept = Kept(torch.zeros(1, 2, 6, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    values = MergeNearest().change(ctx, ctx.stored.keys[..., 0], kept).values
    assert torch.equal(values, ctx.stored.values)
