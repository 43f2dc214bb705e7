"""The mLSTM by its definition: one token after the other, and all pairs of tokens at once. Neither knows chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops._chunkwise_core.call import sequences
from attnkit.ops._chunkwise_core.gates import LOWEST
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.mlstm.call import MLSTMCall, parts_of

__all__ = ["MAX_PAIRS", "parallel", "recurrent", "row_scale"]

Result = tuple[Tensor, RecurrentState]
MAX_PAIRS = 4096**2  # of tokens of a sequence; the parallel form writes them all down


def recurrent(call: MLSTMCall, *, rounded: bool = False) -> Result:
    """Token by token, in the accumulation dtype with one rounding of each output; differentiable by autograd.

    Args:
        rounded: products take operands in q's dtype, as matrix units do, those of the gradient too: the plain form that error
            budgets refer to.
    """
    outs, states = [], []
    for rows, seqs in sequences(call):
        q, k, v, i, f = (t[None, rows] if call.cu_seqlens is not None else t for t in (call.q, call.k, call.v, call.i, call.f))
        out, state = _recurrent(call, q, k, v, i, f, _start(call, q.shape[0], seqs), rounded)
        outs.append(out if call.cu_seqlens is None else out[0])
        states.append(state)
    return torch.cat(outs), _together(states)


def _recurrent(
    call: MLSTMCall, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: RecurrentState, rounded: bool
) -> Result:
    acc, group = accumulator_dtype(q.dtype), q.shape[2] // k.shape[2]

    def cut(x: Tensor) -> Tensor:
        return x.to(q.dtype).to(acc) if rounded else x

    C, n, m = state
    outs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].to(acc) for x in (q, k, v))
        log_f = F.logsigmoid(f[:, t]).clamp(min=LOWEST)
        log_i = i[:, t] if call.input_gate == "exp" else F.logsigmoid(i[:, t])
        if m is None:
            keep, put, low = log_f.exp(), log_i.exp(), None
        else:
            highest = torch.maximum(log_f + m, log_i)
            keep, put, m = (log_f + m - highest).exp(), (log_i - highest).exp(), highest
            low = torch.exp(-m).repeat_interleave(group, 1)
        product = cut(put[..., None] * k_t)[..., None] * v_t[..., None, :]
        if rounded and product.requires_grad:
            product.register_hook(cut)  # the gradient of the state is multiplied by k and v
        C = keep[..., None, None] * C + product
        q_t = call.scale * q_t
        h = torch.einsum("bhk,bhkv->bhv", cut(q_t), cut(C).repeat_interleave(group, 1))
        if call.normalize:
            assert n is not None
            n = keep[..., None] * n + put[..., None] * k_t
            den = torch.einsum("bhk,bhk->bh", q_t, n.repeat_interleave(group, 1)).abs()
            least = torch.ones_like(den) if low is None else low
            h = h / (torch.maximum(den, least) + call.eps)[..., None]
        outs.append(h.to(q.dtype))
    out = torch.stack(outs, 1) if outs else v.new_zeros(*q.shape[:-1], v.shape[-1])
    return out, RecurrentState(C, n, m)


def parallel(call: MLSTMCall) -> Result:
    """All pairs of tokens at once; products take operands in q's dtype, everything else is in the accumulation dtype."""
    outs, states = [], []
    for rows, seqs in sequences(call):
        q, k, v, i, f = (t[None, rows] if call.cu_seqlens is not None else t for t in (call.q, call.k, call.v, call.i, call.f))
        state = _start(call, q.shape[0], seqs)
        num, den, low, state = _sums(call, q, k, v, i, f, state)
        if den is not None:
            num = num / (torch.maximum(den.abs(), low) + call.eps)[..., None]
        out = num.transpose(1, 2).to(q.dtype)
        outs.append(out if call.cu_seqlens is None else out[0])
        states.append(state)
    return torch.cat(outs), _together(states)


