"""Feed-forward parts of a block: [B, T, C] -> [B, T, C], each token on its own."""

import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.modules.projection import project

__all__ = ["MLP", "SwiGLU"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        hidden_size: C.
        intermediate_size: width inside.
        bias: of all three projections.
    Source: Shazeer 2020 (arXiv:2002.05202).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class MLP(nn.Module):
    """down(gelu(up(x))).

    Args:
        hidden_size: C.
        intermediate_size: width inside.
        bias: of both projections.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), with the GELU of Hendrycks and Gimpel 2016 (arXiv:1606.08415).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return out
