"""What layers with a recurrent state share: rows, padding, and the state in a cache."""

import torch
from torch import Tensor, nn

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.modules.mixing import MixerContext
from attnkit.ops._chunkwise_core.state import RecurrentState

__all__ = ["GroupNormGate", "check_heads", "load_state", "packed", "real_tokens", "store_state"]


def check_heads(hidden_size: int, num_heads: int, widths: dict[str, float]) -> list[int]:
    """Head widths from widths of all heads together.

    Raises:
        OptionError: one does not divide by the number of heads, or is 0.
    """
    if num_heads < 1:
        raise OptionError(f"num_heads={num_heads} must be at least 1")
    found = []
    for name, width in widths.items():
        if width < num_heads or int(width) != width or int(width) % num_heads:
            raise OptionError(f"{name} makes {width:g} channels of hidden_size={hidden_size}: no multiple of {num_heads} heads")
        found.append(int(width) // num_heads)
    return found


def real_tokens(x: Tensor, context: MixerContext) -> Tensor | None:
    """[B, T] bool, False at padding; None where nothing is padded."""
    return None if context.padding is None else context.padding[:, -x.shape[1] :]


def load_state(
    context: MixerContext, layer_idx: int, sizes: tuple[int, int, int], *, normalised: bool, stabilised: bool
) -> RecurrentState | None:
    """What `store_state` has left; a copy where gradients are wanted, since caches write into theirs.

    Args:
        sizes: heads, D, Dv.
        normalised, stabilised: whether there is n, and m.
    """
    flat = context.read_state(layer_idx)
    if flat is None:
        return None
    flat = flat.clone() if torch.is_grad_enabled() else flat
    return RecurrentState.unflatten(flat, *sizes, normalised=normalised, stabilised=stabilised)


def store_state(context: MixerContext, layer_idx: int, state: RecurrentState) -> None:
    """Keep a state for the next call, in its own dtype, as one tensor."""
    if context.cache is not None:
        context.write_state(state.flatten(), layer_idx)


def packed(context: MixerContext, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[1, R, ...] as [R, ...] where sequences are packed."""
    return tensors if context.cu_seqlens is None else tuple(t[0] for t in tensors)


class GroupNormGate(nn.Module):
    """x / rms(x) * weight * sigmoid(gate), the mean square over groups of channels; float32 inside, one rounding.

    Args:
        width: channels.
        groups: of them; 1 normalises all channels together.
        eps: added to the mean square.
    Source: Ling Team 2025 (arXiv:2510.19338), "group RMSNorm".
    """

    def __init__(self, width: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise OptionError(f"{width} channels are no multiple of {groups} groups")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[..., C] and [..., C] -> [..., C]."""
        acc = accumulator_dtype(x.dtype)
        parts = x.to(acc).unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = parts.flatten(-2) * self.weight * torch.sigmoid(gate.to(acc))
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.numel()}, groups={self.groups}, eps={self.eps:g}"
