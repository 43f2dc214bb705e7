"""How much of entmax attention is zero: by element, by tile and by row."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.ops.attention.problem import Problem
from attnkit.ops.entmax_attention.blockwise import TileScores, exponents
from attnkit.ops.entmax_attention.call import EntmaxAttentionCall

if TYPE_CHECKING:
    from attnkit.ops.entmax_attention.api import EntmaxAttentionResult

__all__ = ["attention_sparsity", "measure"]

TILE = 64


@torch.no_grad()
def measure(call: EntmaxAttentionCall, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the thresholds of a call: `support`, `seen` and `tiles` of `EntmaxAttentionResult`, by one more walk."""
    packed = call.cu_seqlens_q is not None
    q, k, v, key_bias = call.q, call.k, call.v, call.key_bias
    if packed:
        q, k, v, tau, key_bias = q[None], k[None], v[None], tau[None], None if key_bias is None else key_bias[None]
    p = Problem.of(
        q, k, v, None, key_bias, call.cu_seqlens_q, call.cu_seqlens_k, None,
        call.scale, call.left, call.right, call.softcap, block_q=TILE,
    )  # fmt: skip
    own = exponents(p, call.alphas, call.alpha)
    support, seen = (torch.zeros(tau.shape, dtype=torch.int32, device=tau.device) for _ in range(2))
    tiles = torch.zeros(p.kv_heads, p.group, 2, dtype=torch.int64, device=tau.device)
    tau_view, support_view, seen_view = (p.grouped(t[..., None]) for t in (tau, support, seen))
    for rows, runs in p.tiles(None):
        if not runs:
            continue
        hits = []
        for _, z in TileScores(p, p.queries(rows), rows, runs, own, cached=False).walk():
            hit = z > tau_view[..., rows, :]
            support_view[..., rows, :] += hit.sum(-1, keepdim=True, dtype=torch.int32)
            seen_view[..., rows, :] += (z > -torch.inf).sum(-1, keepdim=True, dtype=torch.int32)
            hits.append(hit.any(-2))
        columns = torch.cat(hits, -1)  # [B, Hkv, G, keys]
        live = F.pad(columns, (0, -columns.shape[-1] % TILE)).unflatten(-1, (-1, TILE)).any(-1)
        tiles[..., 0] += live.sum((0, 3))
        tiles[..., 1] += live.shape[0] * live.shape[3]
    tiles = tiles.flatten(0, 1)
    return (support[0], seen[0], tiles) if packed else (support, seen, tiles)


def attention_sparsity(result: "EntmaxAttentionResult") -> Mapping[str, Tensor]:
    """What share of attention is exactly zero, by head.

    Args:
        result: of `entmax_attention(..., return_aux=True)`.
    Returns:
        "element": [H], the share of seen pairs of a row and a key that got nothing. "tile": [H], the share of tiles of 64 rows
        and 64 keys where every pair got nothing, which a kernel may skip. "support": [H], keys that a row with any chose, on
        average. All float64; NaN where nothing is seen.

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (8 * torch.randn(1, 300, 2, 16) for _ in range(3))
    >>> found = ops.attention_sparsity(ops.entmax_attention(q, k, v, causal=True, return_aux=True))
    >>> bool((found["element"] > 0.9).all())
    True
    """
    support, seen = (t.flatten(0, -2).double() for t in (result.support, result.seen))
    live, walked = result.tiles.double().unbind(-1)
    return {
        "element": 1 - support.sum(0) / seen.sum(0),
        "tile": 1 - live / walked,
        "support": support.sum(0) / (seen > 0).sum(0),
    }
