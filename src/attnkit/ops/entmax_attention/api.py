"""Attention whose rows are normalised by alpha-entmax: keys with low scores get exactly nothing."""

from typing import NamedTuple

from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.entmax_attention.backends import BACKENDS
from attnkit.ops.entmax_attention.call import prepare
from attnkit.ops.entmax_attention.sparsity import measure

__all__ = ["EntmaxAttentionResult", "entmax_attention"]


class EntmaxAttentionResult(NamedTuple):
    """What `entmax_attention` returns with `return_aux`; only `out` has a gradient.

    Attributes:
        out: [B, T, H, Dv] (packed [R, H, Dv]).
        tau: [B, T, H] (packed [R, H]), thresholds in units of (alpha - 1) * scores; +inf where a row sees nothing.
        support: [B, T, H] int32, keys of each row that got something.
        seen: [B, T, H] int32, keys that it sees.
        tiles: [H, 2] int64, tiles of 64 rows and 64 keys that hold something, and all that were walked over.
    """

    out: Tensor
    tau: Tensor
    support: Tensor
    seen: Tensor
    tiles: Tensor


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_bias: Tensor | None = None,
    n_refine: int = 2,
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | EntmaxAttentionResult:
    """Attention with alpha-entmax in place of softmax.

    p_i = entmax_alpha(softcap(scale * q_i . k_j)) over the keys that row i sees;  out_i = sum_j p_ij v_j

    Row i of T queries stands on key p = i + S - T (the last query on the last key).

    Args:
        q: [B, T, H, D], any strides; packed sequences [R, H, D].
        k: [B, S, Hkv, D] or packed [S, Hkv, D]; H is a multiple of Hkv (grouped heads).
        v: [B, S, Hkv, Dv] or packed [S, Hkv, Dv]; D and Dv lie in 16..256 and may differ.
        alpha: a number in [1, 2], or [H], one for each head, in (1, 2], through which gradients flow; 1 is softmax.
        causal, scale, window_size, softcap: as of `attention`.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as of `attention`.
        key_bias: [B, S] or [B, S, Hkv] (packed [S] or [S, Hkv]) of 0 and -inf; -inf masks the key, which may then hold
            anything.
        n_refine: updates of the threshold that the kernels make at least; they go on until the sum of a row's probabilities
            is close to 1, "torch" and "reference" until nothing moves.
        return_aux: return an `EntmaxAttentionResult`, with thresholds and what is sparse; costs one more walk over the keys.
        backend: "auto", "softmax" (alpha 1 only), "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv] (packed [R, H, Dv]); rows that see no key give 0.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        UnsupportedError: a head width outside 16..256.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: that of `attention` and one more product of queries and keys for each walk that the threshold takes (none above
        the first where a tile's scores can be kept); memory linear in T and S.
    Source: Goncalves et al. 2025 (arXiv:2502.12082), histogram start as in arXiv:2604.15180.

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 5, heads, 16) for heads in (4, 2, 2))
    >>> ops.entmax_attention(q, k, v, causal=True).shape
    torch.Size([1, 5, 4, 16])
    """
    call = prepare(
        q,
        k,
        v,
        alpha=alpha,
        causal=causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        key_bias=key_bias,
        n_refine=n_refine,
        return_aux=return_aux,
    )
    out, tau = choose("entmax_attention", BACKENDS, backend, call).run(call)
    if not return_aux:
        result: Tensor = out
        return result
    tau = tau.detach()
    return EntmaxAttentionResult(out, tau, *measure(call, tau))
