"""The implementations of entmax attention, in order of preference, each with its reasons to refuse a call."""

from typing import Any

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.attention.api import attention
from attnkit.ops.attention.backends import triton_avoids, triton_refuses
from attnkit.ops.attention.reference import reference_refuses
from attnkit.ops.entmax_attention._register import run_blockwise, run_triton
from attnkit.ops.entmax_attention.call import EntmaxAttentionCall
from attnkit.ops.entmax_attention.reference import reference

__all__ = ["BACKENDS", "arguments"]

Result = tuple[Tensor, Tensor | None]


def _is_softmax(call: EntmaxAttentionCall) -> bool:
    return call.alphas is None and call.alpha == 1


def _not_softmax(call: EntmaxAttentionCall) -> list[str]:
    return ["alpha=1, which `attention` computes"] if _is_softmax(call) else []


def _softmax(call: EntmaxAttentionCall) -> Result:
    window = (call.left, call.right)
    out = attention(
        call.q, call.k, call.v, scale=call.scale, window_size=window, softcap=call.softcap or None, key_bias=call.key_bias,
        cu_seqlens_q=call.cu_seqlens_q, cu_seqlens_k=call.cu_seqlens_k,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out, None


def arguments(call: EntmaxAttentionCall) -> tuple[Any, ...]:
    """What the registered operators take; O2 is kept where there will be a backward pass."""
    return (
        call.q, call.k, call.v, call.alphas, call.key_bias, call.cu_seqlens_q, call.cu_seqlens_k, None,
        call.scale, call.left, call.right, call.softcap, call.alpha, call.n_refine, call.learned, call.needs_grad,
    )  # fmt: skip


_LOWEST = 1.25  # below, 1 / (alpha - 1) magnifies what float32 leaves out of a score


def _triton_refuses(call: EntmaxAttentionCall) -> list[str]:
    reasons = _not_softmax(call) + triton_refuses(call)
    if call.alphas is None and call.alpha < _LOWEST:  # those of a tensor are on the device, and looking would wait for it
        reasons.append(f"alpha below {_LOWEST}")
    return reasons


def _triton(call: EntmaxAttentionCall) -> Result:
    out, tau = run_triton(*arguments(call))
    return out, tau


def _torch(call: EntmaxAttentionCall) -> Result:
    out, tau = run_blockwise(*arguments(call))
    return out, tau


BACKENDS: tuple[Backend[EntmaxAttentionCall], ...] = (
    Backend("softmax", _softmax, lambda call: [] if _is_softmax(call) else ["alpha other than 1"]),
    Backend("triton", _triton, _triton_refuses, triton_avoids),
    Backend("torch", _torch, _not_softmax),
    Backend("reference", reference, reference_refuses, avoids=only_when_named),
)
