"""Configuration of the encoder."""

from typing import ClassVar

from attnkit.models.configuration import HybridConfig

__all__ = ["AttnkitEncoderConfig"]


class AttnkitEncoderConfig(HybridConfig):
    """A stack in which tokens see both sides; the attributes are those of `HybridConfig`, and nothing is cached."""

    model_type: ClassVar[str] = "attnkit_encoder"
    bidirectional: ClassVar[bool] = True

    use_cache: bool = False
