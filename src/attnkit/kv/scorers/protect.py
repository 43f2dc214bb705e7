"""Tokens that stay whatever another scorer says of them, and wrappers that need that."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets_tables import Curves, PrefillAndEvery, Threshold
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.registry import wrapper
from attnkit.kv.weights import required

__all__ = ["KEEP_FIRST", "KEEP_LAST", "Protected"]

KEEP_FIRST, KEEP_LAST = 4, 1  # of lukv


@dataclass(frozen=True)
class Protected:
    """Another scorer, with the first and the newest tokens of each head worth most.

    Args:
        scorer: the other one.
        first: tokens at the beginning.
        last: tokens at the end.
    """

    scorer: Any
    first: int
    last: int

    @property
    def needs(self) -> frozenset[str]:
        """What the other needs."""
        return frozenset(self.scorer.needs)

    @property
    def window(self) -> int:
        """Of the other."""
        return int(getattr(self.scorer, "window", 1))

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return must_stay(self.scorer.score(ctx), ctx, sink=self.first, recent=self.last)

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S] float32 of each layer, where the other reads the context again."""
        scores = self.scorer.replay(passed, contexts)
        return [must_stay(score, ctx, sink=self.first, recent=self.last) for ctx, score in zip(contexts, scores, strict=True)]


@wrapper("lukv")
def _lukv(press: Any, curves: str | None = None, keep_first: int = KEEP_FIRST, keep_last: int = KEEP_LAST) -> Any:
    """Each head's own ratio from a table that was worked out beforehand (`curves`).

    Args:
        press: gives the scores; the table is for its method.
        curves: path of the table, see `Curves`; `attnkit.inference.calibrate` makes one.
        keep_first, keep_last: tokens of each head that stay.
    Source: LU-KV 2026, arXiv:2602.08585.
    """
    path = required(
        curves,
        "lukv",
        "curves, a table [99, layers, Hkv] for this model and scorer (.npy or .safetensors), as calibrate makes it",
    )
    return replace(press, scorer=Protected(press.scorer, keep_first, keep_last), budget=Curves(path))


@wrapper("dms")
def _dms(press: Any, threshold: float | None = None, sliding_window: int = 128, interval: int = 64) -> Any:
    """Tokens whose score is below a threshold go once they have left the recent window, in prefill and decoding.

    How much that removes follows from the text; the ratio is not used. This is the rule of inference with any scorer;
    the evictors that the paper trains are weights of their own models.

    Args:
        press: gives the scores.
        threshold: what a score must reach; its scale is the scorer's.
        sliding_window: newest tokens that stay.
        interval: tokens of decoding between two looks; between them, tokens stay longer than they must.
    Source: Lancucki et al. 2025 (DMS), arXiv:2506.05345.
    """
    if threshold is None:
        raise OptionError("dms needs threshold, the lowest score that stays; its scale is the scorer's")
    if sliding_window < 1:
        raise OptionError(f"sliding_window={sliding_window} is not allowed; it counts tokens, 1 or more")
    schedule = PrefillAndEvery(interval)
    budget, scorer = Threshold(threshold), Protected(press.scorer, 0, sliding_window)
    return replace(press, scorer=scorer, budget=budget, schedule=schedule, buffer=max(press.buffer, interval))
