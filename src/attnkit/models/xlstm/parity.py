"""Our xLSTM beside transformers' with the same weights."""

from typing import Any

import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

from attnkit.models.comparison import Parity, compare
from attnkit.models.xlstm.conversion import from_xlstm

__all__ = ["random_xlstm", "xlstm_parity"]


def xlstm_parity(xlstm: Any, *, tokens: int = 71, seed: int = 0) -> Parity:
    """Compare the logits of two rows of random tokens in float32; transformers' xLSTM takes no padding.

    Args:
        xlstm: an `xLSTMForCausalLM` in float32.
        tokens: length of a row.
        seed: of the tokens.
    Raises:
        UnsupportedError: see `from_xlstm`.
    """
    return compare(xlstm, from_xlstm(xlstm), tokens=tokens, seed=seed, padded=False)


def random_xlstm(seed: int = 0) -> xLSTMForCausalLM:
    """A small xLSTM of transformers to compare with, in eval mode.

    Its gates depend on tokens, unlike those of new models, where a lost gate goes unseen. Inputs are small and memories long,
    as in the 7B model: otherwise the normaliser comes near 0, where float32 knows few digits.

    Args:
        seed: of the weights; torch's global generator is left alone.
    """
    config = xLSTMConfig(vocab_size=512, hidden_size=128, num_hidden_layers=3, num_heads=4, chunk_size=16)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        xlstm = xLSTMForCausalLM(config)
        for name, weight in xlstm.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embeddings" in name else weight.shape[-1] ** -0.5)
            elif name.endswith("gate_preact.bias"):
                weight.normal_().add_(-8.0 if "igate" in name else 4.0)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    xlstm.eval()
    return xlstm