def row_scale(call: MLSTMCall) -> Tensor:
    """The size of what each element of the output is a sum of, normalised: [B, T, H, Dv] (packed [R, H, Dv])."""
    outs = []
    for rows, seqs in sequences(call):
        q, k, v, i, f = (t[None, rows] if call.cu_seqlens is not None else t for t in (call.q, call.k, call.v, call.i, call.f))
        state = _start(call, q.shape[0], seqs)
        num, den, low, _ = _sums(call, q, k, v, i, f, state)
        positive = RecurrentState(state.S.abs(), None if state.n is None else state.n.abs(), state.m)
        size, total, _, _ = _sums(call, q.abs(), k.abs(), v.abs(), i, f, positive)
        if den is not None and total is not None:
            whole = (torch.maximum(den.abs(), low) + call.eps)[..., None]
            size = (size + num.abs() / whole * total[..., None]) / whole
        outs.append(size.transpose(1, 2) if call.cu_seqlens is None else size.transpose(1, 2)[0])
    return torch.cat(outs)


def _sums(
    call: MLSTMCall, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: RecurrentState
) -> tuple[Tensor, Tensor | None, Tensor, RecurrentState]:
    """Numerators [B, H, T, Dv], what denominators are made of [B, H, T], the least denominators, the state at the end."""
    dtype, acc, group, length = q.dtype, accumulator_dtype(q.dtype), q.shape[2] // k.shape[2], q.shape[1]

    def low(x: Tensor) -> Tensor:
        return x.to(dtype).to(acc)

    q, keys, values = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    if length == 0:
        empty = q.new_zeros(q.shape[:-1])
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), empty if call.normalize else None, empty, state
    log_f = F.logsigmoid(f).clamp(min=LOWEST).transpose(1, 2)  # [B, Hkv, T]
    log_i = (i if call.input_gate == "exp" else F.logsigmoid(i)).transpose(1, 2)
    # between rows: sums of columns below the diagonal, so that no two large sums are subtracted
    steps = log_f[..., :, None].expand(*log_f.shape, length).tril(-1).cumsum(-2)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = (steps + log_i[..., None, :]).masked_fill(~seen, -torch.inf)
    before = log_f.cumsum(-1)
    m = log_f.new_zeros(log_f.shape)
    if state.m is not None:
        before = before + state.m[..., None]
        m = torch.maximum(before, weights.amax(-1))
    weights, before = torch.exp(weights - m[..., None]), torch.exp(before - m)
    many = [t.repeat_interleave(group, 1) for t in (keys, values, weights, before, state.S)]
    prob = call.scale * (q @ many[0].transpose(-1, -2)) * many[2]
    faded = call.scale * q * many[3][..., None]
    num, den = low(prob) @ many[1] + low(faded) @ many[4], None
    weighted = weights[..., -1, :, None] * keys
    kept = before[..., -1, None]
    S, n = kept[..., None] * state.S + low(weighted).transpose(-1, -2) @ values, None
    if state.n is not None:
        den = prob.sum(-1) + (faded @ state.n.repeat_interleave(group, 1)[..., None])[..., 0]
        n = kept * state.n + weighted.sum(-2)
    least = torch.exp(-m).repeat_interleave(group, 1)
    return num, den, least, RecurrentState(S, n, None if state.m is None else m[..., -1])


def _start(call: MLSTMCall, batch: int, seqs: slice | int) -> RecurrentState:
    if call.state is not None:
        return call.state.each(lambda part: part[seqs])
    parts = parts_of(call.input_gate, call.normalize)
    shape = (batch, call.k.shape[-2], call.k.shape[-1])
    S, n, m = (call.i.new_zeros(size) for size in ((*shape, call.v.shape[-1]), shape, shape[:2]))
    return RecurrentState(S, n if "n" in parts else None, m if "m" in parts else None)


def _together(states: list[RecurrentState]) -> RecurrentState:
    S, n, m = (None if part[0] is None else torch.cat(part) for part in zip(*states, strict=True))
    assert S is not None
    return RecurrentState(S, n, m)
