"""Weights of transformers' Llama in our decoder, and our decoder's shape as a Llama's."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnkit._core.errors import UnsupportedError
from attnkit.models.decoder.configuration import AttnkitDecoderConfig
from attnkit.models.decoder.modeling import AttnkitDecoderForCausalLM
from attnkit.models.sources import read_source

__all__ = ["from_llama", "llama_config"]

# Llama's name of a part of a weight's key -> ours
RENAMED = {"self_attn": "mixer", "input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
# same name and meaning in both configurations
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "attention_bias", "mlp_bias", "initializer_range", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def from_llama(source: Any) -> AttnkitDecoderForCausalLM:
    """Build our decoder with the weights of a Llama; the two share no memory.

    Args:
        source: a `LlamaForCausalLM`, or a folder that holds one as config.json and safetensors.
    Returns:
        the decoder in the Llama's dtype, on its device, in its mode (training or eval).
    Raises:
        InputError: the folder cannot be read; nothing is downloaded, unpickled or executed.
        UnsupportedError: not a Llama, or one with another activation or rotary embedding than our decoder has.
    """
    llama = read_source(source, LlamaForCausalLM)
    config = _translate(llama)
    weights = {".".join(RENAMED.get(part, part) for part in key.split(".")): value for key, value in llama.state_dict().items()}
    with torch.device("meta"):
        model = AttnkitDecoderForCausalLM(config)
    model.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = llama.generation_config
    model.train(llama.training)
    return model


def llama_config(config: AttnkitDecoderConfig) -> LlamaConfig:
    """Say what a decoder of ours is in the words of transformers' Llama, whose weights `from_llama` then takes.

    Args:
        config: of a decoder whose every layer is "attention" and "swiglu", with "rmsnorm".
    Raises:
        UnsupportedError: a part or a size that Llama does not have.
    """
    parts = {
        "mixer_types": (config.mixer_types, ["attention"] * config.num_hidden_layers),
        "mlp_types": (config.mlp_types, ["swiglu"] * config.num_hidden_layers),
        "norm_type": (config.norm_type, "rmsnorm"),
    }
    for name, (ours, theirs) in parts.items():
        if ours != theirs:
            raise UnsupportedError(f"{name}={ours!r} is no Llama's, which has {theirs!r}")
    if config.hidden_size % config.num_attention_heads:
        raise UnsupportedError(
            f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={config.num_attention_heads}, which "
            f"Llama asks for; choose sizes that divide"
        )
    return LlamaConfig(
        **{name: getattr(config, name) for name in SAME},
        rms_norm_eps=config.norm_eps,
        rope_parameters=dict(config.rope_parameters) if config.rope_parameters else None,
    )


def _translate(llama: Any) -> AttnkitDecoderConfig:
    if not isinstance(llama, LlamaForCausalLM) or llama.config.model_type != "llama":
        raise UnsupportedError(f"{type(llama).__name__} is no LlamaForCausalLM, the one model whose weights are known here")
    theirs: Any = llama.config
    if theirs.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act={theirs.hidden_act!r}; our decoder has 'silu'")
    return AttnkitDecoderConfig(
        **{name: getattr(theirs, name) for name in SAME},
        norm_eps=theirs.rms_norm_eps,
        rope_parameters=dict(theirs.rope_parameters or {}),
    )
