"""Runs of keys through torch's fused CPU kernels, with the LSE that the public function keeps to itself.

The kernels take one head width for queries, keys and values, an additive mask, and no softcap, sinks or windows: tiles
bring those. The backward kernel knows no gradient of the LSE. It computes p * (d_out . v - d_out . out), and what is
wanted is p * (d_out . v - d_out . out + d_lse): one more column, 1 in d_out, -d_lse in out and 0 in v, says exactly that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.ops.attention.problem import Problem

__all__ = ["available", "backward_run", "forward_run", "lse_column"]

# private names of torch; where a torch lacks them, matrix products serve (blockwise.py)
_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def available(p: Problem) -> bool:
    """Whether the kernels can do this problem."""
    return _FORWARD is not None and _BACKWARD is not None and p.q.device.type == "cpu" and not p.softcap


def forward_run(p: Problem, q: Tensor, rows: slice, keys: slice, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of scaled queries [B, Hkv, G, rows, D] over a run of keys: out [..., Dv], lse [..., 1] and, its sum, 1."""
    assert _FORWARD is not None
    width = max(p.k.shape[3], p.v.shape[3])
    mask = _mask(p, q, rows, keys, masked)
    out, lse = _FORWARD(
        _widen(q, width).flatten(1, 2), _widen(p.keys[:, :, keys], width), _widen(p.values[:, :, keys], width),
        0.0, False, attn_mask=mask, scale=1.0,
    )  # fmt: skip
    if mask is not None:  # it reports 0 for rows that see nothing
        lse = lse.masked_fill(torch.isneginf(mask).all(-1).expand(lse.shape), -torch.inf)
    heads = (p.kv_heads, p.group)
    return out[..., : p.v.shape[3]].unflatten(1, heads), lse[..., None].unflatten(1, heads), lse.new_ones(())


def lse_column(p: Problem, d_out: Tensor, out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Append the column that carries the gradient of the LSE; nothing where there is none to carry."""
    d_out, out = d_out.to(p.acc), out.to(p.acc)
    if not d_lse.any():
        return d_out, out
    return torch.cat([d_out, torch.ones_like(d_lse)[..., None]], -1), torch.cat([out, -d_lse[..., None]], -1)


def backward_run(
    p: Problem, q: Tensor, rows: slice, keys: slice, masked: bool, d_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled queries [B, Hkv, G, rows, D], keys [B, Hkv, keys, D] and values, of one run.

    `d_out` and `out` come from `lse_column` and `lse` [..., 1], finite, covers every run of the rows.
    """
    assert _BACKWARD is not None
    width = max(p.k.shape[3], d_out.shape[-1])
    d_q, d_k, d_v = _BACKWARD(
        _widen(d_out, width).flatten(1, 2), _widen(q, width).flatten(1, 2), _widen(p.keys[:, :, keys], width),
        _widen(p.values[:, :, keys], width), _widen(out, width).flatten(1, 2), lse[..., 0].flatten(1, 2),
        0.0, False, attn_mask=_mask(p, q, rows, keys, masked), scale=1.0,
    )  # fmt: skip
    d_q = d_q[..., : p.k.shape[3]].unflatten(1, (p.kv_heads, p.group))
    return d_q, d_k[..., : p.k.shape[3]], d_v[..., : p.v.shape[3]]


def _mask(p: Problem, q: Tensor, rows: slice, keys: slice, masked: bool) -> Tensor | None:
    """Key bias and hidden keys as one additive mask, [rows, keys] or [B, 1 or H, 1 or rows, keys]."""
    mask = None
    if p.bias is not None:
        mask = p.bias[..., keys]
        mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(p.group, 1)
    if masked:
        mask = (q.new_zeros(()) if mask is None else mask).masked_fill(p.hidden(rows, keys), -torch.inf)
    return mask


def _widen(t: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros, and make it contiguous: the kernels want both."""
    missing = width - t.shape[-1]
    return F.pad(t, (0, missing)) if missing or t.stride(-1) != 1 else t
