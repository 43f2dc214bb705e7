"""The layer of simple gated linear attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.projection import project
from attnkit.modules.recurrent import check_heads, load_state, packed, real_tokens, store_state
from attnkit.ops.scalar_decay.api import scalar_decay_attention, scalar_decay_step

__all__ = ["SimpleGLA"]

_ALONE, _NOTHING = MixerContext(), Shared()


class SimpleGLA(nn.Module):
    """Linear attention that forgets by a learned gate, one for each token and head: causal, padded, packed, constant state.

    q, k, v = x W;  g = logsigmoid(x W_f + b) / c;  y = W_o (rmsnorm(scalar_decay_attention(q, k, v, g)) * silu(x W_g)), the
    norm being that of each head.

    Args:
        hidden_size: C.
        num_heads: H; queries and keys have qk_ratio * C channels in all, values and outputs v_ratio * C.
        layer_idx: which layer of the cache is its own.
        qk_ratio, v_ratio: see `num_heads`.
        gate_logit_normalizer: c; the larger, the longer a token is remembered.
        norm_eps: of the norm.
        bias: of the projections that are no gates.
    Attributes:
        fgate_bias: [H], begins at 0: memories of some two dozen tokens.
    Raises:
        OptionError: widths that heads do not divide, or a normalizer that is not positive.
    Source: Yang et al. 2024 (arXiv:2312.06635), gated linear attention, with one gate a head as in Dao & Gu 2024
        (arXiv:2405.21060).

    >>> import torch
    >>> from attnkit.modules import SimpleGLA
    >>> SimpleGLA(64, 4)(torch.randn(1, 5, 64)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        layer_idx: int = 0,
        qk_ratio: float = 0.5,
        v_ratio: float = 1.0,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not gate_logit_normalizer > 0:
            raise OptionError(f"gate_logit_normalizer={gate_logit_normalizer} must be positive")
        widths = {"qk_ratio": hidden_size * qk_ratio, "v_ratio": hidden_size * v_ratio}
        self.head_dim, self.head_dim_v = check_heads(hidden_size, num_heads, widths)
        self.num_heads, self.layer_idx, self.norm_eps = num_heads, layer_idx, norm_eps
        self.gate_logit_normalizer = gate_logit_normalizer
        inner, inner_v = num_heads * self.head_dim, num_heads * self.head_dim_v
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner_v, bias=bias)
        self.gate_proj = nn.Linear(hidden_size, inner_v, bias=bias)
        self.fgate_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.fgate_bias = nn.Parameter(torch.zeros(num_heads))  # apart, so that it is added in float32
        self.head_norm = nn.Parameter(torch.ones(inner_v))
        self.o_proj = nn.Linear(inner_v, hidden_size, bias=bias)

    def forward(self, x: Tensor, context: MixerContext = _ALONE, shared: Shared = _NOTHING) -> Tensor:
        """[B, T, C] -> [B, T, C]; packed sequences come as [1, R, C] with `context.cu_seqlens`."""
        real = real_tokens(x, context)
        if real is not None:
            x = x.masked_fill(~real[..., None], 0)  # padding may hold anything
        q, k, v, gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        g = self.log_decay(x)
        if real is not None:  # padding puts nothing in, and nothing is forgotten meanwhile
            k, g = k * real[..., None, None], g * real[..., None]
        h = self._mix(q, k, v, g, context)
        acc = accumulator_dtype(h.dtype)
        h = F.rms_norm(h.to(acc), (self.head_dim_v,), eps=self.norm_eps).flatten(-2) * self.head_norm
        out: Tensor = self.o_proj((F.silu(gate.to(acc)) * h).to(x.dtype))
        return out

    def log_decay(self, x: Tensor) -> Tensor:
        """Logarithms of what [B, T, C] leave of the state, [B, T, H] in float32 (float64 of float64)."""
        z = self.fgate_proj(x)
        return F.logsigmoid(z.to(accumulator_dtype(z.dtype)) + self.fgate_bias) / self.gate_logit_normalizer

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, context: MixerContext) -> Tensor:
        sizes = (self.num_heads, self.head_dim, self.head_dim_v)
        state = load_state(context, self.layer_idx, sizes, normalised=False, stabilised=False)
        if state is not None and q.shape[1] == 1:
            h, state = scalar_decay_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state)
            store_state(context, self.layer_idx, state)
            return h[:, None]
        q, k, v, g = packed(context, q, k, v, g)
        h, state = scalar_decay_attention(q, k, v, g, initial_state=state, cu_seqlens=context.cu_seqlens)
        store_state(context, self.layer_idx, state)
        return h if context.cu_seqlens is None else h[None]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.num_heads}, widths={self.head_dim}/{self.head_dim_v}"
