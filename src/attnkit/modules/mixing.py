"""What a mixer is given: the facts of one forward pass, and the tensors that earlier layers pass on."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit._core.errors import OptionError

__all__ = ["MixerContext", "Shared"]


class Shared(NamedTuple):
    """What travels from layer to layer besides the hidden states; a mixer returns a new one, and changes none.

    Flat on purpose: gradient checkpointing and FSDP see tensors that are arguments and results, and no others.

    Attributes:
        memory: [B, T, M], of this call's tokens only (read by gated memory units).
        keys, values: [B, S, Hkv, D] and [B, S, Hkv, Dv], cached tokens included (read by cross layers).
    """

    memory: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class MixerContext:
    """The facts of one forward pass, the same for every layer; nothing in it has a gradient.

    Attributes:
        causal: a token sees those before it only; False in encoders.
        cache: an object with `update(keys, values, layer_idx)` and `layers`, as transformers' caches are, or None.
        padding: [B, S] bool, True for real tokens, cached tokens included; None where nothing is padded.
        rope: cos and sin of the new tokens, as `RotaryEmbedding` returns them; None where no layer rotates.
        cu_seqlens: [N + 1] int32, boundaries of packed sequences in the rows of [1, R, C]; None where nothing is packed.
        max_seqlen: rows of the longest packed sequence.
    """

    causal: bool = True
    cache: Any = None
    padding: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    def angles(self) -> tuple[Tensor, Tensor]:
        """`rope`, for a layer that rotates.

        Raises:
            OptionError: there is none.
        """
        if self.rope is None:
            raise OptionError("context.rope is missing; give RotaryEmbedding(head_dim)(positions), or build with rope=False")
        return self.rope

    def read_state(self, layer_idx: int) -> Tensor | None:
        """The recurrent state that `write_state` left at a layer, or None at the beginning of a sequence."""
        if self.cache is None:
            return None
        layer = self.cache.layers[layer_idx]
        state = layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
        assert state is None or isinstance(state, Tensor)
        return state

    def write_state(self, state: Tensor, layer_idx: int) -> None:
        """Keep a layer's recurrent state [B, ...] for the next call; without a cache it is dropped."""
        if self.cache is not None:
            self.cache.update_recurrent_state(state, layer_idx)

    def key_bias(self, keys: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of the newest `keys` keys, [B, keys]: 0, or -inf at padding; None without padding."""
        if self.padding is None:
            return None
        hidden = ~self.padding[:, -keys:]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
