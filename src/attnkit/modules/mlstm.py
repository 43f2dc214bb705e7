"""The mLSTM layer of xLSTM-7B."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.projection import project
from attnkit.modules.recurrent import check_heads, load_state, packed, real_tokens, store_state
from attnkit.ops._chunkwise_core.layout import check_chunk_size
from attnkit.ops.mlstm.api import mlstm, mlstm_step
from attnkit.ops.mlstm.call import check_options

__all__ = ["MLSTMLayer"]

_ALONE, _NOTHING = MixerContext(), Shared()
_FORGET_BIAS = (3.0, 6.0)  # from the first head to the last: memories from some ten to some four hundred tokens


class MLSTMLayer(nn.Module):
    """A matrix memory with gates in place of attention: causal, padded, packed, with a state of constant size.

    q, k, v = x W;  i, f = cap(x W + bias);  y = W_o (sigmoid(x W_g) * norm(mlstm(q, k, v, i, f))), norm being LayerNorm of each
    head, without a bias, and cap(z) = c tanh(z / c).

    Args:
        hidden_size: C.
        num_heads: H; queries and keys have qk_ratio * C channels in all, values and outputs v_ratio * C.
        layer_idx: which layer of the cache is its own.
        qk_ratio, v_ratio: see `num_heads`.
        gate_soft_cap: c, the bound of gates before exp and sigmoid.
        input_gate, normalize, eps, chunk_size: as of `attnkit.ops.mlstm`.
        igate_bias_init: where the input gate's bias begins: a number, -10 in xLSTM-7B; or None, which draws it from N(0, 0.1),
            as small models do.
        norm_eps: of the norm.
        bias: of the projections that are no gates.
    Attributes:
        igate_bias, fgate_bias: [H]; the second begins at 3 to 6.
    Raises:
        OptionError, UnsupportedError: widths that heads do not divide, or options that the operator refuses.
    Source: Beck et al. 2025 (arXiv:2503.13427), xLSTM 7B.

    >>> import torch
    >>> from attnkit.modules import MLSTMLayer
    >>> MLSTMLayer(64, 4)(torch.randn(1, 5, 64)).shape
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
        gate_soft_cap: float = 15.0,
        input_gate: str = "exp",
        normalize: bool = True,
        eps: float = 1e-6,
        chunk_size: int | str = "auto",
        igate_bias_init: float | None = -10.0,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_options(input_gate, normalize, eps)
        check_chunk_size(chunk_size)
        if not gate_soft_cap > 0:
            raise OptionError(f"gate_soft_cap={gate_soft_cap} must be positive; math.inf switches it off")
        widths = {"qk_ratio": hidden_size * qk_ratio, "v_ratio": hidden_size * v_ratio}
        self.head_dim, self.head_dim_v = check_heads(hidden_size, num_heads, widths)
        self.num_heads, self.layer_idx, self.gate_soft_cap, self.norm_eps = num_heads, layer_idx, gate_soft_cap, norm_eps
        self.input_gate, self.normalize, self.eps, self.chunk_size = input_gate, normalize, eps, chunk_size
        inner, inner_v = num_heads * self.head_dim, num_heads * self.head_dim_v
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner_v, bias=bias)
        self.ogate_proj = nn.Linear(hidden_size, inner_v, bias=bias)
        self.igate_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.fgate_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # apart from the projections, so that a model that draws these anew leaves their beginning alone
        start = 0.1 * torch.randn(num_heads) if igate_bias_init is None else torch.full((num_heads,), float(igate_bias_init))
        self.igate_bias = nn.Parameter(start)
        self.fgate_bias = nn.Parameter(torch.linspace(*_FORGET_BIAS, num_heads))
        self.head_norm = nn.Parameter(torch.ones(inner_v))
        self.o_proj = nn.Linear(inner_v, hidden_size, bias=bias)

    def forward(self, x: Tensor, context: MixerContext = _ALONE, shared: Shared = _NOTHING) -> Tensor:
        """[B, T, C] -> [B, T, C]; packed sequences come as [1, R, C] with `context.cu_seqlens`."""
        real = real_tokens(x, context)
        if real is not None:
            x = x.masked_fill(~real[..., None], 0)  # padding may hold anything
        q, k, v, gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.ogate_proj)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        i, f = self.gates(x)
        if real is not None:  # a closed input and an open memory: the state stays as it is
            i, f = i.masked_fill(~real[..., None], -math.inf), f.masked_fill(~real[..., None], math.inf)
        h = self._mix(q, k, v, i, f, context)
        acc = accumulator_dtype(h.dtype)
        h = F.layer_norm(h.to(acc), (self.head_dim_v,), eps=self.norm_eps).flatten(-2) * self.head_norm
        out: Tensor = self.o_proj((torch.sigmoid(gate.to(acc)) * h).to(x.dtype))
        return out

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and forget gates of [B, T, C] before exp and sigmoid, [B, T, H] in float32 (float64 of float64)."""
        return self._capped(self.igate_proj(x), self.igate_bias), self._capped(self.fgate_proj(x), self.fgate_bias)

    def _capped(self, z: Tensor, bias: Tensor) -> Tensor:
        z = z.to(accumulator_dtype(z.dtype)) + bias
        return z if math.isinf(self.gate_soft_cap) else self.gate_soft_cap * torch.tanh(z / self.gate_soft_cap)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, context: MixerContext) -> Tensor:
        sizes = (self.num_heads, self.head_dim, self.head_dim_v)
        options: dict[str, Any] = {"input_gate": self.input_gate, "normalize": self.normalize, "eps": self.eps}
        stabilised = self.input_gate == "exp"
        state = load_state(context, self.layer_idx, sizes, normalised=self.normalize, stabilised=stabilised)
        if state is not None and q.shape[1] == 1:
            h, state = mlstm_step(q[:, 0], k[:, 0], v[:, 0], i[:, 0], f[:, 0], state, **options)
            store_state(context, self.layer_idx, state)
            return h[:, None]
        q, k, v, i, f = packed(context, q, k, v, i, f)
        options |= {"cu_seqlens": context.cu_seqlens, "chunk_size": self.chunk_size}
        h, state = mlstm(q, k, v, i, f, initial_state=state, **options)
        store_state(context, self.layer_idx, state)
        return h if context.cu_seqlens is None else h[None]

    def extra_repr(self) -> str:
        """Sizes and gates."""
        return f"heads={self.num_heads}, widths={self.head_dim}/{self.head_dim_v}, input_gate={self.input_gate}"
