"""Gated linear attention in plain torch, chunk by chunk, forward and backward.

A state S [D, Dv] of each key head decays by exp(g_t) and takes in exp(a_t) k_t v_t^T; outputs are scale * q_t^T S_t, divided by
max(|scale * q_t . n_t|, exp(-m_t)) + eps where they are normalised, n being S for values that are all 1. m is a constant here:
outputs do not depend on the unit that S and n are in, but through eps, and that part of its gradient is returned.

Inside a chunk everything is matrix products; between chunks only states travel. With b the sums of g from the start of the
chunk on, and e = b_L those of the whole chunk:

    P_ij = scale q_i . k_j exp(b_i - b_j + a_j), j <= i
    numerator_i = sum_j P_ij v_j + exp(b_i) scale q_i^T S,     denominator_i the same with n and 1
    S' = exp(e) S + sum_j exp(e - b_j + a_j) k_j v_j^T

Sums of gates are kept in float64: differences of large sums must be right after the state was emptied by one large decay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.ops._chunkwise_core.layout import ChunkLayout, Step

__all__ = ["Gradients", "Problem", "backward", "forward"]

_ELEMENTS = 1 << 21  # of the tiles of scores that are worked on at once


@dataclass(frozen=True)
class Gradients:
    """Of rows: q, k, v, decay, gain [R, Hkv], m [R, Hkv]; of sequences: S and n. None where there is nothing to want one."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    gain: Tensor
    m: Tensor | None
    S: Tensor
    n: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A call on rows [R, ...] of all sequences.

    Attributes:
        layout: the chunks.
        q: [R, H, D]; k, v: [R, Hkv, D] and [R, Hkv, Dv].
        decay: [R, Hkv], log decays, finite.
        gain: [R, Hkv], logarithms of the weights of inputs; None means 0.
        m: [R, Hkv], logarithms of the units that sums are in; None means 0.
        S, n: [N, Hkv, D, Dv] and [N, Hkv, D], at the beginning; n only where outputs are normalised.
    """

    layout: ChunkLayout
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    gain: Tensor | None
    m: Tensor | None
    S: Tensor
    n: Tensor | None
    scale: float
    eps: float

    @property
    def acc(self) -> torch.dtype:
        """The dtype of sums."""
        return self.S.dtype

    def chunked(self) -> "_Chunked":
        """The same, cut."""
        split, (heads, kv_heads) = self.layout.split, (self.q.shape[1], self.k.shape[1])
        gates = split(self.decay).transpose(1, 2).double().cumsum(-1)
        gain = None if self.gain is None else split(self.gain).transpose(1, 2).double()
        low = None if self.m is None else torch.exp(-split(self.m).transpose(1, 2))
        q = split(self.q).unflatten(2, (kv_heads, heads // kv_heads))
        return _Chunked(self, q, split(self.k), split(self.v), gates, gain, low)


@dataclass(frozen=True)
class _Chunked:
    """Chunks of a problem; what is called `part` is a slice of chunks, cut small enough for its scores.

    Attributes:
        q: [C, L, Hkv, G, D]; k, v: [C, L, Hkv, ...]; rows that a chunk lacks hold 0.
        b: [C, Hkv, L] float64, sums of log decays.
        gain: [C, Hkv, L] float64, or None.
        low: [C, Hkv, L], the least denominator; None means 1.
    """

    p: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    gain: Tensor | None
    low: Tensor | None

    def parts(self) -> Iterator[slice]:
        size = self.p.layout.chunk_size
        count = max(1, _ELEMENTS // (size * size * max(self.p.q.shape[1], 1)))
        for start in range(0, self.p.layout.num_chunks, count):
            yield slice(start, start + count)

    def queries(self, part: slice) -> Tensor:
        """[c, Hkv, G, L, D]."""
        return self.q[part].permute(0, 2, 3, 1, 4).to(self.p.acc, memory_format=torch.contiguous_format)

    def heads(self, x: Tensor, part: slice) -> Tensor:
        """[c, Hkv, L, ...] of k or v."""
        return x[part].transpose(1, 2).to(self.p.acc, memory_format=torch.contiguous_format)

    def total(self) -> Tensor:
        """[C, Hkv, 1], exp(e)."""
        return self.b[..., -1:].exp().to(self.p.acc)

    def before(self, part: slice) -> Tensor:
        """[c, Hkv, L], scale * exp(b): what is left at each row of the state at the beginning of its chunk."""
        return (self.b[part].exp() * self.p.scale).to(self.p.acc)

    def after(self, part: slice) -> Tensor:
        """[c, Hkv, L], exp(e - b + a): what is left at the end of the chunk of what each row puts in."""
        left = self.b[part][..., -1:] - self.b[part]
        return (left if self.gain is None else left + self.gain[part]).to(self.p.acc).exp()

    def between(self, part: slice) -> Tensor:
        """[c, Hkv, L, L], scale * exp(b_i - b_j + a_j) for j <= i, else 0."""
        b = self.b[part]
        column = b if self.gain is None else b - self.gain[part]
        left = (b[..., :, None] - column[..., None, :]).to(self.p.acc)
        hidden = torch.ones(left.shape[-2:], dtype=torch.bool, device=left.device).triu_(1)
        return left.masked_fill_(hidden, -torch.inf).exp_().mul_(self.p.scale)

    def denominator(self, den: Tensor, part: slice) -> Tensor:
        """max(|den|, low) + eps of den [c, Hkv, G, L]."""
        low = 1.0 if self.low is None else self.low[part][:, :, None]
        return torch.maximum(den.abs(), torch.as_tensor(low, dtype=den.dtype, device=den.device)) + self.p.eps


def forward(p: Problem) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """out [R, H, Dv] in q's dtype, the denominator's sum [R, H] (None: not normalised), S and n at the end."""
    c = p.chunked()
    states, sums, last, last_n = _states(c)
    count, size = p.layout.num_chunks, p.layout.chunk_size
    out = p.q.new_empty(count, size, p.q.shape[1], p.v.shape[2])
    den_out = None if p.n is None else p.q.new_empty(count, size, p.q.shape[1], dtype=p.acc)
    for part in c.parts():
        q, k, v = c.queries(part), c.heads(c.k, part), c.heads(c.v, part)
        prob = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4]) * c.between(part)[:, :, None]
        faded = (q * c.before(part)[:, :, None, :, None]).flatten(2, 3)
        num = (torch.baddbmm(_flat(faded @ states[part]), _flat(prob.flatten(2, 3)), _flat(v))).view(*q.shape[:4], -1)
        if sums is not None and den_out is not None:
            den = prob.sum(-1) + (faded @ sums[part][..., None])[..., 0].unflatten(2, q.shape[2:4])
            num = num / c.denominator(den, part)[..., None]
            den_out[part] = den.permute(0, 3, 1, 2).flatten(2)
        out[part] = num.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return p.layout.join(out), None if den_out is None else p.layout.join(den_out), last, last_n


def _states(c: _Chunked) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """S and n at the beginning of every chunk, and at the end of every sequence."""
    p = c.p
    count = p.layout.num_chunks
    states = p.S.new_empty(count, *p.S.shape[1:])
    sums = None if p.n is None else p.n.new_empty(count, *p.n.shape[1:])
    for part in c.parts():
        weighted = (c.heads(c.k, part) * c.after(part)[..., None]).transpose(-1, -2)
        states[part] = weighted @ c.heads(c.v, part)
        if sums is not None:
            sums[part] = weighted.sum(-1)
    last = _scan(states, c.total()[..., None], p.S.clone(), p.layout.steps())
    last_n = None if sums is None or p.n is None else _scan(sums, c.total(), p.n.clone(), p.layout.steps())
    return states, sums, last, last_n


def _scan(local: Tensor, decay: Tensor, carried: Tensor, steps: list[Step]) -> Tensor:
    """Replace what each chunk adds by what there is before it; returns what there is in the end. `carried` is overwritten."""
    for chunks, seqs in steps:
        before = carried[seqs].clone()
        carried[seqs] = before * decay[chunks] + local[chunks]
        local[chunks] = before
    return carried


@dataclass(frozen=True)
class _Sums:
    """What the first walk of the backward pass leaves to the second, chunk by chunk.

    Attributes:
        k, v: [C, Hkv, L, ...], gradients from inside the chunk.
        S, n: gradients of the state at the beginning of the chunk from inside it.
        gain: [C, Hkv, L]; decay: [C, Hkv, L], both from inside the chunk.
        m: [C, Hkv, L].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    S: Tensor
    n: Tensor | None
    gain: Tensor
    decay: Tensor
    m: Tensor | None


