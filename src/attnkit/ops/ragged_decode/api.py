"""Attention of new queries over everything that is stored, page by page and head by head."""

import torch
from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.ragged_decode.backends import BACKENDS
from attnkit.ops.ragged_decode.call import prepare
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["ragged_decode_attention"]


def ragged_decode_attention(
    q: Tensor,
    pages: KVPages,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over stored keys, of which every head has a number of its own.

    s_ij = softcap(scale * q_i . k_j) + bias_j;  p_i = softmax over all that the head stores;  out_i = sum_j p_ij v_j

    Every query sees every stored key. Newer keys, which queries see in part, are another call of attention, and
    `merge_partials` puts the two together by their LSE.

    Args:
        q: [B, T, H, D], any strides; H is a multiple of Hkv, and query head h uses key head h // (H / Hkv).
        pages: what is stored; raw, or codes that are read as they are.
        scale: of the scores; None means 1/sqrt(D).
        softcap: c > 0 caps scaled scores smoothly, c * tanh(s / c), before the bias.
        sinks: [H] logits of a key whose value is zero, one a head.
        return_lse: also return the log-sum-exp.
        out_dtype: q's dtype, or float32 where results are merged later.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv]; with return_lse also lse [B, T, H], natural logarithm, float32 (float64 with float64 q). Heads that
        store nothing give 0 and -inf (the sink's logit with sinks).
    Raises:
        ShapeError, DTypeError, OptionError, InputError: an argument is wrong; lengths and tables are checked on the CPU.
        UnsupportedError: something requires a gradient.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: every stored key and value is read once for all queries of its group; the longest head does not decide, since
        heads are cut into pieces of equal size.
    Source: split keys as in Dao et al. 2023 (Flash-Decoding); pages as in Kwon et al. 2023 (arXiv:2309.06180); codes as in
        Liu et al. 2024 (arXiv:2402.02750), keys by channel and values by token.

    >>> import torch
    >>> from attnkit import ops
    >>> keys, values = torch.randn(2, 5, 16, 32)  # a pool of 5 pages of 16 tokens
    >>> table = torch.tensor([[[0, 3], [4, 0]]], dtype=torch.int32)  # one row, two key heads
    >>> pages = ops.KVPages(keys, values, table, lengths=torch.tensor([[20, 7]], dtype=torch.int32))
    >>> ops.ragged_decode_attention(torch.randn(1, 1, 4, 32), pages).shape
    torch.Size([1, 1, 4, 32])
    """
    call = prepare(
        q, pages, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse, out_dtype=out_dtype,
    )  # fmt: skip
    out, lse = choose("ragged_decode_attention", BACKENDS, backend, call).run(call)
    return (out, lse) if return_lse else out
