"""Expected attention in the cache's layout."""

from torch import Tensor

from attnkit import ops
from attnkit._core.errors import ShapeError

__all__ = ["expected_attention_scores"]


def expected_attention_scores(
    keys: Tensor,
    values: Tensor,
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
    """`attnkit.ops.expected_attention_scores` of keys and values as a cache layer stores them.

    Args:
        keys, values: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        mean, cov, scale, eps, value_norm, output_gram, sinks, backend: as of the operator.
        valid: [B, S] or [B, Hkv, S] bool.
    Returns:
        [B, Hkv, S] float32 (float64), contiguous.
    Raises:
        what the operator raises.

    >>> import torch
    >>> from attnkit import kv
    >>> keys, mean = torch.eye(8)[None, None], torch.zeros(1, 1, 8)
    >>> mean[..., 6] = 8.0
    >>> kv.expected_attention_scores(keys, torch.ones(1, 1, 8, 2), mean, None, scale=1.0, sinks=1).topk(2).indices
    tensor([[[0, 6]]])
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected 4 dimensions [B, Hkv, S, D]")
    if valid is not None and valid.dim() == 3:
        valid = valid.transpose(1, 2)
    scores = ops.expected_attention_scores(
        keys.transpose(1, 2), values.transpose(1, 2), mean, cov, scale=scale, eps=eps, value_norm=value_norm,
        output_gram=output_gram, valid=valid, sinks=sinks, backend=backend,
    )  # fmt: skip
    return scores.transpose(1, 2)
