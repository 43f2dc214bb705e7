"""Configuration of the decoder."""

from typing import ClassVar

from attnkit.models.configuration import HybridConfig

__all__ = ["AttnkitDecoderConfig"]


class AttnkitDecoderConfig(HybridConfig):
    """A causal stack, by default of Llama's shape; the attributes are those of `HybridConfig`.

    >>> from attnkit.models import AttnkitDecoderConfig
    >>> AttnkitDecoderConfig(num_hidden_layers=2, mixer_types=["attention", "sliding_attention"], sliding_window=64).layer_types
    ['full_attention', 'sliding_attention']
    """

    model_type: ClassVar[str] = "attnkit_decoder"
