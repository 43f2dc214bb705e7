"""Our decoder beside transformers' Llama with the same weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnkit.models.decoder.conversion import from_llama

__all__ = ["Parity", "parity", "random_llama"]

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """How far two models are apart.

    Attributes:
        parameters: of either model.
        largest_logit: the largest absolute logit of the Llama.
        max_difference: the largest absolute difference of two logits.
    """

    parameters: int
    largest_logit: float
    max_difference: float

    @property
    def allowed(self) -> float:
        """A difference of 1e-5 of the largest logit, as float32 rounds along two orders of summation."""
        return TOLERANCE * self.largest_logit

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.max_difference <= self.allowed


def parity(llama: Any, *, tokens: int = 64, seed: int = 0) -> Parity:
    """Compare the logits of random tokens, two rows of which one is padded on the left, in float32.

    Args:
        llama: a `LlamaForCausalLM` in float32.
        tokens: length of a row.
        seed: of the tokens.
    Raises:
        UnsupportedError: see `from_llama`.
    """
    ours = from_llama(llama)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(llama.config.vocab_size, (2, tokens), generator=draw).to(llama.device)
    mask = torch.ones_like(ids)
    mask[1, : tokens // 4] = 0
    with torch.no_grad():
        theirs, mine = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (llama, ours))
    return Parity(
        parameters=sum(weight.numel() for weight in ours.parameters()),
        largest_logit=float(theirs.abs().max()),
        max_difference=float((theirs - mine).abs().max()),
    )


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
