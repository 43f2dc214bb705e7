"""Rotary position embeddings, channel i paired with i + D/2."""

import torch
from torch import Tensor, nn

from attnkit._core.errors import OptionError

__all__ = ["RotaryEmbedding", "rotate"]


class RotaryEmbedding(nn.Module):
    """cos and sin of the angles p * theta^(-2i/D).

    There is no buffer: frequencies are computed in float32 in each call, so that neither `model.to(bfloat16)` rounds them
    nor building on the meta device loses them.

    Args:
        head_dim: D, even.
        theta: the base.
    Source: Su et al. 2021 (arXiv:2104.09864).
    """

    def __init__(self, head_dim: int, *, theta: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise OptionError(f"head_dim={head_dim} is odd; rotary embeddings turn pairs of channels, choose an even width")
        self.head_dim, self.theta = head_dim, float(theta)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] -> cos and sin, [B, T, 1, D / 2] float32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        angles = positions[..., None, None].float() * (1.0 / self.theta**exponents)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """Width and base."""
        return f"head_dim={self.head_dim}, theta={self.theta:g}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [B, T, H, D] by angles [B or 1, T, 1, D / 2]; float32 inside, one rounding to x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
