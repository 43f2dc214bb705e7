"""Our families in transformers' Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from attnkit.models.decoder import AttnkitDecoderConfig, AttnkitDecoderForCausalLM, AttnkitDecoderModel
from attnkit.models.encoder import AttnkitEncoderConfig, AttnkitEncoderForMaskedLM, AttnkitEncoderModel
from attnkit.models.xlstm import AttnkitXLSTMConfig, AttnkitXLSTMForCausalLM, AttnkitXLSTMModel

__all__ = ["register_all"]

# configuration -> model without a head, Auto class of the head, model with it
FAMILIES: tuple[tuple[Any, Any, Any, Any], ...] = (
    (AttnkitDecoderConfig, AttnkitDecoderModel, AutoModelForCausalLM, AttnkitDecoderForCausalLM),
    (AttnkitEncoderConfig, AttnkitEncoderModel, AutoModelForMaskedLM, AttnkitEncoderForMaskedLM),
    (AttnkitXLSTMConfig, AttnkitXLSTMModel, AutoModelForCausalLM, AttnkitXLSTMForCausalLM),
)


def register_all() -> None:
    """Make AutoConfig, AutoModel and the Auto classes of heads know every family."""
    for config, model, auto, with_head in FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        auto.register(config, with_head, exist_ok=True)
