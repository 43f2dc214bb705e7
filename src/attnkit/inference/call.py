"""What one attention layer asks for, in the terms of attnkit's operators."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import accumulator_dtype
from attnkit.inference.rope import RopeSpec

if TYPE_CHECKING:  # the cache needs transformers; the policies that read it do not
    from attnkit.kv.layers import KVLayer

__all__ = ["LayerCall", "Padding"]


class Padding:
    """Which tokens of a padded batch are real; shared by all layers of one forward pass.

    Args:
        mask: [B, L] bool over every token seen, including those of this pass.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @cached_property
    def starts(self) -> Tensor:
        """[B] index of each row's first real token; 0 where there is none yet."""
        return self.mask.int().argmax(-1)

    @cached_property
    def contiguous(self) -> bool:
        """Whether every row is padding, then real tokens, then padding."""
        index = torch.arange(self.mask.shape[-1], device=self.mask.device)
        ends = (self.starts + self.mask.sum(-1))[:, None]
        return bool((self.mask == ((index >= self.starts[:, None]) & (index < ends))).all())


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one attention layer in one forward pass.

    Attributes:
        q: [B, T, H, D], rotated, a view of the model's tensor, as are k and v.
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv], all stored keys including those of the T new tokens, which come last; the
            new ones alone where the layer is in pages.
        scale: of the scores; None means 1 / sqrt(D).
        causal: False in bidirectional models.
        window_size: the layer's own sliding window, None in full-attention layers.
        softcap, sinks: as in `attnkit.ops.attention`.
        padding: None when every token is real.
        seen: tokens that the cache has seen, including the T new ones.
        layer: the cache layer, where it knows positions and may drop keys; else None, and S equals `seen` in
            full-attention layers.
        rope: the rotary embedding in force, where the policy needs it.
        turned: [B or 1, T] int64, the positions that q and the new keys were rotated to.
        module: the layer's attention module.
        hidden: [B, T, width], what went into it, where the cache method needs it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    causal: bool
    window_size: tuple[int, int] | None
    softcap: float | None
    sinks: Tensor | None
    padding: Padding | None
    seen: int
    layer: "KVLayer | None"
    rope: RopeSpec | None
    turned: Tensor | None = None
    module: Any = None
    hidden: Tensor | None = None

    @property
    def index(self) -> int:
        """The layer's number."""
        return int(self.module.layer_idx)

    @property
    def first(self) -> int:
        """The index of the first of the T new tokens."""
        return self.seen - self.q.shape[1]

    def key_positions(self) -> Tensor:
        """[B or 1, Hkv or 1, S] int64: the index of each stored token in its row, padding counted."""
        if self.layer is not None:
            return self.layer.positions
        return torch.arange(self.seen - self.k.shape[1], self.seen, device=self.k.device)[None, None]

    def real_keys(self) -> Tensor | None:
        """[B, Hkv or 1, S] bool: which stored keys are real tokens; None when all are."""
        if self.padding is None:
            return None
        positions = self.key_positions().expand(self.k.shape[0], -1, -1)
        return self.padding.mask[:, None].expand(-1, positions.shape[1], -1).gather(-1, positions)

    def key_bias(self, seen: Tensor | None) -> Tensor | None:
        """What `ops.attention` takes as key_bias: 0 where `seen` ([B, Hkv or 1, S] bool) holds and -inf elsewhere."""
        if seen is None:
            return None
        bias = torch.zeros(seen.shape, dtype=accumulator_dtype(self.q.dtype), device=seen.device)
        bias = bias.masked_fill_(~seen, -torch.inf)
        return bias[:, 0] if bias.shape[1] == 1 else bias.transpose(1, 2)

    def dense(self) -> Tensor:
        """Every query sees every real key that the layer's own mask shows it; out [B, T, H, Dv]."""
        if self.layer is not None and self.layer.pages is not None:
            options: dict[str, Any] = {
                "scale": self.scale,
                "softcap": self.softcap,
                "sinks": self.sinks,
                "padding": self.padding,
            }
            return self.layer.attend(self.q, self.k, self.v, **options)
        out: Any = ops.attention(
            self.q,
            self.k,
            self.v,
            causal=self.causal,
            scale=self.scale,
            window_size=self.window_size,
            softcap=self.softcap,
            sinks=self.sinks,
            key_bias=self.key_bias(self.real_keys()),
        )
        return out  # type: ignore[no-any-return]
