"""Scores that kvpress computes too, on the same tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context, rows
from kvpress_peer import peer, peer_scores
from safetensors.torch import save_file
from torch import Tensor

from attnkit.kv.context import ScoreContext
from attnkit.kv.line import MUST_STAY
from attnkit.kv.pressing import Press, press
from attnkit.kv.scorers import leverage, load

load()

FILTERS = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(7))
# name: our options, theirs (class, options), length
SAME: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "knorm": ("knorm", {}, "KnormPress", {}, 61),
    "keydiff": ("keydiff", {}, "KeyDiffPress", {}, 61),
    "snapkv": ("snapkv", {"window": 8}, "SnapKVPress", {"window_size": 8}, 61),
    "snapkv-kernel": ("snapkv", {"window": 3, "kernel": 1}, "SnapKVPress", {"window_size": 3, "kernel_size": 1}, 61),
    "tova": ("tova", {}, "TOVAPress", {}, 61),
    "lagkv-cross": ("lagkv", {"lag": 8, "cross_scoring": True}, "LagKVPress", {"lag_size": 8, "cross_scoring": True}, 61),
    "non_causal": ("non_causal_attention", {"chunk": 16}, "NonCausalAttnPress", {"chunk_size": 16}, 64),
    "leverage": ("leverage_score", {}, "LeverageScorePress", {}, 61),
    "compactor": ("compactor", {"chunk": 16, "ratio": 0.3}, "CompactorPress", {"chunk_size": 16}, 76),
    "compactor-blend": ("compactor", {"chunk": 8, "blending": 0.9}, "CompactorPress", {"chunk_size": 8, "blending": 0.9}, 60),
    "expected": ("expected_attention", {"rope": "mean"}, "ExpectedAttentionPress", {}, 61),
    "expected-eps": ("expected_attention", {"rope": "mean", "eps": 0.02}, "ExpectedAttentionPress", {"epsilon": 0.02}, 61),
    "expected-mean": (
        "expected_attention",
        {"rope": "mean", "covariance": False, "value_norm": "none", "horizon": 40, "sinks": 2},
        "ExpectedAttentionPress",
        {"use_covariance": False, "use_vnorm": False, "n_future_positions": 40, "n_sink": 2},
        61,
    ),
    "capkv": ("capkv", {}, "CapPress", {}, 61),
    "cur": ("cur", {}, "CURPress", {}, 61),
    "cur-key": ("cur", {"leverage": "key"}, "CURPress", {"leverage_type": "key"}, 61),
    "cur-value": ("cur", {"leverage": "value", "local": 7}, "CURPress", {"leverage_type": "value", "local_window_size": 7}, 61),
    "cur-avg": (
        "cur",
        {"leverage": "kv_avg", "local": None},
        "CURPress",
        {"leverage_type": "kv_avg", "use_local_approximation": False},
        61,
    ),
    "cur-sketch": ("cur", {"sketch": 20}, "CURPress", {"use_random_leverage": True}, 61),
}


@pytest.fixture
def our_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer draws what we draw: its one call of randn, with its factor left to it."""
    randn = torch.randn

    def draw(*shape: int, **kwargs: Any) -> Tensor:
        if "generator" in kwargs:
            return randn(*shape, **kwargs)
        width, rank = shape[-2:]
        return (leverage._sketch(0, width, rank, torch.device("cpu")) * rank**0.5).expand(shape).to(kwargs.get("dtype"))

    monkeypatch.setattr(torch, "randn", draw)


def _scores(made: Press, ctx: ScoreContext) -> Tensor:
    return made.scorer.score(ctx)


def _compare(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    """Equal where neither says that a token must stay; and those stay for both."""
    forced = ours >= MUST_STAY
    assert ours.dtype == torch.float32
    assert bool((theirs.masked_fill(~forced, torch.inf).amin(-1) >= theirs.masked_fill(forced, -torch.inf).amax(-1)).all())
    a, b = ours[~forced], theirs[~forced]
    assert (~forced).sum() > 30
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())
    if rtol < 1e-4:
        places = [x.masked_fill(forced, torch.inf).argsort(-1).argsort(-1) for x in (ours, theirs)]
        assert (places[0] == places[1]).float().mean() >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SAME)
