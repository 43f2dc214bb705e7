"""What every registered method has to hold to, alone and in every wrapper."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import WIDTH, Attention, attention, context, permuted, rows
from learned_files import LEARNED, learned
from safetensors.torch import save_file
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import kept_of
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.notes import Notes
from attnkit.kv.pressing import Press, press
from attnkit.kv.registry import BASES, WRAPPERS
from attnkit.kv.scorers import load
from attnkit.kv.selectors import Kept
from attnkit.kv.transforms import KeepAll

load()

LENGTHS = (37, 29, 44)
LAYERS = 3
FILTERS = torch.randn(LAYERS, 1, 1, generator=torch.Generator().manual_seed(7))
# options that make windows and blocks small enough for these rows; a method that cannot do without options has them here
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 5},
    "pyramidkv": {"window": 3, "beta": 3.0},
    "lagkv": {"lag": 5},
    "non_causal_attention": {"chunk": 8},
    "compactor": {"chunk": 8, "sink": 3, "recent": 2},
    "cur": {"local": 8},
    "think": {"window": 6},
    "chunk": {"chunk_length": 9},
    "chunkkv": {"chunk_length": 6},
    "entropy_chunkkv": {"chunk_length": 6},
    "block": {"block_length": 8},
    "decode": {"interval": 8, "target": 14},
    "cam": {"interval": 8, "target": 14, "targets": 3},
    "per_layer": {"ratios": (0.5,) * LAYERS},
    "finch": {"window": 5},
    "attention_matching": {"window": 12},
    "simlayerkv": {"recent": 9, "lazy": 0.3},
    "duo_attention": {"sink": 2, "recent": 7},
    "dms": {"threshold": -3.0, "sliding_window": 6},
}
SINKS = {"streaming_llm": 4, "lagkv": 4, "compactor": 3, "cur": 4, "expected_attention": 4, "capkv": 4}
# (spec) what does not go together, and says so
REFUSED = {f"{outer}:think" for outer in ("chunk", "chunkkv", "entropy_chunkkv", "block", "merge", "cam", "rerotate")}
REFUSED |= {f"block:{name}" for name in ("observed_attention", "non_causal_attention", "compactor", "kvzap", "fastkvzip")}
REFUSED |= {f"{outer}:think" for outer in ("criticalkv", "critical_adakv")}
REFUSED |= {f"{outer}:attention_matching" for outer in ("merge", "cam", "rerotate")}
REFUSED |= {f"block:{name}" for name in ("kvzip", "kvzip_plus", "kvcompose", "kvgrad", "restorekv")}
# methods whose scores differ by head for a reason that a permutation of heads does not carry along
OWN_HEADS = {
    "random": "draws differ by head",
    "kvzap": "weights differ by head",
    "fastkvzip": "weights differ by head",
    "lukv": "the table differs by head",
}
# methods and wrappers that keep another number of tokens than the budget asks for
OWN_COUNTS: dict[str, str] = {
    "simlayerkv": "layers keep everything or both ends",
    "duo_attention": "heads keep everything or both ends",
    "dms": "what reaches the threshold",
    "lukv": "a table's",
}


class Layer:
    """A cache layer that only notes what a press wants of it."""

    def __init__(self, made: Press, ctx: ScoreContext, scores: Tensor) -> None:
        self.notes = {made: Notes(pending=(ctx, scores))}

    def compress(self, stored: Stored, kept: Kept, owner: object) -> None:
        del owner
        self.result = (stored, kept)


@cache
def stats(heads: int, dim: int) -> str:
    """A file of moments, the same for all heads."""
    path = Path(tempfile.mkdtemp()) / "stats.safetensors"
    mean, root = FILTERS.expand(-1, heads, dim), torch.eye(dim).expand(LAYERS, heads, dim, dim)
    save_file({"query_mean": mean.contiguous(), "query_cov": root.contiguous()}, path)
    return str(path)


def build(spec: str, ratio: float = 0.5, *, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> Press:
    options: dict[str, Any] = {}
    for name in spec.split(":"):
        options |= OPTIONS.get(name, {})
        if name in LEARNED and name != "duo_attention":
            options[LEARNED[name]] = learned(name, kv_heads=kv_heads, width=WIDTH, layers=LAYERS)
    if spec.endswith("qfilter"):
        options["filters"] = FILTERS.expand(-1, kv_heads, dim).contiguous()
    if spec.endswith("_stats"):
        options["stats"] = stats(heads, dim)
    made = press(spec, ratio=ratio, **options)
    assert isinstance(made, Press)
    return made


def decide(made: Press, contexts: list[ScoreContext]) -> list[tuple[Stored, Kept]]:
    """What the press does to these layers."""
    layers = []
    for ctx in contexts:
        scores = made.scorer.score(ctx)
        assert scores.dtype == torch.float32
        assert scores.shape == ctx.stored.shape
        real = torch.ones_like(scores, dtype=torch.bool) if ctx.stored.real is None else ctx.stored.real.expand(scores.shape)
        assert not bool(scores[real].isnan().any())
        layers.append(Layer(made, ctx, scores.masked_fill(~real, -torch.inf)))
    made.after_pass(type("Passed", (), {"layers": layers}))  # type: ignore[arg-type]
    return [layer.result for layer in layers]


def contexts(hidden: list[Tensor], layer: Attention | None = None, **options: Any) -> list[ScoreContext]:
    """The same layer three times, as if the model had three."""
    ctx = context(hidden, layer, **options)
    return [replace(ctx, index=index) for index in range(LAYERS)]


def kept_tokens(ctx: ScoreContext, kept: Kept) -> list[list[list[int]]]:
    """[row][head]: the places, among the head's real tokens, of those that stay."""
    rank = ctx.rank.expand(ctx.stored.shape).gather(-1, kept.index)
    live = kept.live()
    return [[r[m].tolist() for r, m in zip(*pair, strict=True)] for pair in zip(rank, live, strict=True)]


