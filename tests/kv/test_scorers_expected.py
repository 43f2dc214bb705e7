"""Expected attention by its definition, position by position, in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contexts import Attention, context, rows
from safetensors.torch import save_file
from torch import Tensor

from attnkit._core.errors import InputError, OptionError, ShapeError, UnsupportedArchitecture
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import MUST_STAY
from attnkit.kv.moments import QueryMoments
from attnkit.kv.scorers import load
from attnkit.kv.scorers.expected import CapKV, ExpectedAttention, ExpectedAttentionStats

load()


def by_hand(ctx: ScoreContext, made: ExpectedAttention, layer: Attention) -> Tensor:
    """[Hkv, S] of a context of one row."""
    rope, sinks = layer.rope, made.sinks
    plain = rope.rotate(ctx.queries.transpose(1, 2), -ctx.query_turned).transpose(1, 2)[0].double()
    plain = plain[:, sinks:] if ctx.phase == "prefill" else plain
    mean = plain.mean(1)
    cov = (plain - mean[:, None]).mT @ (plain - mean[:, None]) / plain.shape[1]
    width = plain.shape[-1]
    first = int(ctx.query_turned[0, -1]) + 1
    eye = torch.eye(width, dtype=torch.float64)
    turns = torch.stack(
        [rope.rotate(eye[None, :, None], torch.tensor([[t] * width]))[0, :, 0].T for t in range(first, first + made.horizon)]
    )
    future = torch.einsum("tij,hj->hi", turns, mean) / len(turns)
    if made.rope == "moment":
        second = cov + mean[:, :, None] * mean[:, None]
        around = torch.einsum("tij,hjk,tlk->hil", turns, second, turns) / len(turns) - future[:, :, None] * future[:, None]
    else:
        around = turns.mean(0) @ cov @ turns.mean(0).T
    keys, values = ctx.stored.keys[0].double(), ctx.stored.values[0].double()
    projection = ctx.module.o_proj.weight.double().unflatten(1, (-1, width))
    scores = torch.zeros(keys.shape[:2], dtype=torch.float64)
    for head in range(plain.shape[0]):
        own = head // ctx.groups
        logits = keys[own] @ future[head] * ctx.scale
        if made.covariance:
            logits = logits + ctx.scale**2 / 2 * torch.einsum("sd,de,se->s", keys[own], around[head], keys[own])
        share = torch.zeros_like(logits)
        share[sinks:] = logits[sinks:].softmax(-1)
        norm = {"l2": values[own].norm(dim=-1), "none": torch.ones_like(share)}.get(made.value_norm)
        if norm is None:
            norm = (values[own] @ projection[:, head].T).norm(dim=-1)
        scores[own] += (share + made.eps) * norm / ctx.groups
    return scores


@pytest.mark.parametrize(
    "made",
    [
        ExpectedAttention(horizon=30),
        ExpectedAttention(horizon=30, rope="mean", eps=0.1),
        ExpectedAttention(horizon=7, covariance=False, value_norm="none", sinks=2),
        ExpectedAttention(horizon=30, value_norm="output", eps=0.02),
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("interleaved", "factor"), [(False, 1.0), (True, 1.0), (False, 1.4)])
def test_scores_are_those_of_the_definition(made: ExpectedAttention, phase: str, interleaved: bool, factor: float) -> None:
    layer = Attention()
    layer.rope = replace(layer.rope, interleaved=interleaved, attention_factor=factor)
    ctx = context(rows(40), layer, phase=phase, sinks=made.sinks, queries=None if phase == "prefill" else 9)
    scores = made.score(ctx)[0]
    assert bool((scores[:, : made.sinks] >= MUST_STAY).all())
    expected = by_hand(ctx, made, layer).float()[:, made.sinks :]
    torch.testing.assert_close(scores[:, made.sinks :], expected, rtol=1e-4, atol=1e-6)


def test_a_prompt_of_sinks_alone_keeps_the_newest_of_them() -> None:
    for made in (ExpectedAttention(), CapKV()):
        scores = made.score(context(rows(3)))
        assert scores[0, 0].argsort(descending=True).tolist() == [2, 1, 0]


def test_without_a_rotation_queries_to_come_are_like_those_that_were() -> None:
    ctx = context(rows(30), rope=False)
    moments = QueryMoments()
    moments.update(ctx.queries)
    plain = replace(ctx, moments=moments)
    assert torch.equal(ExpectedAttention(horizon=1).score(plain), ExpectedAttention(horizon=500).score(plain))


def test_a_module_without_an_output_projection_is_refused() -> None:
    ctx = replace(context(rows(20)), module=torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedArchitecture, match=r"needs Linear\.o_proj"):
        ExpectedAttention(value_norm="output").score(ctx)


def test_learnt_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    ctx = context(rows(20))
    save_file({"query_mean": torch.zeros(3, 2, 8), "query_cov": torch.zeros(3, 2, 8, 8)}, tmp_path / "other.safetensors")
    save_file({"query_mean": torch.zeros(3, 2, 8)}, tmp_path / "half.safetensors")
    with pytest.raises(ShapeError, match=r"\(3, 4, 8\) \(layers, query heads, width\)"):
        ExpectedAttentionStats(stats=str(tmp_path / "other.safetensors")).score(ctx)
    with pytest.raises(InputError, match="no tensor 'query_cov'; it has query_mean"):
        ExpectedAttentionStats(stats=str(tmp_path / "half.safetensors")).score(ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"rope": "median"}, "rope"),
        ({"value_norm": "l1"}, "value_norm"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExpectedAttention(**options)  # type: ignore[arg-type]


def test_learnt_moments_have_to_be_given() -> None:
    with pytest.raises(OptionError, match="needs stats"):
        ExpectedAttentionStats()
