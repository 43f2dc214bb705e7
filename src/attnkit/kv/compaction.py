"""Fewer keys that attend like all of them: chosen keys with a bias and refitted values, and a summary of the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype, check_same, dims
from attnkit._core.errors import OptionError, ShapeError
from attnkit.kv.selectors import best

__all__ = ["CompactKeys", "EvictedMoments", "evicted_moments", "fit_attention", "match_attention", "moment_partial"]

LARGEST_BIAS = 3.0
STEPS = 200  # of the fit of masses


@dataclass(frozen=True)
class CompactKeys:
    """What stands for S keys.

    Attributes:
        index: [B, Hkv, t] int64, the keys that were chosen, ascending.
        values: [B, Hkv, t, Dv] in the dtype of the values given.
        bias: [B, Hkv, t] in the accumulation dtype, added to a key's scaled scores.
    """

    index: Tensor
    values: Tensor
    bias: Tensor


def match_attention(
    queries: Tensor, keys: Tensor, values: Tensor, size: int, *, scale: float | None = None, ridge: float = 1e-3
) -> CompactKeys:
    """Choose t keys, and fit biases and values so that the queries given see nearly what they saw of all keys.

    The keys are those with the largest root mean square of probabilities over the queries of their group. With A the
    probabilities over all S keys, restricted to the chosen ones, weights w = exp(bias) minimise the square of A w - 1, which
    keeps each query's mass, within biases of -3 to 3. Values then minimise the square of P V' - O and ridge times
    mean(diag P^T P) times that of V' - V, with P the probabilities over the chosen keys with their bias, O the outputs over
    all keys and V the chosen keys' own values.

    Args:
        queries: [B, H, m, D], a sample of what will be asked, rotated; H is a multiple of Hkv.
        keys, values: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        size: t, in 1..S.
        scale: of scores; 1 / sqrt(D) by default.
        ridge: how strongly values hold on to their own, above 0.
    Returns:
        CompactKeys; with t = S every bias is 0 and every value its own, up to rounding.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
    Complexity: memory of a key head's G m S probabilities, in float64 for what is fitted; t^3 for the values.
    Source: Attention Matching (arXiv:2602.16284); masses are fitted relative to each query's own, values in float64.
    """
    sizes = dims(queries=(queries, "B H m D"), keys=(keys, "B Hkv S D"), values=(values, "B Hkv S Dv"))
    check_dtype("queries", queries, *FLOATS)
    check_same(queries=queries, keys=keys, values=values)
    batch, heads, kv_heads = sizes["B"], sizes["H"], sizes["Hkv"]
    if kv_heads == 0 or heads % kv_heads or sizes["m"] == 0:
        raise ShapeError(f"queries has shape {tuple(queries.shape)}; H must be a multiple of Hkv = {kv_heads}, m at least 1")
    if not 1 <= size <= sizes["S"]:
        raise OptionError(f"size={size} is not allowed; choose from 1 to S = {sizes['S']}")
    if not ridge > 0:
        raise OptionError(f"ridge={ridge} is not allowed; give a number above 0")
    wide = accumulator_dtype(keys.dtype)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    rows = queries.to(wide).reshape(batch, kv_heads, -1, sizes["D"])  # all queries of a group ask the same keys
    scores = scale * rows @ keys.to(wide).mT
    prob = torch.softmax(scores, -1)
    index = best(prob.square().mean(-2), size).index
    fitted, bias = fit_attention(scores, values, index, ridge=ridge)
    return CompactKeys(index, fitted, bias)


def fit_attention(
    scores: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    live: Tensor | None = None,
    asked: Tensor | None = None,
    ridge: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Biases and values for keys that are chosen already; see `match_attention`.

    Args:
        scores: [..., r, S] in the accumulation dtype, of the queries of a group and all keys, -inf for what is no key.
        values: [..., S, Dv].
        index: [..., t] int64, the chosen keys.
        live: [..., t] bool, which entries of `index` count; None when all do.
        asked: [..., r] bool, which queries count; None when all do.
        ridge: how strongly values hold on to their own, above 0.
    Returns:
        values [..., t, Dv] in their dtype and bias [..., t] in that of the scores, 0 where an entry does not count.
    """
    wide = scores.dtype
    here = torch.ones_like(index, dtype=torch.bool) if live is None else live
    counted = torch.ones_like(scores[..., 0], dtype=torch.bool) if asked is None else asked
    prob = torch.softmax(scores, -1).nan_to_num(0.0) * counted[..., None]
    columns = index[..., None, :].expand(*prob.shape[:-1], index.shape[-1])
    bias = _masses(prob.gather(-1, columns) * here[..., None, :]).log()  # what does not count keeps its weight of 1
    kept = values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1])).to(wide)
    chosen = (scores.gather(-1, columns) + bias.to(wide)[..., None, :]).masked_fill(~here[..., None, :], -torch.inf)
    own = (torch.softmax(chosen, -1).nan_to_num(0.0) * counted[..., None]).double()
    missing = (prob @ values.to(wide)).double() - own @ kept.double()
    gram = own.mT @ own
    level = ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / here.sum(-1).clamp(min=1)
    level = level.clamp(min=torch.finfo(torch.float64).tiny)
    gram = gram + level[..., None, None] * torch.eye(index.shape[-1], dtype=gram.dtype, device=gram.device)
    change = torch.cholesky_solve(own.mT @ missing, torch.linalg.cholesky(gram))
    return (kept + change).to(values.dtype), bias.to(wide)


