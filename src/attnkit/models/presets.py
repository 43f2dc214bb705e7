"""Configurations by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from attnkit._core.registry import Registry
from attnkit.models.configuration import HybridConfig
from attnkit.models.decoder import AttnkitDecoderConfig
from attnkit.models.encoder import AttnkitEncoderConfig
from attnkit.models.xlstm import AttnkitXLSTMConfig

__all__ = ["PRESETS"]

# name -> function of overriding keyword arguments
PRESETS: Registry[Callable[..., HybridConfig]] = Registry("model preset")

_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PRESETS.register("decoder-tiny", partial(AttnkitDecoderConfig, **_TINY))
PRESETS.register(
    "decoder-50m",
    partial(
        AttnkitDecoderConfig,
        vocab_size=49_152,
        hidden_size=512,
        intermediate_size=1_408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
)
PRESETS.register("encoder-tiny", partial(AttnkitEncoderConfig, **_TINY))
PRESETS.register(
    "xlstm-tiny",
    partial(
        AttnkitXLSTMConfig, vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, mlstm={"igate_bias_init": None},
    ),
)  # fmt: skip
PRESETS.register(
    "xlstm-50m",
    partial(
        AttnkitXLSTMConfig, vocab_size=49_152, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        tie_word_embeddings=True, mlstm={"igate_bias_init": None},
    ),
)  # fmt: skip
PRESETS.register("xlstm-7b", AttnkitXLSTMConfig)