def phase(made: Press) -> dict[str, Any]:
    return {"phase": "decode" if made.schedule.due(phase="decode", since=10**6) else "prefill", "ratio": made.ratio}


def _names() -> list[str]:
    names = []
    for base in BASES:
        for outer in ("", *WRAPPERS):
            spec = f"{outer}:{base}" if outer else base
            if spec not in REFUSED and "replay" not in build(spec).needs:
                names.append(spec)
    return names


SPECS = _names()
every = pytest.mark.parametrize("spec", SPECS)
every_permutable = pytest.mark.parametrize("spec", [spec for spec in SPECS if not set(spec.split(":")) & set(OWN_HEADS)])
every_repeatable = pytest.mark.parametrize("spec", [spec for spec in SPECS if "queries" not in build(spec).needs])


@pytest.mark.parametrize("spec", sorted(REFUSED))
def test_what_does_not_go_together_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match=r"use one of them|goes around"):
        build(spec)


@every
def test_the_same_layer_gives_the_same_choice_and_padding_and_other_rows_change_nothing(spec: str) -> None:
    made = build(spec)
    hidden = rows(*LENGTHS)
    together = contexts(hidden, pad=2, **phase(made))
    first, second = decide(made, together), decide(made, together)
    for (a, kept), (b, again) in zip(first, second, strict=True):
        assert torch.equal(kept.index, again.index)
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    for row in range(len(hidden)):
        alone = contexts(hidden[row : row + 1], **phase(made))
        for ctx, one, (stored, kept), (own, own_kept) in zip(together, alone, first, decide(made, alone), strict=True):
            places = kept_tokens(ctx, kept)[row]
            assert places == kept_tokens(one, own_kept)[0]
            pad = stored.keys.shape[2] - own.keys.shape[2]
            for head, chosen in enumerate(places):
                assert chosen == sorted(set(chosen))
                there = torch.tensor(chosen) + pad
                for ours, theirs in ((stored.keys, own.keys), (stored.values, own.values)):
                    torch.testing.assert_close(ours[row, head, there], theirs[0, head, chosen], rtol=1e-4, atol=1e-4)
                moved = stored.positions.expand(stored.shape)[row, head, there]
                assert (moved - pad).tolist() == own.positions.expand(own.shape)[0, head, chosen].tolist()


@every_permutable
def test_heads_in_another_order_keep_the_same(spec: str) -> None:
    made = build(spec)
    order = [1, 0]
    plain = contexts(rows(40, 31), **phase(made))
    turned = [permuted(ctx, order) for ctx in plain]
    for ctx, (stored, kept), (other, other_kept) in zip(plain, decide(made, plain), decide(made, turned), strict=True):
        expected = [[heads[head] for head in order] for heads in kept_tokens(ctx, kept)]
        assert kept_tokens(ctx, other_kept) == expected
        live = kept.mask(stored.shape[2])[:, order]
        torch.testing.assert_close(stored.values[:, order][live], other.values[live], rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999])
