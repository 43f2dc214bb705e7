"""Softmax attention: dense, causal, windowed, packed, grouped heads, with sinks, softcap and key bias."""

import torch
from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.attention.backends import BACKENDS
from attnkit.ops.attention.call import AttentionCall, prepare

__all__ = ["attention", "query_sparse_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
    stable: str = "off",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention.

    s_ij = softcap(scale * q_i . k_j) + key_bias_j;  p_i = softmax over the keys that row i sees;  out_i = sum_j p_ij v_j

    Row i of T queries stands on key p = i + S - T (the last query on the last key).

    Args:
        q: [B, T, H, D], any strides; packed sequences [R, H, D].
        k: [B, S, Hkv, D] or packed [S, Hkv, D]; H is a multiple of Hkv (grouped heads).
        v: [B, S, Hkv, Dv] or packed [S, Hkv, Dv]; D and Dv lie in 16..256 and may differ.
        causal: row i sees the keys j <= p.
        scale: of the scores; None means 1/sqrt(D).
        window_size: (left, right), keys p - left .. p + right, the row's own key not counted; None or -1 is unbounded.
        softcap: c > 0 caps scaled scores smoothly, c * tanh(s / c).
        sinks: [H] logits of a key whose value is zero, one a head; they take part in the softmax and in the LSE.
        key_bias: [B, S] or [B, S, Hkv] (packed [S] or [S, Hkv]), added to the scaled scores; -inf masks the key, which
            then may hold anything, NaN included.
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 boundaries of packed sequences; empty sequences are allowed.
        max_seqlen_q, max_seqlen_k: longest sequence, checked against the boundaries on the CPU.
        return_lse: also return the log-sum-exp; gradients flow through it.
        out_dtype: q's dtype, or float32 where results are merged later.
        deterministic: True allows only backends that give the same bits every time, None any.
        stable: what is done against biased rounding in 16 bits (docs/numerics.md), in our own kernels only:
            "delta" keeps what rounding took from the output for the backward pass (2 bytes an element), "exact_delta"
            recomputes the sum of p * dp there (two more matrix products), "dynamic_max" moves a maximum that several keys
            share. All three divide by the sum of the probabilities as they were rounded.
        backend: "auto", "fa4", "cudnn", "sdpa", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv] (packed [R, H, Dv]); with return_lse also lse [B, T, H] (packed [R, H]), natural logarithm,
        float32 (float64 with float64 inputs). Rows that see no key give 0 and -inf (the sink's logit with sinks).
        A NaN in a row of q, or in a key that a row sees, makes that row NaN; a NaN value may reach every row of its tile.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        UnsupportedError: a head width outside 16..256.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: 2 * pairs * H * (D + Dv) operations for the pairs that are seen; memory linear in T and S.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); tiling as in Dao 2023 (arXiv:2307.08691); sinks as in Xiao et al. 2023
        (arXiv:2309.17453, learned logits); stable modes after Qiu and Yao 2025 (arXiv:2510.04212).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 5, heads, 16) for heads in (4, 2, 2))
    >>> ops.attention(q, k, v, causal=True).shape
    torch.Size([1, 5, 4, 16])
    """
    call = prepare(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        key_bias=key_bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_lse,
        out_dtype=out_dtype,
        deterministic=deterministic,
        stable=stable,
    )
    return _run("attention", backend, call)


def query_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    *,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
    stable: str = "off",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of some of the rows: row i stands on key q_pos[i] and sees the keys j <= q_pos[i].

    Equal to those rows of `attention(..., causal=True)` over all queries.

    Args:
        q: [B, T, H, D], the selected rows; packed [R, H, D].
        k: [B, S, Hkv, D], every key; packed [S, Hkv, D].
        v: [B, S, Hkv, Dv]; packed [S, Hkv, Dv].
        q_pos: [T] or [B, T] int32 or int64, in 0..S-1, in any order; sorted positions walk over fewer keys. Packed [R]: rows
            of k, rising within each sequence (checked on the CPU); a row that stands before its sequence's first key, -1
            at the earliest, sees nothing.
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 boundaries of packed sequences, as in `attention`.
        scale, window_size, softcap, sinks, key_bias, return_lse, out_dtype, deterministic, stable, backend: as in `attention`;
            the right side of a window is 0 at most, since the rows are causal.
    Returns:
        out [B, T, H, Dv], and lse [B, T, H] with return_lse; packed without B.
    Raises:
        The same as `attention`, and OptionError for positions outside the keys or unsorted (checked on the CPU).
    Source: query-sparse, key-dense attention of Delta Attention (arXiv:2505.11254, section 3).
    """
    call = prepare(
        q,
        k,
        v,
        causal=True,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        key_bias=key_bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        q_pos=q_pos,
        return_lse=return_lse,
        out_dtype=out_dtype,
        deterministic=deterministic,
        stable=stable,
    )
    return _run("query_sparse_attention", backend, call)


def _run(name: str, backend: str, call: AttentionCall) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = choose(name, BACKENDS, backend, call).run(call)
    return (out, lse) if call.return_lse else out
