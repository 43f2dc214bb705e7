"""Attention matching and the summary of evicted keys: less error than dropping keys, exact where it must be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import errors, ops
from attnkit.kv import compaction, evicted_moments, match_attention, moment_partial


def _inputs(kind: str, *, queries: int = 48, keys: int = 96, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [2, 4, m, D], keys and values [2, 2, S, D]; "clusters" has keys in eight groups, near to each other."""
    k, v = torch.randn(2, 2, keys, width), torch.randn(2, 2, keys, width)
    if kind == "clusters":
        k = 2 * torch.randn(2, 2, 8, width).repeat(1, 1, keys // 8, 1) + 0.3 * k
    return 1.5 * torch.randn(2, 4, queries, width), k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias.repeat_interleave(group, 1)[:, :, None]
    return torch.softmax(scores, -1) @ v.repeat_interleave(group, 1)


def _chosen(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[-1]))


@pytest.mark.parametrize("kind", ["random", "clusters"])
@pytest.mark.parametrize("size", [12, 24, 48])
def test_less_error_than_the_same_keys_alone(kind: str, size: int) -> None:
    """On the queries that were matched, and on others like them."""
    q, k, v = _inputs(kind, queries=256)
    seen, unseen = q[:, :, :128], q[:, :, 128:]
    small = match_attention(seen, k, v, size)
    assert (small.index.diff(dim=-1) > 0).all()
    assert small.bias.abs().max() <= compaction.LARGEST_BIAS + 1e-6
    kept, plain = _chosen(k, small.index), _chosen(v, small.index)
    for queries, factor in ((seen, 0.9), (unseen, 1.0)):
        whole = _attend(queries, k, v)
        matched = (_attend(queries, kept, small.values, small.bias) - whole).square().mean()
        dropped = (_attend(queries, kept, plain) - whole).square().mean()
        assert matched < factor * dropped


def test_keys_are_those_that_attention_sees() -> None:
    q, k, v = _inputs("random")
    small = match_attention(q, k, v, 10)
    prob = torch.softmax(q @ k.repeat_interleave(2, 1).mT / 4, -1)
    strength = prob.square().mean(2).unflatten(1, (2, 2)).mean(2)
    assert torch.equal(small.index, strength.topk(10).indices.sort().values)


def test_all_keys_stay_what_they_are() -> None:
    q, k, v = (t.double() for t in _inputs("random"))
    small = match_attention(q, k, v, 96)
    assert small.bias.abs().max() < 1e-12
    torch.testing.assert_close(small.values, v)


def test_masses_are_the_bounded_least_squares() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    q, k, _ = _inputs("clusters")
    prob = torch.softmax(q[0, 0] @ k[0, 0].mT / 4, -1).double()[:, :20]
    found = compaction._masses(prob[None])[0]
    bounds = (math.exp(-compaction.LARGEST_BIAS), math.exp(compaction.LARGEST_BIAS))
    best = optimize.lsq_linear(prob.numpy(), torch.ones(48).numpy(), bounds=bounds, tol=1e-12)
    cost = 0.5 * float((prob @ found - 1).square().sum())
    assert bounds[0] - 1e-9 <= float(found.min())
    assert float(found.max()) <= bounds[1] + 1e-9
    assert cost <= 1.01 * best.cost + 1e-9
    assert cost < 0.9 * 0.5 * float((prob.sum(1) - 1).square().sum())


def test_values_are_the_ridge_solution() -> None:
    """A zero gradient of |P V' - O|^2 + level |V' - V|^2."""
    q, k, v = (t.double() for t in _inputs("random"))
    small = match_attention(q, k, v, 20, ridge=0.01)
    rows = q.reshape(2, 2, -1, 16)
    scores = rows @ k.mT / 4
    own = torch.softmax(
        scores.gather(-1, small.index[:, :, None].expand(-1, -1, rows.shape[2], -1)) + small.bias[:, :, None], -1
    )
    gram = own.mT @ own
    level = 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    slope = own.mT @ (own @ small.values - torch.softmax(scores, -1) @ v) + level * (small.values - _chosen(v, small.index))
    assert slope.abs().max() < 1e-10


def test_the_summary_is_exact_for_equal_keys() -> None:
    """Keys that are all the same attend like one, with the logarithm of their number."""
    q, k, v = (t.double() for t in _inputs("random"))
    k[:] = k[:, :, :1]
    evicted = torch.ones(2, 2, 96, dtype=torch.bool)
    evicted[:, :, ::3] = False
    out, lse = moment_partial(q, evicted_moments(k, v, evicted))
    kept = v[:, :, evicted[0, 0]]
    torch.testing.assert_close(out, _attend(q, k[:, :, :64], kept))
    wanted = (q @ k[:, :, :1].repeat_interleave(2, 1).mT)[..., 0] / 4 + math.log(64)
    torch.testing.assert_close(lse, wanted)


def test_the_summary_is_of_first_order() -> None:
    """Halving the spread of keys quarters the error of what they give, which stays that of the first order."""
    q, k, v = (t.double() for t in _inputs("random"))
    evicted = torch.ones(2, 2, 96, dtype=torch.bool)
    errors_found = []
    for spread in (0.2, 0.1, 0.05):
        near = 1 + spread * k
        out, _ = moment_partial(q, evicted_moments(near, v, evicted))
        errors_found.append(float((out - _attend(q, near, v)).abs().mean()))
    assert 3.5 < errors_found[0] / errors_found[1] < 4.7
    assert 3.5 < errors_found[1] / errors_found[2] < 4.5


def test_the_summary_merges_with_what_is_kept() -> None:
    q, k, v = _inputs("clusters")
    k = 0.3 * k
    evicted = torch.ones(2, 2, 96, dtype=torch.bool)
    evicted[:, :, :32] = False
    evicted[1, 1] = False
    whole = _attend(q, k, v)
    visible = torch.where(evicted, -torch.inf, 0.0)
    dropped = _attend(q, k, v, visible)
    scores = q @ k.repeat_interleave(2, 1).mT / 4 + visible.repeat_interleave(2, 1)[:, :, None]
    out, lse = moment_partial(q, evicted_moments(k, v, evicted))
    merged, _ = ops.merge_partials(torch.stack([dropped, out]), torch.stack([scores.logsumexp(-1), lse]))
    assert (merged - whole).square().mean() < 0.1 * (dropped - whole).square().mean()
    assert torch.isneginf(lse[1, 2:]).all()
    torch.testing.assert_close(merged[1, 2:], whole[1, 2:])


def test_refusals() -> None:
    q, k, v = _inputs("random")
    calls: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (errors.OptionError, "size=0", {"size": 0}),
        (errors.OptionError, "size=97", {"size": 97}),
        (errors.OptionError, "ridge=0", {"ridge": 0.0}),
        (errors.ShapeError, "multiple of Hkv", {"queries": q[:, :3]}),
        (errors.ShapeError, "m at least 1", {"queries": q[:, :, :0]}),
        (errors.DTypeError, "values is float64", {"values": v.double()}),
    )
    for kind, words, changes in calls:
        with pytest.raises(kind, match=words):
            match_attention(**{"queries": q, "keys": k, "values": v, "size": 8} | changes)
    with pytest.raises(errors.ShapeError, match="queries has shape"):
        moment_partial(q[:, :3], evicted_moments(k, v, torch.ones(2, 2, 96, dtype=torch.bool)))
    with pytest.raises(errors.DTypeError, match="evicted is float32"):
        evicted_moments(k, v, torch.ones(2, 2, 96))
