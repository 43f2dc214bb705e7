"""Our decoder beside transformers' Llama with the same weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnkit.models.comparison import Parity, compare
from attnkit.models.decoder.conversion import from_llama

__all__ = ["parity", "random_llama"]


def parity(llama: Any, *, tokens: int = 64, seed: int = 0) -> Parity:
    """Compare the logits of random tokens, two rows of which one is padded on the left, in float32.

    Args:
        llama: a `LlamaForCausalLM` in float32.
        tokens: length of a row.
        seed: of the tokens.
    Raises:
        UnsupportedError: see `from_llama`.
    """
    return compare(llama, from_llama(llama), tokens=tokens, seed=seed, padded=True)


def random_llama(seed: int = 0) -> LlamaForCausalLM:
    """A small Llama to compare with, in eval mode.

    Its weights are ten times as large as usual: with smaller ones attention is uniform, and a lost position goes unseen.

    Args:
        seed: of the weights; torch's global generator is left alone.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(config)
    llama.eval()
    return llama