def backward(p: Problem, den: Tensor | None, d_out: Tensor, d_last: Tensor | None, d_last_n: Tensor | None) -> Gradients:
    """Gradients of everything from those of out [R, H, Dv] and of the states at the end."""
    c = p.chunked()
    states, sums, *_ = _states(c)
    w = _allocate(c)
    split = p.layout.split
    d_chunks, den_chunks = split(d_out), None if den is None else split(den)
    for part in c.parts():
        _inside(c, part, w, d_chunks, den_chunks, states, sums)
    total, steps = c.total(), p.layout.steps()[::-1]
    # each chunk's `before` becomes the gradient of the state after it
    d_S = _scan(w.S, total[..., None], torch.zeros_like(p.S) if d_last is None else d_last.clone(), steps)
    d_n = None
    if w.n is not None and sums is not None and p.n is not None:
        d_n = _scan(w.n, total, torch.zeros_like(p.n) if d_last_n is None else d_last_n.clone(), steps)
    for part in c.parts():
        k, v, after = c.heads(c.k, part), c.heads(c.v, part), c.after(part)[..., None]
        through = v @ w.S[part].transpose(-1, -2)
        passing = (w.S[part] * states[part]).sum((-1, -2))
        if w.n is not None and sums is not None:
            through += w.n[part][..., None, :]
            passing += (w.n[part] * sums[part]).sum(-1)
        put = ((through * after) * k).sum(-1)
        w.k[part] += through * after
        w.v[part] += (k * after) @ w.S[part]
        w.gain[part] += put
        # what passes a row: the state before the chunk, and what rows before it have put in
        w.decay[part] += (passing * total[part][..., 0])[..., None] + put.cumsum(-1) - put
    rows = [p.layout.join(t.transpose(1, 2)) for t in (w.k, w.v, w.decay, w.gain)]
    d_q = p.layout.join(w.q.permute(0, 3, 1, 2, 4).flatten(2, 3)).to(p.q.dtype)
    d_m = None if w.m is None else p.layout.join(w.m.transpose(1, 2))
    return Gradients(d_q, rows[0].to(p.k.dtype), rows[1].to(p.v.dtype), rows[2], rows[3], d_m, d_S, d_n)


