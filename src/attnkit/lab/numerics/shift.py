"""What is subtracted from the scores of a row: its maximum, or something near it."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit._core.errors import OptionError

__all__ = ["Shift", "dynamic_max_shift"]

Shift = Callable[[Tensor, Tensor], Tensor]  # (row maximum of a tile, how many keys hold it) -> what is subtracted

_NEAR_ZERO = 1e-6


def dynamic_max_shift(row_max: Tensor, tie_count: Tensor, beta: float, cap: float = 30.0) -> Tensor:
    """The dynamic maximum: where several keys share the maximum, subtract more, so that none of them becomes exactly 1.

    Several probabilities of exactly 1 make low-precision sums of P V round in one direction. With r the maximum, a tied row
    gets beta r where r > 0 and 0 where r < 0, but at most r + cap; a tied maximum of zero, which neither rule would move,
    gets 1. In exact arithmetic nothing changes, because softmax does not depend on what is subtracted.

    Args:
        row_max: maximum of the scores that a row sees in a tile; -inf where it sees none.
        tie_count: how many of these scores count as equal to it; same shape.
        beta: above 1; the paper uses 2 to 8.
        cap: largest shift, natural units; exp(-cap) must be a normal number wherever probabilities are kept.
    Returns:
        what to subtract, never below `row_max`.
    Raises:
        OptionError: beta or cap outside its range.
    Source: Qiu & Yao 2025 (arXiv:2510.04212), Algorithm 1. The cap and the rule for zero are ours.
    """
    if not beta > 1 or not cap > 0:
        raise OptionError(f"beta={beta} must be above 1 and cap={cap} above 0")
    raised = torch.where(row_max > 0, beta * row_max, torch.zeros_like(row_max))
    raised = torch.where(row_max.abs() < _NEAR_ZERO, torch.ones_like(row_max), raised)
    return torch.where((tie_count > 1) & torch.isfinite(row_max), torch.minimum(raised, row_max + cap), row_max)
