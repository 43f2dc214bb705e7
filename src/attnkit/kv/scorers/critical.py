"""Selection in two stages: by the base score, then by what a value writes into the residual stream."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import HeadAdaptive, each
from attnkit.kv.chunks import selecting
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import MUST_STAY
from attnkit.kv.projection import output_norms
from attnkit.kv.registry import wrapper
from attnkit.kv.selectors import Kept, best

__all__ = ["TwoStage"]


@dataclass(frozen=True)
class TwoStage:
    """A part of a head's budget goes to the highest scores s, the rest to the highest (s + eps) |W_o v|_1.

    The norm is the mean over the query heads of a group. Scores are meant to be weights of attention: of scores below
    zero a larger norm makes a key worth less. What must stay stays.

    Args:
        first: the share that the base score decides, 0 to 1; at least one key where it is not 0.
        epsilon: added to s.
    Source: Feng et al. 2025 (CriticalKV), arXiv:2502.03805.
    """

    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise OptionError(f"first={self.first} is not allowed; it is a share, from 0 to 1")
        if self.epsilon < 0:
            raise OptionError(f"epsilon={self.epsilon} is not allowed; it is 0 or more")

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """Those of the first stage, and the best of the second."""
        del scorer
        sure = (each(counts, scores).double() * self.first).long()
        if self.first:
            sure = sure.clamp(min=1)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(scores.shape[-1], device=scores.device) < sure[..., None]
        chosen = torch.zeros_like(chosen).scatter(-1, order, chosen)
        norms = ctx.mean_over_group(output_norms(ctx.stored.values, ctx.module, ctx.queries.shape[1], order=1))
        second = torch.where(scores >= MUST_STAY, scores, (scores + self.epsilon) * norms).masked_fill(chosen, torch.inf)
        return best(second.masked_fill(scores == -torch.inf, -torch.inf), counts)


@wrapper("criticalkv")
def _criticalkv(press: Any, first: float = 0.5, epsilon: float = 1e-4) -> Any:
    """A part of the budget goes by scores, the rest by scores times the size of what values write.

    Source: Feng et al. 2025 (CriticalKV), arXiv:2502.03805.
    """
    return selecting(press, TwoStage(first, epsilon))


@wrapper("critical_adakv")
def _critical_adakv(press: Any, alpha: float = 0.2, first: float = 0.5, epsilon: float = 1e-4) -> Any:
    """`criticalkv` with a budget that the heads of a layer share, as in `adakv`.

    Source: Feng et al. 2025 (CriticalKV), arXiv:2502.03805.
    """
    return replace(selecting(press, TwoStage(first, epsilon)), budget=HeadAdaptive(alpha))
