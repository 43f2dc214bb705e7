"""Expected attention in plain torch, keys a chunk at a time; none is repeated for the query heads of its group."""

import torch
from torch import Tensor

__all__ = ["expected", "roles", "with_sinks"]

CHUNK = 2048  # keys of a head that are worked on at once: their products stay in a CPU's cache


def roles(k: Tensor, valid: Tensor | None, sinks: int) -> tuple[Tensor, Tensor]:
    """Which keys compete and which are sinks, [B or 1, S, Hkv or 1] bool each; the rest is not there."""
    if valid is None:
        sink = torch.arange(k.shape[1], device=k.device)[None, :, None] < sinks
        return ~sink, sink
    sink = valid & (valid.cumsum(1) <= sinks)
    return valid & ~sink, sink


def with_sinks(scores: Tensor, sink: Tensor) -> Tensor:
    """Scores [B, Hkv, S] of keys that compete, -inf elsewhere -> sinks above the largest of their row of the batch."""
    top = scores.amax((1, 2), keepdim=True).clamp(min=0) + 1
    return torch.where(sink.movedim(1, 2), top, scores).contiguous()


def expected(
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    cov: Tensor | None,
    gram: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
    norm: str,
    sinks: int,
) -> Tensor:
    """Scores [B, S, Hkv], in memory [B, Hkv, S]."""
    if k.shape[0] == 0 or k.shape[1] == 0:
        return mean.new_empty(k.shape[0], k.shape[2], k.shape[1]).movedim(1, 2)
    scored, sink = roles(k, valid, sinks)
    hidden = ~scored.movedim(1, 2)[:, :, None]  # [B or 1, Hkv or 1, 1, S]
    logits = _quadratic(k, scale * mean, None if cov is None else scale**2 / 2 * cov)
    logits.masked_fill_(hidden, -torch.inf).masked_fill_(hidden.all(-1, keepdim=True), 0)
    prob = torch.softmax(logits, -1)
    if gram is not None:
        scores = (prob + eps).mul_(_quadratic(v, None, gram[None]).clamp_(min=0).sqrt_()).mean(2)
    else:
        scores = prob.mean(2) + eps
        if norm == "l2":
            scores = scores * torch.linalg.vector_norm(v, dim=-1, dtype=mean.dtype).movedim(1, 2)
    return with_sinks(scores.masked_fill_(hidden[:, :, 0], -torch.inf), sink).movedim(1, 2)


def _quadratic(x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """x . first + x . second x of every head, [B, Hkv, G, S]; first [B, H, D], second [B or 1, H, D, D]."""
    batch, num_keys, kv_heads = x.shape[:3]
    some = first if first is not None else second
    assert some is not None
    group = some.shape[1] // kv_heads
    out = some.new_empty(batch, kv_heads, group, num_keys)
    for row in range(batch):
        for head in range(kv_heads * group):
            if head % group == 0:
                keys = x[row, :, head // group].to(some.dtype, memory_format=torch.contiguous_format)
            # one product at a time: torch's product of batches of matrices took eight times as long on a CPU
            square = None if second is None else second[min(row, second.shape[0] - 1), head]
            linear = None if first is None else first[row, head]
            for start in range(0, num_keys, CHUNK):
                part = slice(start, start + CHUNK)
                own = keys[part]
                if square is None:
                    assert linear is not None
                    out[row, head // group, head % group, part] = own @ linear
                    continue
                inner = own @ square if linear is None else torch.addmm(linear, own, square)
                torch.sum(inner.mul_(own), -1, out=out[row, head // group, head % group, part])
    return out
