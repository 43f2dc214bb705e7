"""Sampled rows of a call of attention: what they see, and their scores in float64."""

from functools import lru_cache

import torch
from torch import Tensor

from attnkit._core.errors import ShapeError
from attnkit.ops.attention.call import AttentionCall

__all__ = ["heads_last", "keys_and_values", "pick", "sample_rows", "scores_of", "seen_keys"]

_SEQUENCES = 2  # of a batch, among which the rows are shared out


def sample_rows(q: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences [m] and their rows [m, r] of queries [B, T, H, D]; packed rows [R, H, D] are one sequence.

    Raises:
        ShapeError: there is no row.
    """
    batch, count = (1, q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[1])
    if not batch * count:
        raise ShapeError(f"q has shape {tuple(q.shape)}; there is no row to look at")
    return _sample_rows(batch, count, rows, seed, q.device)


@lru_cache(maxsize=32)
def _sample_rows(batch: int, count: int, rows: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept: copying them to a GPU waits for it."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randperm(batch, generator=generator)[:_SEQUENCES].sort().values
    each = min(count, -(-rows // len(sequences)))
    chosen = torch.stack([torch.randperm(count, generator=generator)[:each].sort().values for _ in sequences])
    return sequences.to(device), chosen.to(device)


def seen_keys(call: AttentionCall, sequences: Tensor, rows: Tensor) -> Tensor:
    """[m, 1 or Hkv, 1, r, S] bool: the keys that the sampled rows see."""
    num_q, num_k = call.q.shape[-3], call.k.shape[-3]
    key = torch.arange(num_k, device=rows.device)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        cu_q, cu_k = call.cu_seqlens_q.long(), call.cu_seqlens_k.long()
        which = torch.searchsorted(cu_q[1:].contiguous(), rows, right=True)
        first, stop = cu_k[which], cu_k[which + 1]
        pos = rows - cu_q[which + 1] + stop
        seen = (key >= first[..., None]) & (key < stop[..., None])
    else:
        pos = rows + num_k - num_q
        seen = torch.ones(*rows.shape, num_k, dtype=torch.bool, device=rows.device)
    offset = key - pos[..., None]
    if call.left >= 0:
        seen = seen & (offset >= -call.left)
    if call.right >= 0:
        seen = seen & (offset <= call.right)
    seen = seen[:, None, None]
    return seen if call.key_bias is None else seen & ~torch.isneginf(_bias(call, sequences))


def _bias(call: AttentionCall, sequences: Tensor) -> Tensor:
    """The key bias of the sampled sequences, [m, 1 or Hkv, 1, 1, S] in float64."""
    assert call.key_bias is not None
    bias = call.key_bias[None] if call.q.dim() == 3 else call.key_bias
    bias = bias[sequences].double()
    bias = bias[..., None] if bias.dim() == 2 else bias
    return bias.transpose(1, 2)[:, :, None, None]


def keys_and_values(call: AttentionCall, sequences: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [m, Hkv, 1, S, *]; what no sampled row sees may hold anything, and is 0."""
    unseen = ~seen.any(-2)[..., None]  # [m, 1 or Hkv, 1, S, 1]
    batched = (tensor[None] if tensor.dim() == 3 else tensor for tensor in (call.k, call.v))
    keys, values = (tensor[sequences].transpose(1, 2)[:, :, None].masked_fill(unseen, 0) for tensor in batched)
    return keys, values


def scores_of(call: AttentionCall, sequences: Tensor, queries: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """[m, Hkv, G, r, S] in float64, -inf where a row does not see a key; from sampled queries [m, r, H, D]."""
    queries = queries.unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
    scores: Tensor = queries @ keys.transpose(-1, -2) * call.scale
    if call.key_bias is not None:
        scores = scores + _bias(call, sequences)
    return scores.masked_fill(~seen, -torch.inf)


def pick(tensor: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
    """Sampled rows of [B, T, H, *] or packed [R, H, *], [m, r, H, *] in float64."""
    batched = tensor[None] if tensor.dim() == 3 else tensor
    picked: Tensor = batched[sequences[:, None], rows].double()
    return picked


def heads_last(t: Tensor) -> Tensor:
    """[m, Hkv, G, r, *] -> [m, r, H, *]."""
    return t.permute(0, 3, 1, 2, 4).flatten(2, 3)
