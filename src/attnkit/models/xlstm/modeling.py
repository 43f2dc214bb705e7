"""xLSTM."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.models.common import HybridModel
from attnkit.models.heads import HybridForCausalLM
from attnkit.models.xlstm.configuration import AttnkitXLSTMConfig

__all__ = ["AttnkitXLSTMForCausalLM", "AttnkitXLSTMModel"]


class AttnkitXLSTMModel(HybridModel):
    """xLSTM without a head.

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitXLSTMConfig


class AttnkitXLSTMForCausalLM(HybridForCausalLM):
    """xLSTM as a language model; its logits are bounded, in float32 (float64 of float64).

    Args:
        config: shape of the stack.
    """

    config_class = AttnkitXLSTMConfig
    config: AttnkitXLSTMConfig
    model_class: ClassVar[type[HybridModel]] = AttnkitXLSTMModel

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] -> bounded logits [B, T, V]."""
        z, cap = super().logits(x), self.config.output_logit_soft_cap
        z = z.to(accumulator_dtype(z.dtype))
        return z if math.isinf(cap) else cap * torch.tanh(z / cap)
