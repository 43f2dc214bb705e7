"""The indexed operators by their definition: the whole score matrix of every head under an explicit mask."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.indexed.call import IndexedCall, Side

__all__ = ["count_seen", "reference"]


def reference(call: IndexedCall) -> tuple[Tensor, Tensor]:
    """The defining formula, differentiable by autograd, in the call's dtype (see `attention.reference`)."""
    base = call.base
    acc, group = accumulator_dtype(base.q.dtype), base.q.shape[2] // base.k.shape[2]
    count = count_seen(call)  # [B, H, T, S]
    seen = count > 0
    unused = ~seen.any(-2)[..., None]  # a key that no row sees may hold anything
    q, k, v = (t.transpose(1, 2).to(acc) for t in (base.q, base.k, base.v))
    k, v = (t.repeat_interleave(group, 1).masked_fill(unused, 0) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * base.scale
    if base.softcap:
        scores = base.softcap * torch.tanh(scores / base.softcap)
    scores = (scores + count.clamp(min=1).to(acc).log()).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)  # keeps the gradient of rows that see nothing finite
    lse = torch.logsumexp(scores, -1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    prob = torch.exp(scores - lse).masked_fill(empty, 0)
    out = prob.to(base.q.dtype).to(acc) @ v
    return out.transpose(1, 2).to(base.out_dtype), lse.masked_fill(empty, -torch.inf)[..., 0].transpose(1, 2)


def count_seen(call: IndexedCall) -> Tensor:
    """[B, H, T, S] int: in how many rounds a query sees a key, from the definition."""
    (batch, num_q, heads), (num_k, kv_heads) = call.base.q.shape[:3], call.base.k.shape[1:3]

    def rows(t: Tensor | int | bool, side: str) -> Tensor:
        """[N], [B, N] or [B, N, heads] -> [B, H, T, 1] or [B, H, 1, S]."""
        num, of = (num_q, heads) if side == "q" else (num_k, kv_heads)
        t = torch.as_tensor(t, device=call.base.q.device)
        t = t[None, :, None] if t.dim() == 1 else t if t.dim() != 2 else t[..., None]
        t = t.expand(batch, num, of).transpose(1, 2).repeat_interleave(heads // of, 1)
        return t[..., None] if side == "q" else t[..., None, :]

    def position(side: Side, name: str) -> Tensor:
        default = torch.arange(num_q) + num_k - num_q if name == "q" else torch.arange(num_k)
        return rows(default.to(call.base.q.device) if side.pos is None else side.pos.long(), name)

    q_pos, k_pos = position(call.queries, "q"), position(call.keys, "k")
    allowed = torch.ones_like(q_pos >= k_pos)
    if call.causal is not None:
        allowed = k_pos < q_pos if call.causal == "strict" else k_pos <= q_pos
    for side, name in ((call.queries, "q"), (call.keys, "k")):
        if side.keep is not None:
            allowed = allowed & rows(side.keep, name)
    if call.queries.groups is None or call.keys.groups is None:
        return allowed.int()
    total = torch.zeros_like(allowed, dtype=torch.int32)
    for q_group, k_group in zip(call.queries.groups, call.keys.groups, strict=True):
        mine = rows(q_group, "q")
        total = total + (allowed & (mine == rows(k_group, "k")) & (mine >= 0) & (mine < call.num_groups))
    return total
