"""Layers of the cache at the moment of compression, made of a tiny Llama's attention and random hidden states."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from attnkit.inference.rope import RopeSpec
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.moments import QueryMoments

__all__ = ["WIDTH", "Attention", "attention", "context", "permuted", "rows"]

WIDTH = 24


class Attention:
    """One layer's projections and rotation.

    Args:
        heads, kv_heads, dim: an odd `dim` leaves its last channel unrotated.
        layers, index: how many layers the model has, and which this is.
    """

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 8, *, layers: int = 3, index: int = 1) -> None:
        config = LlamaConfig(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1 - 0.9 * (dim % 2) / dim},
            hidden_size=WIDTH,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            num_hidden_layers=layers,
            attn_implementation="eager",
        )
        torch.manual_seed(100 * heads + 10 * kv_heads + dim)
        self.module: Any = LlamaAttention(config, index).eval().requires_grad_(False)
        self.rope = RopeSpec.from_config(config)
        self.module.rotary_emb = LlamaRotaryEmbedding(config)
        self.heads, self.kv_heads, self.dim, self.layers, self.index = heads, kv_heads, dim, layers, index

    def heads_of(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, n, WIDTH] at positions [B, n] -> rotated queries and keys [B, H, n, D], values."""
        parts = []
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(self.module, name)
            states = torch.nn.functional.linear(hidden, projection.weight.to(hidden.dtype)).unflatten(-1, (-1, self.dim))
            if name != "v_proj":
                states = self.rope.rotate(states, positions)
                states[..., : self.rope.rotary_dim] *= self.rope.attention_factor
            parts.append(states)
        queries, keys, values = (states.transpose(1, 2) for states in parts)
        return queries, keys, values


@cache
def attention(heads: int = 4, kv_heads: int = 2, dim: int = 8) -> Attention:
    return Attention(heads, kv_heads, dim)


def rows(*lengths: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Hidden states [n, WIDTH] of each row; they are correlated, as those of text are."""
    made = []
    for place, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        noise = torch.randn(length + 3, WIDTH, generator=generator)
        made.append((noise[3:] + 0.7 * noise[2:-1] + 0.4 * noise[1:-2] + 0.5 * noise[:1]).to(dtype))
    return made


def context(
    hidden: list[Tensor],
    layer: Attention | None = None,
    *,
    ratio: float = 0.5,
    queries: int | None = None,
    phase: str = "prefill",
    pad: int = 0,
    rope: bool = True,
    sinks: int = 4,
) -> ScoreContext:
    """A layer that has just read these rows.

    Args:
        hidden: one a row; shorter ones are padded on the left, by loud garbage.
        layer: the attention.
        ratio, phase: of the context.
        queries: newest queries that were kept; None is all.
        pad: padding in front of every row beside that.
        rope: whether the context has the rotation.
        sinks: first tokens of each row whose queries are not in the moments, in a prefill.
    """
    layer = layer or attention()
    size = max(len(row) for row in hidden) + pad
    pads = torch.tensor([size - len(row) for row in hidden])
    padded = torch.stack([torch.cat([50 * torch.ones(size - len(row), WIDTH).to(row), row]) for row in hidden])
    index = torch.arange(size).expand(len(hidden), -1)
    real = index >= pads[:, None]
    turned = index - pads[:, None]
    q, k, v = layer.heads_of(padded, turned)
    kept = size if queries is None else min(queries, size)
    some = bool((pads > 0).any())
    return ScoreContext(
        stored=Stored(k, v, index[:, None].contiguous(), real[:, None] if some else None),
        queries=q[:, :, size - kept :],
        query_positions=index[:1, size - kept :],
        query_real=real[:, size - kept :] if some else None,
        query_turned=turned[:, size - kept :],
        moments=_moments(
            layer, q[:, :, size - kept :], turned[:, size - kept :], real[:, size - kept :], sinks * (phase == "prefill")
        ),
        hidden=padded,
        seen=size,
        index=layer.index,
        layers=layer.layers,
        module=layer.module,
        scale=layer.dim**-0.5,
        softcap=None,
        rope=layer.rope if rope else None,
        ratio=ratio,
        phase=phase,
    )


def _moments(layer: Attention, q: Tensor, turned: Tensor, real: Tensor, sinks: int) -> QueryMoments:
    moments = QueryMoments(sinks=sinks)
    moments.update(q, positions=turned, inv_freq=layer.rope.inv_freq, interleaved=bool(layer.rope.interleaved), real=real)
    return moments


def permuted(ctx: ScoreContext, order: list[int]) -> ScoreContext:
    """The same layer with its key heads, and the query heads that go with them, in another order."""
    stored = ctx.stored
    groups = [head * ctx.groups + place for head in order for place in range(ctx.groups)]
    module, moments = copy.deepcopy(ctx.module), copy.copy(ctx.moments)
    moments.mean, moments.spread = moments.mean[:, groups], moments.spread[:, groups]
    for name, heads in (("q_proj", groups), ("k_proj", order), ("v_proj", order)):
        projection = getattr(module, name)
        projection.weight.data = projection.weight.unflatten(0, (len(heads), -1))[heads].flatten(0, 1)
    module.o_proj.weight.data = module.o_proj.weight.unflatten(1, (len(groups), -1))[:, groups].flatten(1)
    return replace(
        ctx,
        stored=replace(stored, keys=stored.keys[:, order], values=stored.values[:, order]),
        queries=ctx.queries[:, groups],
        moments=moments,
        module=module,
    )
