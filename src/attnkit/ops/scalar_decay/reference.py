"""Scalar decay by its definition: one token after the other, and all pairs of tokens at once. Neither knows chunks."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops._chunkwise_core.call import sequences
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.scalar_decay.call import ScalarDecayCall

__all__ = ["MAX_PAIRS", "parallel", "recurrent"]

Result = tuple[Tensor, RecurrentState]
MAX_PAIRS = 4096**2  # of tokens of a sequence; the parallel form writes them all down


def recurrent(call: ScalarDecayCall) -> Result:
    """Token by token, in the accumulation dtype with one rounding of each output; differentiable by autograd."""
    return _each(call, _recurrent)


def parallel(call: ScalarDecayCall) -> Result:
    """All pairs of tokens; products take operands in q's dtype, everything else is in the accumulation dtype."""
    return _each(call, _parallel)


def _each(call: ScalarDecayCall, form: object) -> Result:
    assert callable(form)
    outs, states = [], []
    for rows, seqs in sequences(call):
        q, k, v, g = (t[None, rows] if call.cu_seqlens is not None else t for t in (call.q, call.k, call.v, call.g))
        S = g.new_zeros(q.shape[0], *k.shape[2:], v.shape[-1]) if call.state is None else call.state.S[seqs]
        out, state = form(q, k, v, g, S, call.scale) if q.shape[1] else (v.new_zeros(*q.shape[:-1], v.shape[-1]), S)
        outs.append(out if call.cu_seqlens is None else out[0])
        states.append(state)
    return torch.cat(outs), RecurrentState(torch.cat(states))


def _recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    acc, group = accumulator_dtype(q.dtype), q.shape[2] // k.shape[2]
    outs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].to(acc) for x in (q, k, v))
        S = torch.exp(g[:, t])[..., None, None] * S + k_t[..., None] * v_t[..., None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", scale * q_t, S.repeat_interleave(group, 1)).to(q.dtype))
    return torch.stack(outs, 1), S


def _parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype, acc, group, length = q.dtype, accumulator_dtype(q.dtype), q.shape[2] // k.shape[2], q.shape[1]

    def low(x: Tensor) -> Tensor:
        return x.to(dtype).to(acc)

    q, keys, values = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    g = g.transpose(1, 2)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    # between rows: sums of columns below the diagonal, so that no two large sums are subtracted
    weights = g[..., :, None].expand(*g.shape, length).tril(-1).cumsum(-2).masked_fill(~seen, -torch.inf).exp()
    before = g.cumsum(-1).exp()
    keys_q, values_q, S_q = (t.repeat_interleave(group, 1) for t in (keys, values, S))
    prob = scale * (q @ keys_q.transpose(-1, -2)) * weights.repeat_interleave(group, 1)
    faded = scale * q * before.repeat_interleave(group, 1)[..., None]
    out = low(prob) @ values_q + low(faded) @ S_q
    put = low(weights[..., -1, :, None] * keys).transpose(-1, -2) @ values
    return out.transpose(1, 2).to(dtype), before[..., -1][..., None, None] * S + put
