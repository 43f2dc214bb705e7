"""Scores of cached keys: the attention that a Gaussian of queries will pay them, times the size of their values."""

from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.expected_attention.backends import BACKENDS
from attnkit.ops.expected_attention.call import prepare

__all__ = ["expected_attention_scores"]


def expected_attention_scores(
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    cov: Tensor | None,
    *,
    scale: float | None = None,
    eps: float = 0.0,
    value_norm: str = "l2",
    output_gram: Tensor | None = None,
    valid: Tensor | None = None,
    sinks: int = 4,
    backend: str = "auto",
) -> Tensor:
    """How much queries drawn from N(mean, cov) are expected to take from each cached key; larger is better kept.

    log z_i = scale mean . k_i + scale^2 / 2 k_i . cov k_i;  a = softmax(log z) of each query head over keys that compete;
    score_i = mean over the G query heads of a key head of (a_i + eps) norm(v_i)

    Args:
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv], keys as attention sees them, after rotation.
        mean: [B, H, D] of queries to come, as `future_query_moments` returns it; float32 (float64 with float64 keys).
        cov: [B, H, D, D], symmetric, of the same dtype; None leaves the second term out.
        scale: of attention's scores; 1 / sqrt(D) by default.
        eps: added to every probability, so that what is never attended is ranked by its value.
        value_norm: "l2" is that of v_i; "output" is that of what head h adds to the residual stream, W_h v_i; "none" is 1.
        output_gram: [H, Dv, Dv], W_h^T W_h of each head's part of the output projection, for "output" alone.
        valid: [B, S] or [B, S, Hkv] bool, False where a key is not there (padding); None means all are.
        sinks: the first so many valid keys of a row do not compete and come first.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        [B, S, Hkv] float32 (float64), contiguous as [B, Hkv, S]: -inf for keys that are not valid, and for sinks the largest
        score of their row of the batch plus 1 (1 where nothing competes). There is no wait for the device.
    Raises:
        ShapeError, DTypeError, OptionError, InputError: an argument is wrong.
        UnsupportedError: a tensor requires a gradient.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: 2 S D^2 H multiply-adds; memory of S H numbers besides the result.
    Source: Devoto et al. 2025 (arXiv:2510.00636), equations 8 and 9.

    >>> import torch
    >>> from attnkit import ops
    >>> k, v, mean = torch.eye(8)[None, :, None], torch.ones(1, 8, 1, 2), torch.zeros(1, 1, 8)
    >>> mean[..., 6] = 8.0
    >>> ops.expected_attention_scores(k, v, mean, None, scale=1.0, sinks=1).flatten().topk(2).indices
    tensor([0, 6])
    """
    call = prepare(
        k, v, mean, cov, scale=scale, eps=eps, value_norm=value_norm, output_gram=output_gram, valid=valid, sinks=sinks
    )
    scores: Tensor = choose("expected_attention_scores", BACKENDS, backend, call).run(call)
    return scores
