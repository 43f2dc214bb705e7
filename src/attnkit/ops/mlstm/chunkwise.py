"""The chunkwise mLSTM: gates become decays, weights and units, and the rest is what all recurrences share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.ops._chunkwise_core._register import run_chunkwise, run_gate_scan
from attnkit.ops._chunkwise_core.gates import LOWEST
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.mlstm.call import MLSTMCall

__all__ = ["chunkwise", "restored"]


Run = Callable[..., tuple[Tensor, ...]]


def chunkwise(call: MLSTMCall, run: Run = run_chunkwise, scan: Run = run_gate_scan) -> tuple[Tensor, RecurrentState]:
    """out and state.

    Args:
        run: what walks over the chunks.
        scan: what finds the running maximum of exponential gates.
    """
    log_f = F.logsigmoid(call.f).clamp(min=LOWEST)
    S0, n0, m0 = (None, None, None) if call.state is None else call.state
    m = m_last = None
    if call.input_gate == "exp":
        if call.state is not None and S0 is not None and n0 is not None and m0 is not None:
            S0, n0 = restored(S0, -m0), restored(n0, -m0)
        decay, gain, m, m_last, _ = scan(log_f, call.i, m0, call.cu_seqlens, call.chunk_size)
    else:
        decay, gain = log_f, F.logsigmoid(call.i)
    out, _, S, n = run(
        call.q, call.k, call.v, decay, gain, m, S0, n0, call.cu_seqlens, call.normalize, call.scale, call.eps, call.chunk_size
    )
    if m_last is None:
        return out, RecurrentState(S, n if call.normalize else None)
    return out, RecurrentState(restored(S, m_last), restored(n, m_last), m_last)


def restored(x: Tensor, m: Tensor) -> Tensor:
    """x [N, H, ...] with the gradient of its unit exp(m), which is a constant elsewhere: in larger units x is smaller."""
    if not m.requires_grad:
        return x
    return x * torch.exp(m.detach() - m).view(*m.shape, *[1] * (x.dim() - m.dim()))