def test_counts_are_exact(spec: str, ratio: float) -> None:
    names = set(spec.split(":"))
    made = build(spec, ratio)
    if "per_layer" in names:
        made = replace(made, budget=replace(made.budget, ratios=(ratio,) * LAYERS))
    lengths = (40, 23)
    layers = contexts(rows(*lengths), **phase(made))
    total = torch.zeros(2, dtype=torch.int64)
    for ctx, (_, kept) in zip(layers, decide(made, layers), strict=True):
        places = kept_tokens(ctx, kept)
        assert all(chosen and chosen == sorted(set(chosen)) and chosen[0] >= 0 for heads in places for chosen in heads)
        total += torch.tensor([sum(len(chosen) for chosen in heads) for heads in places])
    if names & set(OWN_COUNTS):
        return
    if isinstance(made.selector, KeepAll):
        wanted = list(lengths)
    elif "per_layer" in names:
        wanted = [kept_of(length, ratio) for length in lengths]
    else:
        wanted = [made.schedule.kept(length, ratio, max(lengths)) for length in lengths]
    assert total.tolist() == [LAYERS * 2 * count for count in wanted]


@every
@pytest.mark.parametrize("lengths", [(1,), (2,), (6, 1)])
def test_the_shortest_rows(spec: str, lengths: tuple[int, ...]) -> None:
    made = build(spec)
    layers = contexts(rows(*lengths), **phase(made))
    for ctx, (_, kept) in zip(layers, decide(made, layers), strict=True):
        for length, heads in zip(lengths, kept_tokens(ctx, kept), strict=True):
            assert all(1 <= len(chosen) <= length for chosen in heads)


@every
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 6), (4, 2, 5), (4, 1, 7)])
def test_grouped_heads_and_odd_widths(spec: str, heads: int, kv_heads: int, dim: int) -> None:
    made = build(spec, heads=heads, kv_heads=kv_heads, dim=dim)
    layers = contexts(rows(33), attention(heads, kv_heads, dim), **phase(made))
    for ctx, (stored, kept) in zip(layers, decide(made, layers), strict=True):
        assert stored.keys.shape == ctx.stored.keys.shape
        assert kept.index.shape[:2] == (1, kv_heads)


@every_repeatable
def test_rows_whose_heads_already_store_different_tokens(spec: str) -> None:
    made = build(spec)
    ctx = context(rows(40, 33), queries=12, phase="decode", ratio=0.5)
    generator = torch.Generator().manual_seed(3)
    kept = Kept.of_mask((torch.rand(ctx.stored.shape, generator=generator) < 0.6) & (ctx.rank >= 0))
    ragged = ctx.restricted(kept.index, kept.live())
    loud = ragged.stored.keys.masked_fill(~kept.live()[..., None], 1e4)
    layers = [replace(ragged, index=index) for index in range(LAYERS)]
    noisy = [replace(each, stored=replace(each.stored, keys=loud)) for each in layers]
    for ctx, (_, one), (_, two) in zip(layers, decide(made, layers), decide(made, noisy), strict=True):
        places = kept_tokens(ctx, one)
        assert places == kept_tokens(ctx, two)
        for lengths, heads in zip(kept.lengths.tolist(), places, strict=True):
            assert all(1 <= len(chosen) <= length and chosen[0] >= 0 for length, chosen in zip(lengths, heads, strict=True))


SINK_SPECS = [f"{outer}{base}" for base in SINKS for outer in ("", "adakv:", "merge:", "chunk:", "chunkkv:", "block:")]


@pytest.mark.parametrize("spec", [spec for spec in SINK_SPECS if spec in SPECS])
def test_sinks_stay(spec: str) -> None:
    made = build(spec)
    sinks = SINKS[spec.split(":")[-1]]
    layers = contexts(rows(*LENGTHS), **phase(made))
    for ctx, (_, kept) in zip(layers, decide(made, layers), strict=True):
        for heads in kept_tokens(ctx, kept):
            assert all(chosen[:sinks] == list(range(sinks)) for chosen in heads)
