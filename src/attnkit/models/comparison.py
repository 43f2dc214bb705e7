"""One of our models beside one of transformers with the same weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parity", "compare"]

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """How far two models are apart.

    Attributes:
        parameters: of either model.
        largest_logit: the largest absolute logit of transformers' model.
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


def compare(theirs: Any, ours: Any, *, tokens: int, seed: int, padded: bool) -> Parity:
    """Compare the logits of two rows of random tokens.

    Args:
        theirs, ours: the models, with the same weights.
        tokens: length of a row.
        seed: of the tokens.
        padded: a quarter of the second row is padding, on the left.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(theirs.config.vocab_size, (2, tokens), generator=draw).to(theirs.device)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : tokens // 4] = 0
    with torch.no_grad():
        first, second = (_logits(model, ids, mask) for model in (theirs, ours))
    return Parity(
        parameters=sum(weight.numel() for weight in ours.parameters()),
        largest_logit=float(first.abs().max()),
        max_difference=float((first - second).abs().max()),
    )


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of real tokens."""
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    return found
