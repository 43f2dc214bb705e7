"""Attention mixers: projections, positions, cache and packing around an operator, and softmax attention as one of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from attnkit._core.checks import accumulator_dtype, check_choice
from attnkit._core.errors import OptionError
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.projection import project
from attnkit.modules.rotary import rotate
from attnkit.ops.attention.api import attention
from attnkit.ops.attention.call import MAX_WIDTH, MIN_WIDTH, STABLE

__all__ = ["GroupedAttention", "SoftmaxAttention", "head_sizes"]

_ALONE, _NOTHING = MixerContext(), Shared()


def head_sizes(hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Hkv and D, where None stands for H and C / H.

    Raises:
        OptionError: heads that do not divide, or a width that attention has no kernels for.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise OptionError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if head_dim is None:
        if hidden_size % num_heads:
            raise OptionError(f"hidden_size={hidden_size} is no multiple of num_heads={num_heads}; give head_dim")
        head_dim = hidden_size // num_heads
    if not MIN_WIDTH <= head_dim <= MAX_WIDTH:
        raise OptionError(f"head_dim={head_dim} is outside {MIN_WIDTH}..{MAX_WIDTH}, the widths that attention has kernels for")
    return num_kv_heads, head_dim


class GroupedAttention(nn.Module):
    """Attention with grouped heads around an operator: causal or not, windowed or not, padded, packed, cached.

    Args:
        operator: what is called for the attention itself, with the arguments that the operators on the core share.
        hidden_size: C.
        num_heads: H query heads.
        num_kv_heads: Hkv key heads, a divisor of H; None means H.
        head_dim: D, 16..256; None means C / H.
        layer_idx: which layer of the cache is its own.
        window: keys that a token sees, itself counted; where attention is not causal, as many on the other side. None: all.
        rope: turn queries and keys by `context.rope`.
        bias: of all four projections.
    Raises:
        OptionError: heads that do not divide, a width outside its range, or a window below 1.
    """

    def __init__(
        self,
        operator: Callable[..., Any],
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        window: int | None = None,
        rope: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = head_sizes(hidden_size, num_heads, num_kv_heads, head_dim)
        if window is not None and window < 1:
            raise OptionError(f"window={window} must count at least the token itself; use None for no window")
        self.head_dim, self.layer_idx, self.window, self.rope = head_dim, layer_idx, window, rope
        self.operator = operator
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def options(self) -> dict[str, Any]:
        """What the operator is given beyond what every operator takes."""
        return {}

    def forward(self, x: Tensor, context: MixerContext = _ALONE, shared: Shared = _NOTHING) -> Tensor:
        """[B, T, C] -> [B, T, C]; packed sequences come as [1, R, C] with `context.cu_seqlens`.

        Raises:
            OptionError: the layer rotates and the context has no angles.
        """
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.rope:
            q, k = rotate(q, *context.angles()), rotate(k, *context.angles())
        if context.cache is not None:  # caches keep [B, Hkv, S, D]
            k, v = (t.transpose(1, 2) for t in context.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        out: Tensor = self.o_proj(self._attend(q, k, v, context).flatten(-2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: MixerContext) -> Tensor:
        window = None if self.window is None else (self.window - 1, 0 if context.causal else self.window - 1)
        options = self.options() | {"causal": context.causal, "window_size": window}
        if context.cu_seqlens is None:
            options["key_bias"] = context.key_bias(k.shape[1], accumulator_dtype(q.dtype))
        else:
            q, k, v = q[0], k[0], v[0]
            for side in "qk":
                options |= {f"cu_seqlens_{side}": context.cu_seqlens, f"max_seqlen_{side}": context.max_seqlen}
        out: Tensor = self.operator(q, k, v, **options)
        return out if context.cu_seqlens is None else out[None]


class SoftmaxAttention(GroupedAttention):
    """Softmax attention with grouped heads: causal or not, windowed or not, padded, packed, cached.

    Args:
        hidden_size: C.
        num_heads: H query heads.
        num_kv_heads: Hkv key heads, a divisor of H; None means H.
        head_dim: D, 16..256; None means C / H.
        layer_idx: which layer of the cache is its own.
        window: keys that a token sees, itself counted; where attention is not causal, as many on the other side. None: all.
        rope: turn queries and keys by `context.rope`.
        bias: of all four projections.
        stable: what is done against biased rounding, as of `attnkit.ops.attention`; an attribute, which may change in training.
    Attributes:
        operator: what is called for the attention itself, with the arguments of `attnkit.ops.attention`; instruments put
            themselves in its place.
    Raises:
        OptionError: heads that do not divide, a width outside its range, a window below 1, or an unknown `stable`.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads as in Ainslie et al. 2023 (arXiv:2305.13245).

    >>> import torch
    >>> from attnkit.modules import SoftmaxAttention
    >>> SoftmaxAttention(64, 4, num_kv_heads=2, rope=False)(torch.randn(1, 5, 64)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        window: int | None = None,
        rope: bool = True,
        bias: bool = False,
        stable: str = "off",
    ) -> None:
        check_choice("stable", stable, STABLE)
        super().__init__(
            attention,
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            window=window,
            rope=rope,
            bias=bias,
        )
        self.stable = stable

    def options(self) -> dict[str, Any]:
        """What is done against biased rounding."""
        return {"stable": self.stable}
