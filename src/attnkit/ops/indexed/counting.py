"""The order of rows by counting: a private torch operator, for rows that come in the order of their positions."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.devices import current
from attnkit._core.library import define
from attnkit.ops.indexed.call import IndexedCall, Side

__all__ = ["TILE_ROWS", "can_count", "count_rows"]

TILE_ROWS = 128  # of one key head, those of all its query heads together; a byte counts them
_GROUPS = 64  # a tile has counts of all


def can_count(call: IndexedCall) -> bool:
    """Whether the kernel can order the rows of a call: no given positions, few groups, and 32 bits are enough."""
    (batch, num_q, heads), (num_k, kv_heads) = call.base.q.shape[:3], call.base.k.shape[1:3]
    shared = heads // kv_heads
    if call.queries.pos is not None or call.keys.pos is not None or call.num_groups > _GROUPS or shared > TILE_ROWS:
        return False
    tiles = 1 + 2 * shared * (max(num_q, num_k) + 1) // TILE_ROWS  # or fewer
    counts = 2 * batch * kv_heads * call.num_groups * tiles
    return batch * (num_q * heads + num_k * kv_heads) + counts < 2**31


def count_rows(call: IndexedCall, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of the `Order` of one round of a call, whatever device it is on."""
    tables = [t for side in (call.queries, call.keys) for t in (_groups(side, index), side.keep)]
    return _operator(call.base.q, call.base.k, *tables, call.num_groups, call.causal)  # type: ignore[no-any-return]


def _groups(side: Side, index: int) -> Tensor | None:
    return None if side.groups is None else side.groups[index]


def _run(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from attnkit.ops.indexed._triton import launch  # Triton is optional

    with current(q.device):
        return launch.order(q, *args)


def _fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows_q, rows_k = (t.shape[0] * t.shape[1] * t.shape[2] for t in (q, k))
    edges = k.shape[0] * k.shape[2] * args[4] + 1
    return tuple(q.new_empty(size, dtype=torch.int32) for size in (rows_q, rows_k, edges, edges, rows_q))


_operator = define(
    "order_rows_triton(Tensor q, Tensor k, Tensor? q_group, Tensor? q_keep, Tensor? k_group, Tensor? k_keep, SymInt num_groups,"
    " str? causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
