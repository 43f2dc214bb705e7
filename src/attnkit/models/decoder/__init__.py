"""A dense decoder of Llama's shape."""

from attnkit.models.decoder.configuration import AttnkitDecoderConfig
from attnkit.models.decoder.conversion import from_llama, llama_config
from attnkit.models.decoder.modeling import AttnkitDecoderForCausalLM, AttnkitDecoderModel
from attnkit.models.decoder.parity import parity, random_llama

__all__ = [
    "AttnkitDecoderConfig",
    "AttnkitDecoderForCausalLM",
    "AttnkitDecoderModel",
    "from_llama",
    "llama_config",
    "parity",
    "random_llama",
]
