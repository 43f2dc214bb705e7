"""The entmax attention mixer, and alpha on its way from softmax."""

from typing import Any

import torch
from torch import Tensor, nn

from attnkit._core.errors import OptionError
from attnkit.modules.attention import GroupedAttention
from attnkit.ops.entmax.call import check_alpha
from attnkit.ops.entmax_attention.api import entmax_attention

__all__ = ["AlphaSchedule", "EntmaxAttention"]

_LEAST = 1e-3  # nearer to 1 a float32 threshold says too little of the scores


class EntmaxAttention(GroupedAttention):
    """Attention normalised by alpha-entmax, with grouped heads: causal or not, windowed or not, padded, packed, cached.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim, layer_idx, window, rope, bias: as of `SoftmaxAttention`.
        alpha: in [1, 2], 1 being softmax; or "learned": every head has its own, 1 + sigmoid(a), beginning at 1.5.
    Attributes:
        alpha: the number, which may change in training (`AlphaSchedule`); of learned alphas a tensor [H], read only.
        operator: what is called for the attention itself, with the arguments of `attnkit.ops.entmax_attention`.
    Raises:
        OptionError: heads that do not divide, a width or an alpha outside its range, a window below 1.
    Source: Goncalves et al. 2025 (arXiv:2502.12082); learned alphas as in Correia et al. 2019 (arXiv:1909.00015).

    >>> import torch
    >>> from attnkit.modules import EntmaxAttention
    >>> EntmaxAttention(64, 4, num_kv_heads=2, alpha="learned", rope=False)(torch.randn(1, 5, 64)).shape
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
        alpha: float | str = 1.5,
    ) -> None:
        super().__init__(
            entmax_attention,
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            window=window,
            rope=rope,
            bias=bias,
        )
        self.alpha_logits: nn.Parameter | None = None
        self._alpha = 1.5
        if alpha == "learned":
            self.alpha_logits = nn.Parameter(torch.zeros(num_heads))
        elif isinstance(alpha, str):
            raise OptionError(f'alpha={alpha!r} is not allowed; give a number in 1..2 or "learned"')
        else:
            self.alpha = alpha

    @property
    def alpha(self) -> float | Tensor:
        """The number, or the learned alphas [H], float32."""
        if self.alpha_logits is None:
            return self._alpha
        return 1 + torch.sigmoid(self.alpha_logits.float()).clamp(min=_LEAST)

    @alpha.setter
    def alpha(self, value: float) -> None:
        if self.alpha_logits is not None:
            raise OptionError("the alphas of this layer are learned; change alpha_logits")
        checked = check_alpha(value)
        assert not isinstance(checked, Tensor)
        self._alpha = checked

    def options(self) -> dict[str, Any]:
        """The alpha, or those of the heads."""
        return {"alpha": self.alpha}

    def extra_repr(self) -> str:
        """The alpha."""
        return f"alpha={'learned' if self.alpha_logits is not None else self._alpha}"


class AlphaSchedule:
    """Alpha from `start` to `target`, in a straight line over tokens, then constant: softmax models become sparse gradually.

    Args:
        target: the alpha after the warm-up.
        warmup_tokens: how many tokens that takes.
        start: the first alpha; 1 is softmax.
    Raises:
        OptionError: an alpha outside 1..2, or a negative warm-up.

    >>> from attnkit.modules import AlphaSchedule
    >>> schedule = AlphaSchedule(1.5, warmup_tokens=1000)
    >>> schedule.alpha, schedule.advance(500), schedule.advance(500), schedule.advance(500)
    (1.0, 1.25, 1.5, 1.5)
    """

    def __init__(self, target: float = 1.5, *, warmup_tokens: int, start: float = 1.0) -> None:
        for alpha in (target, start):
            check_alpha(alpha)
        if warmup_tokens < 0:
            raise OptionError(f"warmup_tokens={warmup_tokens} must not be negative")
        self.target, self.start, self.warmup_tokens, self.tokens = float(target), float(start), warmup_tokens, 0

    @property
    def alpha(self) -> float:
        """The alpha after the tokens so far; below 1.001 it is 1, which is softmax."""
        share = min(self.tokens / self.warmup_tokens, 1.0) if self.warmup_tokens else 1.0
        alpha = self.start + share * (self.target - self.start)
        return 1.0 if alpha < 1 + _LEAST else alpha

    def advance(self, tokens: int) -> float:
        """Count tokens that were trained on, and return the alpha for the next ones."""
        self.tokens += tokens
        return self.alpha

    def apply(self, model: nn.Module) -> int:
        """Give the alpha to every `EntmaxAttention` layer that does not learn its own, and return how many there are.

        Raises:
            OptionError: there is none.
        """
        layers = [part for part in model.modules() if isinstance(part, EntmaxAttention) and part.alpha_logits is None]
        if not layers:
            raise OptionError(f"{type(model).__name__} has no EntmaxAttention layer with an alpha that is not learned")
        for layer in layers:
            layer.alpha = self.alpha
        return len(layers)

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on."""
        return {"target": self.target, "start": self.start, "warmup_tokens": self.warmup_tokens, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where another schedule was."""
        self.target, self.start = float(state["target"]), float(state["start"])
        self.warmup_tokens, self.tokens = int(state["warmup_tokens"]), int(state["tokens"])
