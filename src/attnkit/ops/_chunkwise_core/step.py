"""One token of a recurrence, for decoding: the prepared call, its two forms, and who takes it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import capability, current
from attnkit._core.dispatch import Backend
from attnkit._core.library import define
from attnkit._core.triton import HAS_TRITON, interpreted
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
    out, n = (grouped[..., None] * S[:, :, None]).sum(-2), None  # closer to the true sum than a product of matrices on a GPU
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
    if not HAS_TRITON:
        return ["Triton is not installed; run: pip install 'attnkit[triton]'"]
    device, dtype = call.q.device, call.q.dtype
    reasons = [f"{dtype} (the kernel takes 16 and 32 bits)"] if dtype == torch.float64 else []
    tensors = (call.q, call.k, call.v, call.i, call.f, *call.state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        reasons.append("gradients (the kernel has none)")
    if device.type == "cpu" and interpreted():
        if dtype in (torch.float16, torch.bfloat16):
            reasons.append(f"{dtype} (Triton's interpreter computes bfloat16 wrongly and float16 slowly)")
    elif device.type != "cuda":
        reasons.append(f"device {device.type}")
    elif capability(device) < (8, 0):
        reasons.append("a GPU older than compute capability 8.0")
    return reasons


def _triton_avoids(call: StepCall) -> list[str]:
    return ["Triton's interpreter only runs when named"] if call.q.device.type == "cpu" else []


STEP_BACKENDS: tuple[Backend[StepCall], ...] = (
    Backend("triton", _triton, _triton_refuses, _triton_avoids),
    Backend("torch", _torch, lambda call: []),
)
