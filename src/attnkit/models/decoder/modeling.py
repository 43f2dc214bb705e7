"""The decoder."""

from typing import ClassVar

from attnkit.models.common import HybridModel
from attnkit.models.decoder.configuration import AttnkitDecoderConfig
from attnkit.models.heads import HybridForCausalLM

__all__ = ["AttnkitDecoderForCausalLM", "AttnkitDecoderModel"]


class AttnkitDecoderModel(HybridModel):
    """The decoder without a head.

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitDecoderConfig


class AttnkitDecoderForCausalLM(HybridForCausalLM):
    """The decoder as a language model.

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitDecoderConfig
    model_class: ClassVar[type[HybridModel]] = AttnkitDecoderModel
