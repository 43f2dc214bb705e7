"""One token of a recurrence, for decoding: the prepared call, its two forms, and who takes it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.dispatch import Backend
from attnkit._core.library import define
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops._chunkwise_core.gates import LOWEST
from attnkit.ops._chunkwise_core.state import RecurrentState

__all__ = ["STEP_BACKENDS", "StepCall"]

Results = tuple[Tensor, ...]


@dataclass
class StepCall:
    """Checked arguments of a step.

    Attributes:
        q, k, v: [B, H, D], [B, Hkv, D], [B, Hkv, Dv].
        i, f: [B, Hkv] before the gates' functions; with "decay" there is no i, and f is the log decay.
        state: one entry for each sequence; what it holds says whether outputs are normalised.
        gates: "exp", "sigmoid" or "decay".
        scale: of q.
        eps: added to denominators.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor | None
    f: Tensor
    state: RecurrentState
    gates: str
    scale: float
    eps: float = 0.0


def _torch(call: StepCall) -> tuple[Tensor, RecurrentState]:
    q, k, state, m = call.q, call.k, call.state, call.state.m
    log_f = (call.f if call.gates == "decay" else F.logsigmoid(call.f)).clamp(min=LOWEST)
    acc = accumulator_dtype(q.dtype)
    grouped = call.scale * q.unflatten(1, (k.shape[1], -1)).to(acc)  # [B, Hkv, G, D]
    put = k.to(acc)
    if call.i is not None:
        log_i = F.logsigmoid(call.i) if m is None else call.i
        if m is not None:
            m = torch.maximum(log_f + m, log_i)
            assert state.m is not None
            log_f, log_i = log_f + state.m - m, log_i - m
        put = torch.exp(log_i)[..., None] * put
    keep = torch.exp(log_f)[..., None]
    S = keep[..., None] * state.S + put[..., None] * call.v[..., None, :]
    # on a GPU products of few rows were seen several times as far off as sums; on a CPU they are close, and many times as fast
    out, n = (grouped[..., None] * S[:, :, None]).sum(-2) if S.is_cuda else grouped @ S, None
    if state.n is not None:
        n = keep * state.n + put
        least = torch.ones_like(log_f) if m is None else torch.exp(-m)
        out = out / (torch.maximum((grouped @ n[..., None]).abs(), least[..., None, None]) + call.eps)
    return out.flatten(1, 2).to(q.dtype), RecurrentState(S, n, m)


def _kernel(q: Tensor, *rest: Any) -> Results:
    from attnkit.ops._chunkwise_core._triton import step_launch  # Triton loads when a kernel runs

    with current(q.device):
        return step_launch.run(q, *rest)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor | None, f: Tensor, S: Tensor, n: Tensor | None, m: Tensor | None, *_: Any
) -> Results:
    new = (S.new_empty(0 if t is None else t.shape) for t in (S, n, m))
    return q.new_empty(*q.shape[:2], v.shape[-1]), *new


_run = define(
    "recurrent_step(Tensor q, Tensor k, Tensor v, Tensor? i, Tensor f, Tensor S, Tensor? n, Tensor? m, str gates, float scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)


def _triton(call: StepCall) -> tuple[Tensor, RecurrentState]:
    before = call.state
    out, S, n, m = _run(call.q, call.k, call.v, call.i, call.f, *before, call.gates, call.scale, call.eps)
    return out, RecurrentState(S, None if before.n is None else n, None if before.m is None else m)


def _triton_refuses(call: StepCall) -> list[str]:
    tensors = (call.q, call.k, call.v, call.i, call.f, *call.state)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return kernels_refuse(call.q.device, call.q.dtype, *(["gradients (the kernel has none)"] if wanted else []))


def _triton_avoids(call: StepCall) -> list[str]:
    return kernels_avoid(call.q.device)


STEP_BACKENDS: tuple[Backend[StepCall], ...] = (
    Backend("triton", _triton, _triton_refuses, _triton_avoids),
    Backend("torch", _torch, lambda call: []),
)
