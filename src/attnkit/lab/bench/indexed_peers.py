"""Who races hash buckets and dropped rows: what computes the same thing, sorting and masks included."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.lab.bench.race import Operator, Peer, Shape
from attnkit.ops.indexed.call import prepare_hash
from attnkit.ops.indexed.rows import gather, order_rows, scatter

__all__ = ["HASH_PEERS", "QK_PEERS"]

_LONGEST_MASK = 4096  # tokens up to which somebody would write a mask down


def _few_tokens(shape: Shape) -> list[str]:
    return [f"a mask of T x T for every head; up to {_LONGEST_MASK} tokens"] if shape.sizes["T"] > _LONGEST_MASK else []


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Torch's interface with an explicit mask [B, H, T, T]; a row that sees nothing gives 0."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=q.shape[2] != k.shape[2])
    return torch.where(seen.any(-1, keepdim=True), out, 0).transpose(1, 2)


def _causal(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()


def _each_head(t: Tensor, heads: int) -> Tensor:
    """[B, T, Hkv] -> [B, H, T]."""
    return t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2)


def _masked_hash(shape: Shape) -> Operator:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        mine, theirs = q_bucket.transpose(1, 2)[..., None], _each_head(k_bucket, q.shape[2])[..., None, :]
        return _sdpa(q, k, v, (mine == theirs) & _causal(q.shape[1], q.device))

    return attend


def _masked_qk(shape: Shape) -> Operator:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_keep: Tensor, k_keep: Tensor) -> Tensor:
        kept = q_keep.transpose(1, 2)[..., None] & _each_head(k_keep, q.shape[2])[..., None, :]
        return _sdpa(q, k, v, kept & _causal(q.shape[1], q.device))

    return attend


def _flex(shape: Shape) -> Operator:
    """FlexAttention on rows sorted by bucket; the block mask is a new one for every call, as hashes are."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        heads = q.shape[2]
        bucket, order = torch.sort(_each_head(k_bucket, heads), stable=True)  # [B, H, T]

        def sort(t: Tensor) -> Tensor:
            rows = t.transpose(1, 2).repeat_interleave(heads // t.shape[2], 1)
            return rows.gather(2, order[..., None].expand(-1, -1, -1, t.shape[3]))

        batch, _, rows = bucket.shape

        def meet(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (bucket[b, h, i] == bucket[b, h, j]) & (i >= j)

        mask = make_mask(meet, batch, heads, rows, rows, device=q.device)
        out: Any = compiled(sort(q), sort(k), sort(v), block_mask=mask)
        index = order[..., None].expand_as(out)
        return torch.empty_like(out).scatter(2, index, out).transpose(1, 2)

    return attend


def _varlen(shape: Shape) -> Operator:
    """Torch's kernel for packed sequences on the rows as we sort them: buckets are sequences where q and k share them."""
    from torch.nn.attention.varlen import varlen_attn

    function: Any = varlen_attn
    windowed = "window_size" in inspect.signature(function).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    longest = shape.sizes["T"]

    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        order = order_rows(prepare_hash(q, k, v, q_bucket, k_bucket, num_buckets=num_buckets))
        queries, keys = order.queries.long(), order.keys.long()  # what indexing takes, in one cast for all passes
        rows = (gather(t.flatten(0, 2), where)[:, None] for t, where in ((q, queries), (k, keys), (v, keys)))
        out: Tensor = function(*rows, order.cu_q, order.cu_k, longest, longest, **causal)
        return scatter(out[:, 0], queries).view(*q.shape[:3], -1)

    return attend


def _plain_heads(shape: Shape) -> list[str]:
    reasons = [] if shape.dtype.itemsize == 2 else [f"{shape.dtype} (it takes 16 bits)"]
    if shape.sizes["H"] != shape.sizes["Hkv"]:
        reasons.append("query heads that share a key head would be rows of one sequence, which it aligns by their number")
    return reasons


_MASK = "torch's scaled_dot_product_attention with a mask of every head"
HASH_PEERS = (
    Peer("sdpa-mask", _MASK, _masked_hash, _few_tokens, devices=("cpu", "cuda")),
    Peer("flex", "FlexAttention, compiled, on sorted rows with a block mask made in the call", _flex),
    Peer("varlen", "torch's kernel for packed sequences on the rows as we sort them", _varlen, _plain_heads),
)
QK_PEERS = (Peer("sdpa-mask", _MASK, _masked_qk, _few_tokens, devices=("cpu", "cuda")),)
