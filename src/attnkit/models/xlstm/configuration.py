"""Configuration of xLSTM."""

from typing import Any, ClassVar

from attnkit._core.errors import OptionError
from attnkit.models.configuration import HybridConfig

__all__ = ["AttnkitXLSTMConfig", "feed_forward_width"]


def feed_forward_width(hidden_size: int, factor: float = 2.667, multiple: int = 64) -> int:
    """Width inside the feed-forward part: factor * hidden_size, rounded up."""
    return -int(-hidden_size * factor // multiple) * multiple


class AttnkitXLSTMConfig(HybridConfig):
    """A stack of xLSTM-7B's shape, by default of its size; further attributes are those of `HybridConfig`.

    Attributes:
        intermediate_size: None means 2.667 hidden_size, rounded up to a multiple of 64.
        mixer_types: "mlstm" by default.
        mlstm: further arguments of its layer, `attnkit.modules.MLSTMLayer`.
        output_logit_soft_cap: c in c tanh(z / c), the bound of logits; math.inf is none.
    Raises:
        OptionError: a cap that is not positive; and what `HybridConfig` raises.
    Source: Beck et al. 2025 (arXiv:2503.13427).

    >>> from attnkit.models import AttnkitXLSTMConfig
    >>> config = AttnkitXLSTMConfig(num_hidden_layers=2)
    >>> config.intermediate_size, config.mixer_types, config.layer_types
    (10944, ['mlstm', 'mlstm'], ['linear_attention', 'linear_attention'])
    """

    model_type: ClassVar[str] = "attnkit_xlstm"

    vocab_size: int = 50_304
    hidden_size: int = 4_096
    intermediate_size: int | None = None  # type: ignore[assignment]  # filled in
    num_hidden_layers: int = 32
    mixer_types: list[str] | str | None = "mlstm"
    mlstm: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    output_logit_soft_cap: float = 30.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what was left out, then check."""
        if self.intermediate_size is None:
            self.intermediate_size = feed_forward_width(self.hidden_size)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            OptionError, UnsupportedError: see the class.
        """
        if not self.output_logit_soft_cap > 0:
            raise OptionError(f"output_logit_soft_cap={self.output_logit_soft_cap} must be positive; math.inf switches it off")
        super().check()
