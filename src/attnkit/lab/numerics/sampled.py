"""Sampled rows of calls of attention: what is kept of a call until it is looked at, and calls alike as one."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit._core.errors import ShapeError
from attnkit.lab.numerics.formats import FloatFormat
from attnkit.ops.attention.call import AttentionCall

__all__ = ["Sample", "heads_last", "mix", "pick", "sample_rows", "stacked", "take"]

_SEQUENCES = 2  # of a batch, among which the rows are shared out


class _Window(NamedTuple):
    """What says which keys the sampled rows [m, r] of one call see, but for its bias."""

    rows: Tensor
    num_q: int
    num_k: int
    left: int
    right: int
    cu_q: Tensor | None
    cu_k: Tensor | None

    def seen(self) -> Tensor:
        """[m, r, S] bool."""
        key = torch.arange(self.num_k, device=self.rows.device)
        if self.cu_q is not None and self.cu_k is not None:
            cu_q, cu_k = self.cu_q.long(), self.cu_k.long()
            which = torch.searchsorted(cu_q[1:].contiguous(), self.rows, right=True)
            first, stop = cu_k[which], cu_k[which + 1]
            pos = self.rows - cu_q[which + 1] + stop
            seen = (key >= first[..., None]) & (key < stop[..., None])
        else:
            pos = self.rows + self.num_k - self.num_q
            seen = torch.ones(*self.rows.shape, self.num_k, dtype=torch.bool, device=self.rows.device)
        offset = key - pos[..., None]
        if self.left >= 0:
            seen = seen & (offset >= -self.left)
        return seen & (offset <= self.right) if self.right >= 0 else seen


@dataclass(frozen=True)
class Sample:
    """What is kept of some calls alike, in their own dtypes: copies, so that the calls' tensors may go.

    Attributes:
        calls: how many; the first one's n sequences come first.
        fmt: what outputs and probabilities are rounded to.
        stable: how the backward pass forms delta.
        scale: of the scores.
        kind: equal for calls that may be stacked.
        sequences, rows: [n] and [n, r], where `pick` finds these rows in the gradient of the output.
        q, k, v: [n, r, H, D], [n, S, Hkv, D] and [n, S, Hkv, Dv].
        out: [n, r, H, Dv], what the calls returned; None means the true output rounded once.
        lse: [n, r, H, 1], what probabilities are made from; None means the exact one.
        bias: of keys, [n, S, 1 or Hkv]; None where there is none.
        window: of one call.
        mask: [n, r, S] bool, False where a row does not see a key that the window shows it; None hides no more.
    """

    calls: int
    fmt: FloatFormat
    stable: str
    scale: float
    kind: Hashable = field(repr=False)
    sequences: Tensor = field(repr=False)
    rows: Tensor = field(repr=False)
    q: Tensor = field(repr=False)
    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    out: Tensor | None = field(repr=False)
    lse: Tensor | None = field(repr=False)
    bias: Tensor | None = field(repr=False)
    window: _Window = field(repr=False)
    mask: Tensor | None = field(default=None, repr=False)

    @property
    def elements(self) -> int:
        """Of scores, keys and values: a look needs some eight bytes a few times for each of them."""
        return self.k.numel() + self.v.numel() + self.q.shape[:3].numel() * self.k.shape[1]

    def hidden(self) -> Tensor:
        """[n, 1 or Hkv, 1, r, S] bool: the keys that rows do not see."""
        hidden = (~self.window.seen()).repeat(self.calls, 1, 1)[:, None, None]
        if self.mask is not None:
            hidden = hidden | ~self.mask[:, None, None]
        return hidden if self.bias is None else hidden | torch.isneginf(self.bias.transpose(1, 2))[:, :, None, None]

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[n, Hkv, S, *], in the calls' dtype; what no sampled row sees may hold anything, and is 0."""
        unseen = hidden.all(-2).squeeze(2)[..., None]  # [n, 1 or Hkv, S, 1]
        keys, values = (tensor.transpose(1, 2).masked_fill(unseen, 0) for tensor in (self.k, self.v))
        return keys, values

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """[n, Hkv, G, r, S] in float64, -inf where a row does not see a key; from keys [n, Hkv, S, D] in float64."""
        queries = (self.q.double() * self.scale).unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
        scores: Tensor = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])
        if self.bias is not None:
            scores = scores + self.bias.double().transpose(1, 2)[:, :, None, None]
        return scores.masked_fill(hidden, -torch.inf)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The true output of the sampled rows, and the size of the terms it is a sum of, sum_j P_ij |V_jd|: [n, r, H, Dv] in
        float64; and [n, r] bool, whether some head of a row sees a key; of one that sees none both are 0."""
        hidden = self.hidden()
        keys, values = (t.double() for t in self.keys_and_values(hidden))
        blind = hidden.all(-1, keepdim=True)
        p = torch.softmax(self.scores(keys, hidden), -1).masked_fill(blind, 0)
        true, size = (heads_last(mix(p, t)) for t in (values, values.abs()))
        return true, size, ~blind.flatten(1, 2).all(1)[..., 0]


def take(call: AttentionCall, out: Tensor | None, lse: Tensor | None, fmt: FloatFormat, rows: int, seed: int) -> Sample:
    """Copy what a look at some rows of a call needs: rows of queries and outputs, two sequences' keys and values.

    Raises:
        ShapeError: there is no row.
    """
    where = sample_rows(call.q, rows, seed)
    k, v = ((t[None] if t.dim() == 3 else t)[where[0]] for t in (call.k, call.v))
    bias = call.key_bias
    if bias is not None:
        bias = (bias[None] if call.q.dim() == 3 else bias)[where[0]]
        bias = bias[..., None] if bias.dim() == 2 else bias
    lse = None if lse is None else pick(lse[..., None], *where)
    q, out = pick(call.q, *where), None if out is None else pick(out, *where)
    window = _Window(
        where[1], call.q.shape[-3], call.k.shape[-3], call.left, call.right, call.cu_seqlens_q, call.cu_seqlens_k
    )  # fmt: skip
    looks = (None if part is None else (part.shape, part.dtype, part.device) for part in (q, k, v, out, lse, bias))
    alike = (id(part) if isinstance(part, Tensor) else part for part in window)  # the sample keeps them: ids stay theirs
    return Sample(
        1, fmt, call.stable, call.scale, (fmt, call.stable, call.scale, *alike, *looks), *where, q, k, v, out, lse, bias, window
    )


def stacked(samples: Sequence[Sample]) -> Sample:
    """Calls of one kind as one; their gradients are then to be given as sampled rows, one call after the other."""
    first = samples[0]
    sequences = torch.arange(len(samples) * len(first.q), device=first.q.device)
    rows = torch.arange(first.q.shape[1], device=first.q.device).expand(len(sequences), -1)
    parts: dict[str, Any] = {
        name: torch.cat([getattr(sample, name) for sample in samples])
        for name in ("q", "k", "v", "out", "lse", "bias")
        if getattr(first, name) is not None
    }
    return replace(first, calls=len(samples), sequences=sequences, rows=rows, **parts)


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


def pick(tensor: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
    """Sampled rows of [B, T, H, *] or packed [R, H, *], [m, r, H, *]."""
    batched = tensor[None] if tensor.dim() == 3 else tensor
    return batched[sequences[:, None], rows]


def mix(p: Tensor, values: Tensor) -> Tensor:
    """P V, [n, Hkv, G, r, Dv]; heads of a group are rows of one product, so that no values are copied for them."""
    mixed: Tensor = (p.flatten(2, 3) @ values).unflatten(2, p.shape[2:4])
    return mixed


def heads_last(t: Tensor) -> Tensor:
    """[m, Hkv, G, r, *] -> [m, r, H, *]."""
    return t.permute(0, 3, 1, 2, 4).flatten(2, 3)
