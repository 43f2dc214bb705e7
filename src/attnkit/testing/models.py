"""Tiny random language models of the families that policies are tested on."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from attnkit._core.checks import check_choice

__all__ = ["FAMILIES", "randomise", "tiny_model"]

# what differs from the common shape; gemma3 has local and global layers, phi3 rotates half of each head
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 7,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "original_max_position_embeddings": 512},
    ),
}
_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES = tuple(_MODELS)


def tiny_model(family: str, *, seed: int = 0, **options: Any) -> Any:
    """A random causal language model, in float32, in eval mode, on the CPU, with `attn_implementation="sdpa"`.

    Weights are large enough that attention is far from uniform, so that a wrong mask or position changes the logits.

    Args:
        family: one of FAMILIES.
        seed: of the weights; torch's global generator is left alone.
        options: of the family's configuration.
    Returns:
        a model with 61 tokens, 2 layers (gemma3: 3), 4 heads of width 16, 512 positions, pad token 0 and no end token.
    Raises:
        OptionError: an unknown family.
    """
    check_choice("family", family, FAMILIES)
    config_class, model_class, special = _MODELS[family]
    config = config_class(**{**_SHAPE, **special, **options}, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):  # building draws numbers too
        model = model_class(config)
    return randomise(model.eval(), seed=seed)


def randomise(model: Any, *, seed: int = 0) -> Any:
    """Give a new model weights that are large enough for attention to be far from uniform, and return it.

    Args:
        model: whose weights are overwritten (biases and norms: moved away from where they begin).
        seed: of the weights; torch's global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return model
