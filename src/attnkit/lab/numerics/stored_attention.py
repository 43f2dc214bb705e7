"""The attention that is not tiled: scores and probabilities are written down in the number format of the model."""

import itertools
from typing import Any

import torch
from torch import Tensor

from attnkit.models import mixer
from attnkit.modules import MixerContext, SoftmaxAttention

__all__ = ["BASELINE", "StoredAttention"]

BASELINE = "attention_baseline"


class StoredAttention(SoftmaxAttention):
    """`SoftmaxAttention` as plain framework code computes it, whatever the device: the baseline of flash attention.

    Scores, scaled scores, probabilities and result are each rounded to the dtype of queries, keys and values, and so are
    their gradients; only sums inside an operator are wider. Packed sequences are computed one after the other, with
    T x S matrices: for short ones.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: MixerContext) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # on a GPU its softmax keeps probabilities in float32
            if context.cu_seqlens is None:
                return _causal(q, k, v)
            borders = itertools.pairwise(context.cu_seqlens.tolist())
            return torch.cat([_causal(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in borders], dim=1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D], [B, S, Hkv, D], [B, S, Hkv, D] -> [B, T, H, D]; row t sees the keys up to t + S - T."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + scores.shape[-1] - scores.shape[-2])
    out = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v
    return out.transpose(1, 2)


@mixer(BASELINE, cache_type="full_attention", needs_rope=True, packing=True)
def _build(config: Any, layer_idx: int) -> StoredAttention:
    return StoredAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_idx=layer_idx,
        bias=config.attention_bias,
    )