@pytest.mark.usefixtures("our_sketch")
def test_scores_are_those_of_kvpress(case: str, dtype: torch.dtype) -> None:
    name, options, theirs, their_options, length = SAME[case]
    kvpress = peer()
    made = press(name, **options)
    assert isinstance(made, Press)
    hidden = rows(length)
    ctx = context(hidden, ratio=made.ratio, sinks=options.get("sinks", 4))
    expected = peer_scores(getattr(kvpress, theirs)(compression_ratio=made.ratio, **their_options), ctx)
    if dtype == torch.float32:
        _compare(_scores(made, ctx), expected, 1e-5)
    else:  # the peer in float32 on what bfloat16 leaves of the tensors: its own bfloat16 sums are coarser than ours
        stored = replace(ctx.stored, keys=ctx.stored.keys.bfloat16(), values=ctx.stored.values.bfloat16())
        low = replace(ctx, stored=stored, queries=ctx.queries.bfloat16())
        _compare(_scores(made, low), expected, 2e-2)


def test_qfilter_is_that_of_kvpress() -> None:
    ctx = context(rows(61))
    theirs = peer().QFilterPress(compression_ratio=0.5)
    theirs.q_filters = FILTERS
    _compare(_scores(press("qfilter", filters=FILTERS), ctx), peer_scores(theirs, ctx), 1e-5)  # type: ignore[arg-type]


def test_expected_attention_of_learnt_moments_is_that_of_kvpress(tmp_path: Path) -> None:
    mean, root = torch.randn(3, 4, 8), torch.randn(3, 4, 8, 8)
    cov = root @ root.mT / 8
    save_file({"query_mean": mean, "query_cov": cov}, tmp_path / "stats.safetensors")
    ctx = context(rows(61))
    theirs = peer().ExpectedAttentionStatsPress(compression_ratio=0.5)
    theirs.mu, theirs.cov = mean, cov
    ours = press("expected_attention_stats", rope="mean", stats=str(tmp_path / "stats.safetensors"))
    _compare(_scores(ours, ctx), peer_scores(theirs, ctx), 1e-5)  # type: ignore[arg-type]


def test_observed_attention_is_that_of_kvpress() -> None:
    ctx = context(rows(61))
    weights = ctx.attention(61)
    expected = peer_scores(peer().ObservedAttentionPress(compression_ratio=0.5), ctx, weights)
    _compare(_scores(press("observed_attention"), ctx), expected, 1e-5)  # type: ignore[arg-type]


def test_lagkv_ranks_are_those_of_kvpress_within_a_block() -> None:
    ctx = context(rows(75))
    ours = _scores(press("lagkv", lag=8), ctx)  # type: ignore[arg-type]
    expected = peer_scores(peer().LagKVPress(compression_ratio=0.5, lag_size=8), ctx)
    blocks = slice(4, 4 + 7 * 8)
    torch.testing.assert_close((ours[..., blocks] * 8).floor(), expected[..., blocks] * 8)
    ordered = ours[..., blocks].unflatten(-1, (7, 8)).sort(-1).values
    assert bool((ordered.diff(dim=-2) > 0).all())  # of equal ranks the newer block's is worth more


@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("length", [400, 1000])
def test_pyramid_budgets_are_those_of_kvpress(layers: int, length: int) -> None:
    made = press("pyramidkv", ratio=0.5, window=8)
    assert isinstance(made, Press)
    theirs = peer().PyramidKVPress(compression_ratio=0.5, window_size=8)
    ctx = context(rows(length))
    ours = []
    for index in range(layers):
        here = replace(ctx, index=index, layers=layers)
        ours.append(made.budget.counts(here, ctx.stored.keys[..., 0], length // 2))
        module = type("Module", (), {"layer_idx": index, "config": type("C", (), {"num_hidden_layers": layers})})
        assert abs(ours[-1] - theirs.get_layer_budget(module, length)) <= 1
    assert sum(ours) == layers * (length // 2)
    assert ours == sorted(ours, reverse=True)
    assert ours[0] > ours[-1]
