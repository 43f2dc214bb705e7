"""FlashAttention-4 (the package flash-attn-4, CuTe kernels): what it cannot do, and its two passes.

The reasons were read from its sources at 4.0.0b36 and its kernels compiled for sm_90a; nothing of it is imported before a
call that it takes. The passes are called one by one, since torch.compile cannot trace its autograd function.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit._core.devices import capability, current
from attnkit._core.errors import BackendUnavailable
from attnkit.ops.attention.call import AttentionCall

__all__ = ["backward", "forward", "refuses"]

PACKAGES = ("flash_attn", "cutlass", "quack", "tvm_ffi")
MAX_GRID = 65535  # sequences of a batch are one axis of the grid


def missing() -> list[str]:
    """What of flash-attn-4 cannot be found, looked for once."""
    return _search()


# what torch.compiler.assume_constant_result sets, after a second of importing: the tracer calls it and does not look inside
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _search() -> list[str]:
    """What of flash-attn-4 cannot be found; FlashAttention-2 also calls itself flash_attn, so the name is not enough."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    spec = importlib.util.find_spec("flash_attn")
    places = spec.submodule_search_locations if spec else None
    if places and not any((Path(place) / "cute" / "interface.py").is_file() for place in places):
        absent.append("flash_attn.cute")
    if not any(True for _ in importlib.metadata.distributions(name="flash-attn-4")):
        absent.append("flash-attn-4")
    return absent


def refuses(call: AttentionCall) -> list[str]:
    """Why FlashAttention-4 cannot run the call; where its sources leave a doubt our own kernels serve."""
    if missing():
        return [f"flash-attn-4 is not installed (no {', '.join(missing())})"]
    q, k, v = call.q, call.k, call.v
    reasons = _widths(q.shape[-1], v.shape[-1], call.needs_grad, grouped=q.shape[-2] != k.shape[-2])
    if q.device.type != "cuda":
        reasons.append(f"device {q.device.type}")
    elif (arch := capability(q.device))[0] != 9:
        reasons.append(f"compute capability {arch[0]}.{arch[1]} (other kernels with other limits than 9.0's, not checked)")
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{q.dtype} (it takes 16 bits)")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("empty inputs")
    if q.dim() == 4 and q.shape[0] > MAX_GRID:
        reasons.append(f"more than {MAX_GRID} sequences in a batch")
    if any(t.numel() >= 2**31 for t in (q, k, v)):
        reasons.append("a tensor of 2^31 elements or more (its offsets are not checked there)")
    if any(0 in t.stride() and _expanded(t) for t in (q, k, v)):
        reasons.append("expanded inputs")
    boundaries = [cu for cu in (call.cu_seqlens_q, call.cu_seqlens_k) if cu is not None]
    if any(cu.device != q.device or cu.stride(0) != 1 for cu in boundaries):
        reasons.append("cu_seqlens on another device, or strided")
    if not call.scale > 0:
        reasons.append("a scale that is not positive (its running maximum is of unscaled scores)")
    if call.softcap:
        reasons.append("softcap (its tanh is approximate)")
    if call.sinks is not None:
        reasons.append("sinks (one 88 above every score of a row overflows its sum)")
    if call.key_bias is not None:
        reasons.append("key_bias")
    if call.q_pos is not None:
        reasons.append("explicit query positions")
    if call.out_dtype != q.dtype:
        reasons.append("out_dtype differs from the inputs'")
    if call.stable != "off":
        reasons.append(f"stable={call.stable!r}")
    if call.deterministic and call.needs_grad:
        reasons.append("deterministic gradients (its backward adds up dq in any order; the ordered one is not checked)")
    return reasons


def _widths(width: int, width_v: int, needs_grad: bool, grouped: bool) -> list[str]:
    reasons = []
    if width % 8 or width_v % 8:
        reasons.append("head width is no multiple of 8")
    if width != width_v:
        if (width, width_v) != (192, 128):
            reasons.append("value width differs from key width (only 192 with 128; others run out of registers or memory)")
        elif needs_grad and grouped:
            reasons.append("gradients of grouped heads with values of another width")
    if needs_grad and width % 32:
        reasons.append("gradients at a head width that is no multiple of 32 (two of its kernels round it differently)")
    return reasons


def _expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@functools.cache
def _load() -> Any:
    # its compiler warns of one argument of its own at every kernel, the backward's in another thread
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    module = importlib.import_module("flash_attn.cute.interface")
    if absent := [name for name in ("_flash_attn_fwd", "_flash_attn_bwd") if not hasattr(module, name)]:
        raise BackendUnavailable(
            f"this flash-attn-4 has no {' and no '.join(absent)}; install 4.0.0b36, or set ATTNKIT_DISABLE=attention.fa4"
        )
    return module


def _arguments(inputs: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """q, k and v in its shapes, and the options that both passes take."""
    q, k, v, _, _, cu_q, cu_k, _, scale, left, right, *_ = inputs
    options = {
        "softmax_scale": scale,
        # sides that reach every key are unbounded: cheaper, and within its 32-bit integers
        "window_size_left": left if 0 <= left < k.shape[1] - 1 else None,
        "window_size_right": right if 0 <= right < q.shape[1] - 1 else None,
    }
    if cu_q is None:
        return (q, k, v), options
    return (q[0], k[0], v[0]), options | {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def forward(inputs: tuple[Any, ...], out_dtype: torch.dtype) -> tuple[Tensor, Tensor, None]:
    """out [B, T, H, Dv] and lse [B, T, H] of a call that `refuses` has nothing against; packed ones as a batch of one."""
    tensors, options = _arguments(inputs)
    with current(tensors[0].device):
        out, lse, *_ = _load()._flash_attn_fwd(*tensors, return_lse=True, **options)
    lse = lse.transpose(-1, -2)
    return (out, lse, None) if out.dim() == 4 else (out[None], lse[None], None)


def backward(
    inputs: tuple[Any, ...], d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, rest: None, need_bias: bool
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v; empty tensors for those of what it does not take."""
    tensors, options = _arguments(inputs)
    if tensors[0].dim() == 3:
        d_out, out, lse = d_out[0], out[0], lse[0]
        d_lse = None if d_lse is None else d_lse[0]
    lse = lse.transpose(-1, -2).contiguous()
    d_lse = None if d_lse is None else d_lse.transpose(-1, -2).contiguous()
    with current(out.device):
        grads = _load()._flash_attn_bwd(*tensors, out, d_out, lse, dlse=d_lse, **options)
    d_q, d_k, d_v = grads if tensors[0].dim() == 4 else (t[None] for t in grads)
    return d_q, d_k, d_v, d_q.new_empty(0), d_q.new_empty(0)
