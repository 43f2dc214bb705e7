"""From rows with groups and positions to packed rows that stand on keys.

Sorted by (batch, key head, group, position), the keys that a query sees are one range of rows: from the first key of its
group to the last one that is not behind it. So attention over groups is attention of packed sequences, one for each batch
element, key head and group, whose queries stand on given keys. The kernels find the rows by their order; what runs in plain
torch gets copies in that order. Dropped rows are sorted to the end, behind the last boundary, where they belong to no
sequence. Rows without given positions come in their order, and on a GPU they are not sorted but counted. Every size is known
beforehand and nothing is read on the host.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnkit._core.library import define, define_gradient
from attnkit._core.triton.refusals import kernels_refuse
from attnkit.ops.attention.call import AttentionCall
from attnkit.ops.indexed.call import IndexedCall, Side
from attnkit.ops.indexed.counting import can_count, count_rows

__all__ = ["Order", "gather", "order_rows", "packed_call", "scatter", "sort_rows"]


@dataclass(frozen=True)
class Order:
    """One round of a call as packed rows.

    Attributes:
        queries, keys: [B * T * H] and [B * S * Hkv] int32, which row of the flat tensors a packed row is.
        cu_q, cu_k: [B * Hkv * num_groups + 1] int32, where sequences begin.
        q_pos: [B * T * H] int32, the last packed key that a packed query sees; before its sequence it sees none.
    """

    queries: Tensor
    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor
    q_pos: Tensor


def order_rows(call: IndexedCall, index: int = 0) -> Order:
    """The rows of one round: counted on a GPU where that can be, sorted elsewhere, which gives the same."""
    device = call.base.q.device
    counts = device.type == "cuda" and can_count(call) and not kernels_refuse(device, torch.int32)
    return Order(*count_rows(call, index)) if counts else sort_rows(call, index)


def sort_rows(call: IndexedCall, index: int) -> Order:
    """The rows of one round by sorting, whatever the call is."""
    batch, num_q, heads = call.base.q.shape[:3]
    num_k, kv_heads = call.base.k.shape[1:3]
    count = batch * kv_heads * call.num_groups
    if call.queries.pos is None and call.keys.pos is None:
        origin, span = min(0, num_k - num_q), max(num_q, num_k, 1)
    else:
        origin, span = -(2**31), 2**32
    dtype = torch.int32 if (count + 1) * span < 2**31 else torch.int64
    device = call.base.q.device

    def sort_keys(side: Side, rows: int, of: int, first: int, last: bool) -> tuple[Tensor, Tensor]:
        """A number that rises with (sequence, position), sorted, and where each row was; `last`: behind every position."""
        pos = torch.arange(first, first + rows, device=device) if side.pos is None else side.pos
        place = torch.full_like(pos, span - 1, dtype=torch.int64) if last else pos.to(torch.int64) - origin
        head = torch.arange(of, device=device) // (of // kv_heads)
        sequence = (torch.arange(batch, device=device)[:, None, None] * kv_heads + head) * call.num_groups
        kept = None
        if side.groups is not None:
            group = _spread(side.groups[index])
            sequence = sequence + group
            kept = (group >= 0) & (group < call.num_groups)
        if side.keep is not None:
            keep = _spread(side.keep)
            kept = keep if kept is None else kept & keep
        key = sequence * span + _spread(place)
        if kept is not None:
            key = torch.where(kept, key, count * span)
        key = key.to(dtype).expand(batch, rows, of).reshape(-1)
        ordered, where = torch.sort(key, stable=True)
        return ordered, where.int()

    sorted_k, keys = sort_keys(call.keys, num_k, kv_heads, 0, False)
    sorted_q, queries = sort_keys(call.queries, num_q, heads, num_k - num_q, call.causal is None)
    edges = torch.arange(count + 1, device=device, dtype=dtype) * span
    cu_q, cu_k = (torch.searchsorted(rows, edges, out_int32=True) for rows in (sorted_q, sorted_k))
    q_pos = torch.searchsorted(sorted_k, sorted_q, right=call.causal != "strict", out_int32=True) - 1
    return Order(queries, keys, cu_q, cu_k, q_pos)


def _spread(t: Tensor) -> Tensor:
    """[N], [B, N] or [B, N, heads] -> [B or 1, N, heads or 1]."""
    return t[None, :, None] if t.dim() == 1 else t if t.dim() == 3 else t[..., None]


def packed_call(base: AttentionCall, order: Order) -> AttentionCall:
    """The same attention on packed copies of the rows, of one head."""
    q = gather(base.q.flatten(0, 2), order.queries)
    k, v = (gather(t.flatten(0, 2), order.keys) for t in (base.k, base.v))
    places: dict[str, Any] = {"q_pos": order.q_pos, "cu_seqlens_q": order.cu_q, "cu_seqlens_k": order.cu_k}
    return replace(base, q=q[:, None], k=k[:, None], v=v[:, None], right=0, **places)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.index_select(0, order)


def _scatter(x: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x).index_copy_(0, order.long(), x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


# operators, not autograd functions: torch 2.11 loses the gradients of those under torch.compile
_gather_op = define("gather_rows(Tensor x, Tensor order) -> Tensor", _gather, lambda x, order: torch.empty_like(x))
_scatter_op = define("scatter_rows(Tensor x, Tensor order) -> Tensor", _scatter, lambda x, order: torch.empty_like(x))
define_gradient("gather_rows", _save, lambda ctx, grad: (scatter(grad, *ctx.saved_tensors), None))
define_gradient("scatter_rows", _save, lambda ctx, grad: (gather(grad, *ctx.saved_tensors), None))


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Rows `order` of x, where order is a permutation; its gradient writes each row once, where that of indexing would add."""
    return _gather_op(x, order)  # type: ignore[no-any-return]


def scatter(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `gather`: row i of x becomes row order[i]."""
    return _scatter_op(x, order)  # type: ignore[no-any-return]