def _masses(prob: Tensor) -> Tensor:
    """w [..., t] float64 with |log w| <= LARGEST_BIAS that minimises |prob w - 1|^2, by accelerated projected gradients.

    It starts from 1, where keys have no bias. The step is the inverse of the largest row sum of the (non-negative) Gram
    matrix, which is never below its largest eigenvalue; momentum starts anew where it points uphill.
    """
    prob = prob.double()
    gram = prob.mT @ prob
    target = prob.sum(-2)
    step = 1 / gram.sum(-1).amax(-1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    low, high = torch.exp(torch.tensor((-LARGEST_BIAS, LARGEST_BIAS), dtype=gram.dtype)).tolist()
    weight = ahead = torch.ones_like(target)
    pace = torch.ones_like(step)
    for _ in range(STEPS):
        slope = (gram @ ahead[..., None])[..., 0] - target
        new = (ahead - step * slope).clamp(low, high)
        uphill = ((ahead - new) * (new - weight)).sum(-1, keepdim=True) > 0
        pace = torch.where(uphill, 1.0, pace)
        faster = (1 + torch.sqrt(1 + 4 * pace.square())) / 2
        ahead = torch.where(uphill, new, new + (pace - 1) / faster * (new - weight))
        weight, pace = new, faster
    return weight


@dataclass(frozen=True)
class EvictedMoments:
    """What is kept of evicted keys, in the accumulation dtype.

    Attributes:
        count: [B, Hkv], how many.
        key, value: [B, Hkv, D] and [B, Hkv, Dv], their means; 0 where there is none.
        cross: [B, Hkv, Dv, D], the covariance of values and keys.
    """

    count: Tensor
    key: Tensor
    value: Tensor
    cross: Tensor


def evicted_moments(keys: Tensor, values: Tensor, evicted: Tensor) -> EvictedMoments:
    """Count, means and value-key covariance of the keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] that `evicted` marks.

    Args:
        evicted: [B, Hkv, S] bool.
    Raises:
        ShapeError, DTypeError: an argument is wrong.
    """
    dims(keys=(keys, "B Hkv S D"), values=(values, "B Hkv S Dv"), evicted=(evicted, "B Hkv S"))
    check_dtype("evicted", evicted, torch.bool)
    check_dtype("keys", keys, *FLOATS)
    check_same(keys=keys, values=values)
    wide = accumulator_dtype(keys.dtype)
    count = evicted.sum(-1).to(wide)
    share = evicted.to(wide) / count.clamp(min=1)[..., None]  # 1 / N of those that are marked
    key, value = ((share[..., None, :] @ t.to(wide))[..., 0, :] for t in (keys, values))
    cross = ((values.to(wide) - value[..., None, :]) * share[..., None]).mT @ (keys.to(wide) - key[..., None, :])
    return EvictedMoments(count, key, value, cross)


def moment_partial(queries: Tensor, evicted: EvictedMoments, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention over evicted keys to first order in what each differs from their mean by.

    out = value + scale cross q;  lse = log N + scale q . key

    Args:
        queries: [B, H, m, D], H a multiple of Hkv.
        evicted: as `evicted_moments` made it.
        scale: of scores; 1 / sqrt(D) by default.
    Returns:
        out [B, H, m, Dv] and lse [B, H, m] in the accumulation dtype, 0 and -inf where nothing was evicted: one part more for
        `attnkit.ops.merge_partials`.
    Raises:
        ShapeError: queries do not fit the moments.
    Source: the first-order expansion of softmax attention around the mean key; MomentKV (arXiv:2606.01563) keeps these moments.
    """
    batch, kv_heads, width = evicted.key.shape
    if queries.dim() != 4 or queries.shape[::3] != (batch, width) or queries.shape[1] % kv_heads:
        raise ShapeError(
            f"queries has shape {tuple(queries.shape)}; expected [{batch}, H, m, {width}], H a multiple of {kv_heads}"
        )
    scale = width**-0.5 if scale is None else scale
    rows = scale * queries.to(evicted.key.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, Hkv, G m, D]
    out = evicted.value[..., None, :] + rows @ evicted.cross.mT
    lse = evicted.count.log()[..., None] + (rows @ evicted.key[..., None])[..., 0]
    shape = queries.shape[:3]
    return out.reshape(*shape, -1), lse.reshape(shape)
