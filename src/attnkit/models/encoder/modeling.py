"""The encoder."""

from typing import ClassVar

from attnkit.models.common import HybridModel
from attnkit.models.encoder.configuration import AttnkitEncoderConfig
from attnkit.models.heads import HybridForMaskedLM

__all__ = ["AttnkitEncoderForMaskedLM", "AttnkitEncoderModel"]


class AttnkitEncoderModel(HybridModel):
    """The encoder without a head.

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitEncoderConfig


class AttnkitEncoderForMaskedLM(HybridForMaskedLM):
    """The encoder as a masked language model.

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitEncoderConfig
    model_class: ClassVar[type[HybridModel]] = AttnkitEncoderModel
