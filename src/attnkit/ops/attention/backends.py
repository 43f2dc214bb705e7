"""The implementations of attention, in order of preference, each with its reasons to refuse a call."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.attention._register import attention_op
from attnkit.ops.attention.call import AttentionCall
from attnkit.ops.attention.reference import MAX_PAIRS, reference

__all__ = ["BACKENDS"]

Result = tuple[Tensor, Tensor | None]
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def _sdpa_refuses(call: AttentionCall) -> list[str]:
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
    elif q.device.type != "cpu":
        reasons.append(f"device {q.device.type}")
    return reasons


def _sdpa(call: AttentionCall) -> Result:
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    causal = call.right == 0 and q.shape[2] > 1  # one query at the end sees every key
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cuda":
        with sdpa_kernel(_FUSED, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.scale, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.scale, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _torch(call: AttentionCall) -> Result:
    out, lse = attention_op(
        call.q, call.k, call.v, call.sinks, call.key_bias, call.cu_seqlens_q, call.cu_seqlens_k, call.q_pos,
        call.scale, call.left, call.right, call.softcap, call.out_dtype,
    )  # fmt: skip
    return out, lse


def _reference_refuses(call: AttentionCall) -> list[str]:
    pairs = call.q.shape[-3] * call.k.shape[-3]
    return [f"{pairs} scores a head; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []


BACKENDS: tuple[Backend[AttentionCall], ...] = (
    Backend("sdpa", _sdpa, _sdpa_refuses),
    Backend("torch", _torch, lambda call: []),
    Backend("reference", reference, _reference_refuses, avoids=only_when_named),
)
