"""A bidirectional encoder."""

from attnkit.models.encoder.configuration import AttnkitEncoderConfig
from attnkit.models.encoder.modeling import AttnkitEncoderForMaskedLM, AttnkitEncoderModel

__all__ = ["AttnkitEncoderConfig", "AttnkitEncoderForMaskedLM", "AttnkitEncoderModel"]