def _allocate(c: _Chunked) -> _Sums:
    p = c.p
    count, size = p.layout.num_chunks, p.layout.chunk_size
    kv_heads, width, width_v = p.S.shape[1:]
    group = p.q.shape[1] // max(kv_heads, 1)
    new = p.S.new_empty
    gates = [new(count, kv_heads, size) for _ in range(3)]
    return _Sums(
        new(count, kv_heads, group, size, width), new(count, kv_heads, size, width), new(count, kv_heads, size, width_v),
        new(count, kv_heads, width, width_v), None if p.n is None else new(count, kv_heads, width),
        gates[0], gates[1], None if p.n is None else gates[2],
    )  # fmt: skip


def _inside(c: _Chunked, part: slice, w: _Sums, d_out: Tensor, den: Tensor | None, states: Tensor, sums: Tensor | None) -> None:
    """Gradients from inside chunks: queries in full, of the rest what does not come from later chunks."""
    q, k, v = c.queries(part), c.heads(c.k, part), c.heads(c.v, part)
    shape = q.shape[2:4]
    weights, before = c.between(part)[:, :, None], c.before(part)[:, :, None]
    d_num = d_out[part].unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4).to(c.p.acc)
    whole = None
    if den is not None:
        own = den[part].unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1)
        whole = c.denominator(own, part)
        d_num = d_num / whole[..., None]
    flat_d, flat_q = d_num.flatten(2, 3), q.flatten(2, 3)
    prob = (flat_q @ k.transpose(-1, -2)).unflatten(2, shape) * weights
    d_prob = (flat_d @ v.transpose(-1, -2)).unflatten(2, shape)
    from_state = (flat_d @ states[part].transpose(-1, -2)).unflatten(2, shape)
    across = before * (q * from_state).sum(-1)
    faded = (q * before[..., None]).flatten(2, 3)
    if whole is not None and sums is not None and w.n is not None and w.m is not None:
        size = (prob * d_prob).sum(-1) + across  # d_num . numerator
        large = own.abs() > (1.0 if c.low is None else c.low[part][:, :, None])
        delta = torch.where(large, -torch.sign(own) * size / whole, 0.0)
        d_prob = d_prob + delta[..., None]
        from_state = from_state + delta[..., None] * sums[part][:, :, None, None]
        across = before * (q * from_state).sum(-1)
        w.n[part] = (faded * delta.flatten(2, 3)[..., None]).sum(2)
        w.m[part] = -(size * (c.p.eps / whole)).sum(2)
    shares = (prob * d_prob).sum(2)  # of pairs of rows, in the gradients of gates
    own_share = shares.diagonal(dim1=-2, dim2=-1)
    strict = shares.tril(-1)
    w.gain[part] = strict.sum(-2) + own_share
    crossing = strict.sum(-1) - strict.sum(-2) + across.sum(2)
    w.decay[part] = crossing.flip(-1).cumsum(-1).flip(-1)
    d_score = (d_prob * weights).flatten(2, 3)
    w.q[part] = (d_score @ k).unflatten(2, shape) + before[..., None] * from_state
    w.k[part] = d_score.transpose(-1, -2) @ flat_q
    w.v[part] = prob.flatten(2, 3).transpose(-1, -2) @ flat_d
    w.S[part] = faded.transpose(-1, -2) @ flat_d


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)
