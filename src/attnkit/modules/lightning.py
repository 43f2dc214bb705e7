"""The linear-attention layer of Ring-linear and Ling-linear."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.projection import project
from attnkit.modules.recurrent import GroupNormGate, check_heads, load_state, packed, real_tokens, store_state
from attnkit.modules.rotary import rotate
from attnkit.ops.scalar_decay.api import (
    lightning_attention,
    lightning_slopes,
    scalar_decay_attention,
    scalar_decay_step,
)

__all__ = ["LightningAttention"]

_ALONE, _NOTHING = MixerContext(), Shared()


class LightningAttention(nn.Module):
    """Lightning attention with normalised queries and keys and a gated norm: causal, padded, packed, with a constant state.

    q, k, v, g = x W;  q, k = rotate(rmsnorm(q)), rotate(rmsnorm(k));  y = W_o (group_rmsnorm(lightning(q, k, v)) * sigmoid(g))

    Args:
        hidden_size: C.
        num_heads: H, of queries, keys and values alike.
        head_dim: D; None means C / H.
        layer_idx: which layer this is; of `num_layers`, deeper layers forget more slowly. None: all alike.
        num_layers: see `layer_idx`.
        rope: turn the first `rotary_share` of queries and keys by `context.rope`.
        rotary_share: 1, 1/2, 1/4, ... of a head's channels.
        silu: pass queries, keys and values through SiLU.
        norm_groups: groups of channels that outputs are normalised in; None means 4, or H where that is no multiple of 4.
        norm_eps: of all norms.
        bias: of the projections.
    Raises:
        OptionError: heads or groups that do not divide, or a share that is no power of one half.
    Source: Ling Team 2025 (arXiv:2510.19338).

    >>> import torch
    >>> from attnkit.modules import LightningAttention
    >>> LightningAttention(64, 4, rope=False)(torch.randn(1, 5, 64)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        layer_idx: int = 0,
        num_layers: int | None = None,
        rope: bool = True,
        rotary_share: float = 0.5,
        silu: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = hidden_size if head_dim is None else num_heads * head_dim
        (self.head_dim,) = check_heads(hidden_size, num_heads, {"num_heads": inner})
        self.rotary_step = round(1 / rotary_share) if 0 < rotary_share <= 1 else 0
        exact = self.rotary_step * rotary_share == 1 and self.rotary_step & (self.rotary_step - 1) == 0
        if rope and not (exact and self.head_dim % (2 * self.rotary_step) == 0):
            raise OptionError(
                f"rotary_share={rotary_share} must be 1, 1/2, 1/4, ... and turn an even number of the {self.head_dim} channels"
            )
        self.num_heads, self.layer_idx, self.rope, self.silu = num_heads, layer_idx, rope, silu
        # [H] float32. No buffer: `to(bfloat16)` would round it and the meta device lose it
        self.slopes = lightning_slopes(num_heads, *((None, None) if num_layers is None else (layer_idx, num_layers)))
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.gate_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        groups = norm_groups if norm_groups is not None else 4 if num_heads % 4 == 0 else num_heads
        self.out_norm = GroupNormGate(inner, groups, norm_eps)
        self.o_proj = nn.Linear(inner, hidden_size, bias=bias)

    def forward(self, x: Tensor, context: MixerContext = _ALONE, shared: Shared = _NOTHING) -> Tensor:
        """[B, T, C] -> [B, T, C]; packed sequences come as [1, R, C] with `context.cu_seqlens`.

        Raises:
            OptionError: the layer rotates and the context has no angles.
        """
        real = real_tokens(x, context)
        if real is not None:
            x = x.masked_fill(~real[..., None], 0)  # padding may hold anything
        q, k, v, gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        if self.silu:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (self._turned(t, context) for t in (self.q_norm(q), self.k_norm(k)))
        out = self._mix(q.to(v.dtype), k.to(v.dtype), v, real, context)
        mixed: Tensor = self.o_proj(self.out_norm(out.flatten(-2), gate))
        return mixed

    def _turned(self, x: Tensor, context: MixerContext) -> Tensor:
        if not self.rope:
            return x
        cos, sin = (t[..., :: self.rotary_step] for t in context.angles())
        width = 2 * cos.shape[-1]
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], -1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, context: MixerContext) -> Tensor:
        sizes = (self.num_heads, self.head_dim, self.head_dim)
        state = load_state(context, self.layer_idx, sizes, normalised=False, stabilised=False)
        slopes = self.slopes.to(q.device, accumulator_dtype(q.dtype))
        if real is not None:  # padding puts nothing in, and nothing is forgotten meanwhile
            k = k * real[..., None, None]
            g = (-slopes).expand(k.shape[:-1]) * real[..., None]
            out, state = scalar_decay_attention(q, k, v, g, initial_state=state)
        elif state is not None and q.shape[1] == 1:
            g = (-slopes).expand(k.shape[0], -1)
            out, state = scalar_decay_step(q[:, 0], k[:, 0], v[:, 0], g, state)
            out = out[:, None]
        else:
            q, k, v = packed(context, q, k, v)
            out, state = lightning_attention(q, k, v, slopes, initial_state=state, cu_seqlens=context.cu_seqlens)
            out = out if context.cu_seqlens is None else out[None]
        store_state(context, self.layer_idx, state)
        return out

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.num_heads}, head_dim={self.head_dim}, rope={self.rope}"
