"""The implementations of attention, in order of preference, each with its reasons to refuse a call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnkit._core.devices import capability
from attnkit._core.dispatch import Backend, only_when_named
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse, old_gpu
from attnkit.ops.attention import flash4
from attnkit.ops.attention._register import run_blockwise, run_fa4, run_triton
from attnkit.ops.attention.call import AttentionCall, CoreCall
from attnkit.ops.attention.reference import reference, reference_refuses

__all__ = ["BACKENDS", "triton_avoids", "triton_refuses"]

Result = tuple[Tensor, Tensor | None]
FEW_ROWS = 64
_HAS_CUDNN = torch.backends.cudnn.is_available()
_CUDNN_WIDTH = 128  # wider heads run there only forward and only on some GPUs


def _fused_refuses(call: AttentionCall) -> list[str]:
    """What torch's fused kernels cannot do; anything listed here would run there as T x S matrices, wrong, or not at all."""
    q, k, v = call.q, call.k, call.v
    reasons = []
    if call.cu_seqlens_q is not None:
        reasons.append("packed sequences")
    if call.q_pos is not None:
        reasons.append("explicit query positions")
    if q.dim() == 4:
        num_q, num_k = q.shape[1], k.shape[1]
        if call.left >= 0 or call.right > 0:
            reasons.append("a window")
        if call.right == 0 and num_q not in (1, num_k):
            reasons.append("causal with T != S (it aligns top-left)")
        if q.numel() == 0 or k.numel() == 0:
            reasons.append("empty inputs")
    if call.softcap:
        reasons.append("softcap")
    if call.sinks is not None:
        reasons.append("sinks")
    if call.key_bias is not None:
        reasons.append("key_bias (rows that see nothing, and NaN under the mask, are not defined there)")
    if call.return_lse:
        reasons.append("return_lse")
    if call.out_dtype != q.dtype:
        reasons.append("out_dtype differs from the inputs'")
    if call.stable != "off":
        reasons.append(f"stable={call.stable!r}")
    if q.shape[-1] != v.shape[-1]:
        reasons.append("value width differs from key width")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        reasons.append("head width is not contiguous")
    if q.device.type == "cuda":
        if q.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"{q.dtype} (fused kernels take 16 bits)")
        if q.shape[-1] % 8:
            reasons.append("head width is no multiple of 8")
        if call.deterministic and call.needs_grad:
            reasons.append("its backward is not deterministic")
        reasons += old_gpu(call.q.device)
    return reasons


def _fa4(call: AttentionCall) -> Result:
    out, lse = run_fa4(*_arguments(call))
    if not call.return_lse:
        return out, None
    # a sum that is NaN comes back as an LSE of -inf
    return out, lse.masked_fill(lse.isneginf() & out.detach()[..., 0].isnan(), torch.nan)


def _cudnn_refuses(call: AttentionCall) -> list[str]:
    if call.q.device.type != "cuda":
        return [f"device {call.q.device.type}"]
    if not _HAS_CUDNN:
        return ["torch is built without cuDNN"]
    reasons = _fused_refuses(call)
    if call.q.shape[-1] > _CUDNN_WIDTH:
        reasons.append(f"head width above {_CUDNN_WIDTH}")
    return reasons


def _few_rows(call: AttentionCall) -> list[str]:
    """cuDNN and FlashAttention-4 shine where there are many rows; a step of a decoder is bound by reading keys."""
    rows = call.q.shape[-3]
    return [f"{rows} query rows: the keys are split over the device instead"] if rows < FEW_ROWS else []


def _cudnn(call: AttentionCall) -> Result:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa_call(call)


def _flash_refuses(call: AttentionCall) -> list[str]:
    reasons = _fused_refuses(call)
    if call.q.device.type not in ("cpu", "cuda"):
        reasons.append(f"device {call.q.device.type}")
    return reasons


def _flash_avoids(call: AttentionCall) -> list[str]:
    """On Hopper its kernels, FlashAttention-2's, were measured at 0.6 to 0.7 of the speed of ours."""
    if call.q.device.type != "cuda":
        return []
    if triton_refuses(call):
        return []
    if capability(call.q.device) >= (9, 0):
        return ["the Triton kernels are faster on this GPU"]
    return _few_rows(call)


def _flash(call: AttentionCall) -> Result:
    if call.q.device.type == "cpu":
        return _sdpa_call(call)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa_call(call)


def _sdpa_call(call: AttentionCall) -> Result:
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    causal = call.right == 0
    if q.shape[2] == 1:  # the one at the end, which sees every key; a branch, since `and` would give torch.compile no bool
        causal = False
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.scale, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _arguments(call: AttentionCall) -> tuple[Any, ...]:
    # without a backward pass nothing has to be kept for it
    stable = "exact_delta" if call.stable == "delta" and not call.needs_grad else call.stable
    return (
        call.q, call.k, call.v, call.sinks, call.key_bias, call.cu_seqlens_q, call.cu_seqlens_k, call.q_pos,
        call.scale, call.left, call.right, call.softcap, stable, call.out_dtype,
    )  # fmt: skip


def triton_refuses(call: CoreCall) -> list[str]:
    """What none of the core's kernels can do."""
    return kernels_refuse(call.q.device, call.q.dtype)


def triton_avoids(call: CoreCall) -> list[str]:
    """Where they should not run by themselves."""
    return kernels_avoid(call.q.device)


def _triton(call: AttentionCall) -> Result:
    out, lse = run_triton(*_arguments(call))
    return out, lse


def _torch(call: AttentionCall) -> Result:
    out, lse = run_blockwise(*_arguments(call))
    return out, lse


BACKENDS: tuple[Backend[AttentionCall], ...] = (
    Backend("fa4", _fa4, flash4.refuses, _few_rows),
    Backend("cudnn", _cudnn, _cudnn_refuses, _few_rows),
    Backend("sdpa", _flash, _flash_refuses, _flash_avoids),
    Backend("triton", _triton, triton_refuses, triton_avoids),
    Backend("torch", _torch, lambda call: []),
    Backend("reference", reference, reference_refuses, avoids=only_when_named),
)
