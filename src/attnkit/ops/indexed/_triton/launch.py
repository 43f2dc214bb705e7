"""Launching the counting sort. No host synchronisation."""

import torch
from torch import Tensor

from attnkit._core.triton.launcher import launch, power_of_two
from attnkit.ops.indexed._triton import kernels
from attnkit.ops.indexed.counting import TILE_ROWS

__all__ = ["order"]

_CELLS = 32  # heads x words of 4 groups of a tile; eight heads of 32 bits are what memory gives at once
_WARPS = 8
_FLAT = 1024  # rows of a block of dropped ones


def order(
    q: Tensor,
    k: Tensor,
    q_group: Tensor | None,
    q_keep: Tensor | None,
    k_group: Tensor | None,
    k_keep: Tensor | None,
    num_groups: int,
    causal: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of an `Order`, of rows in the order of their positions."""
    batch, num_q, heads = q.shape[:3]
    num_k, kv_heads = k.shape[1:3]
    rows_q, rows_k, sequences = batch * num_q * heads, batch * num_k * kv_heads, batch * kv_heads * num_groups
    queries, keys, q_pos = (torch.empty(n, dtype=torch.int32, device=q.device) for n in (rows_q, rows_k, rows_q))
    cu_q, cu_k = (torch.empty(sequences + 1, dtype=torch.int32, device=q.device) for _ in range(2))
    if not sequences:
        return queries, keys, cu_q.zero_(), cu_k.zero_(), q_pos
    strict = causal == "strict"
    share = power_of_two(heads // kv_heads)
    words = power_of_two(-(-num_groups // 4))
    block_h = min(8, _CELLS // words, power_of_two(kv_heads))
    tiles = max(1, -(-(max(num_q, num_k) + strict) // (TILE_ROWS // share)))
    # where all rows are kept nobody looks for dropped ones
    q_blocks, k_blocks = (
        0 if group is None and keep is None else -(-rows // _FLAT)
        for group, keep, rows in ((q_group, q_keep, rows_q), (k_group, k_keep, rows_k))
    )
    counts = torch.empty(1 + 2 * sequences * tiles + q_blocks + k_blocks, dtype=torch.int32, device=q.device)
    sides = ((q_group, q_keep), (k_group, k_keep))
    tables = [None if t is None else t.view(torch.uint8) if t.dtype == torch.bool else t for side in sides for t in side]
    sizes = (batch, num_q, num_k, heads, kv_heads, num_groups, tiles, q_blocks)
    strides = [n for t in tables for n in _strides(t)]
    blocks = {"BLOCK_R": TILE_ROWS, "SHARE": share, "BLOCK_H": block_h, "BLOCK_W": words, "BLOCK_F": _FLAT}
    grid = (batch * tiles * -(-kv_heads // block_h) + q_blocks + k_blocks,)
    for place in (False, True):
        if place:
            counts = torch.cumsum(counts, 0, dtype=torch.int32)
        flags = {"PLACE": place, "CAUSAL": causal is not None, "STRICT": strict, **blocks}
        launch(
            kernels.order,
            grid,
            (*tables, counts, queries, keys, cu_q, cu_k, q_pos, *sizes, *strides),
            flags,
            num_warps=_WARPS,
            num_stages=1,
        )
    return queries, keys, cu_q, cu_k, q_pos


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """Those of [N], [B, N] or [B, N, heads] as of [B, N, heads]."""
    if t is None:
        return 0, 0, 0
    return {1: (0, *t.stride(), 0), 2: (*t.stride(), 0)}.get(t.dim(), t.stride())
