"""Queries and keys whose scores have a known kind of structure, which is what sparse attention lives on.

"gauss": scores are normal with variance 6; a row chooses few keys, but all over the place, so that hardly a tile is empty.
"flat": scores are so nearly equal that every row chooses about all of its keys, which is the worst case. "empty95" and its
like: scores as in "gauss", and beside them a bonus that grows with a key's position, so that the causal mask leaves a band of
keys near the row, and a first key that every row likes (a sink). The slope of the bonus is looked for so that about 95 % of
the causal tiles of 64 x 64 hold nothing; short sequences come as near as the diagonal and the sink let them.

The bonus is exact in 16 bits: a position is written in three digits, each of which is a small integer, and the weights of the
digits are powers of two apart.
"""

import math

import torch
from torch import Tensor

from attnkit import ops
from attnkit.lab.bench.inputs import normal

__all__ = ["EMPTY", "REGIMES", "TILE", "structured"]

TILE = 64
VARIANCE = 6.0
EMPTY = {"empty60": 0.60, "empty80": 0.80, "empty90": 0.90, "empty95": 0.95}
REGIMES = ("gauss", *EMPTY, "flat")

_DIGITS = (4096, 64, 1)  # what the digits of a position are worth
_STRUCTURE = 2 * len(_DIGITS) + 1  # dimensions that are not content: digits for all keys, digits for sinks, a constant
_SINKS = 1  # keys of the first tile
_SINK_LEAD = 2.75 * math.sqrt(VARIANCE)  # of a sink, over the mean of the scores next to the row
_SAMPLED = 6  # tiles of rows that the slope is looked for with
_STEPS = 9
_STEEPEST, _FLATTEST = 2.0**-4, 2.0**-18  # score a token


def structured(
    regime: str,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    alpha: float,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Queries [B, H, T, D] and keys [B, Hkv, T, D] of a regime.

    Args:
        alpha: of the entmax for which tiles are to be empty.
        dtype: of the result; what is drawn is rounded to it before the slope is looked for.
    """
    q, k = normal(q_shape, generator, dtype), normal(k_shape, generator, dtype)
    width, length = q_shape[-1], q_shape[-2]
    if regime == "gauss":
        return q.mul_(math.sqrt(VARIANCE)), k
    if regime == "flat":
        return q.mul_(0.5 / math.sqrt(max(length, 1))), k
    q[..., _STRUCTURE:] *= math.sqrt(VARIANCE * width / (width - _STRUCTURE))
    digits = _digits(length, q)
    root = math.sqrt(width)
    own, sink, level = slice(0, 3), slice(3, 6), 6
    q[..., sink], q[..., level] = digits, root
    k[..., own], k[..., sink], k[..., level] = digits, 0, 0
    few = slice(0, min(_SINKS, length))
    k[..., few, :] = 0
    k[..., few, level] = _SINK_LEAD
    slope = _slope(q[0, 0], k[0, 0], EMPTY[regime], alpha)
    weights = _weights(slope, root, q)
    q[..., own], k[..., few, sink] = weights, weights
    return q, k


def _digits(length: int, like: Tensor) -> Tensor:
    """[T, 3], the digits of every position."""
    pos = torch.arange(length, device=like.device)
    return torch.stack([pos // 4096, pos // 64 % 64, pos % 64], -1).to(like.dtype)


def _weights(slope: float, root: float, like: Tensor) -> Tensor:
    """[3], what digits are multiplied with for scores that rise by `slope` a token, exactly representable."""
    one = float(torch.tensor(slope * root, dtype=torch.float32).bfloat16())
    return torch.tensor(_DIGITS, dtype=torch.float64, device=like.device).mul(one).to(like.dtype)


def _slope(q: Tensor, k: Tensor, wanted: float, alpha: float) -> float:
    """The score a token that leaves the wanted share of one head's tiles empty, by bisection on some of its tiles of rows."""
    length = q.shape[0]
    tiles = -(-length // TILE)
    chosen = sorted({int((i + 0.5) * tiles / min(tiles, _SAMPLED)) for i in range(min(tiles, _SAMPLED))})
    rows = torch.cat([torch.arange(tile * TILE, min((tile + 1) * TILE, length), device=q.device) for tile in chosen])
    keys = torch.arange(length, device=q.device)
    content = _content(q[rows], k)
    content.masked_fill_(keys > rows[:, None], -torch.inf)
    # relative to the row: a key is behind it by so many tokens, a sink is not
    behind = (rows[:, None] - keys).float().masked_fill_(keys < _SINKS, 0)
    low, high = math.log2(_FLATTEST), math.log2(_STEEPEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _empty(content - 2**middle * behind, rows, alpha) < wanted:
            low = middle
        else:
            high = middle
    return float(2 ** ((low + high) / 2))


def _content(q: Tensor, k: Tensor) -> Tensor:
    """Scores without the bonus, float32."""
    return (q[:, _STRUCTURE - 1 :].float() @ k[:, _STRUCTURE - 1 :].float().T) / math.sqrt(q.shape[1])


def _empty(scores: Tensor, rows: Tensor, alpha: float) -> float:
    """The share of the causal tiles of some tiles of rows that hold nothing."""
    tau = ops.entmax_threshold(scores, alpha)
    hit = torch.nn.functional.pad((alpha - 1) * scores > tau, (0, -scores.shape[1] % TILE))
    by_tile = hit.unflatten(1, (-1, TILE)).any(2)  # [rows, tiles]
    owner = rows // TILE
    live = walked = 0
    for tile in owner.unique().tolist():
        live += int(by_tile[owner == tile].any(0).sum())
        walked += int(tile) + 1
    return 1 - live / walked
