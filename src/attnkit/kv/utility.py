"""How heads best share a budget, worked out from what later queries of texts look at."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.context import LayerCall
from attnkit.kv.notation import parse
from attnkit.kv.notes import Notes
from attnkit.kv.pressing import Press
from attnkit.kv.schedules import AfterPrefill
from attnkit.kv.scorers.attention import ObservedAttention, received
from attnkit.kv.scorers.protect import KEEP_FIRST, KEEP_LAST, Protected
from attnkit.kv.selectors import TopK

__all__ = ["STEM", "UtilityCurves", "falling", "shares"]

STEM = "lukv:"
_STEPS = 100  # of a curve, from no key to all keys
_LATER = 4  # the last quarter of a text asks
_ALL_QUERIES = Press(ObservedAttention())


class UtilityCurves:
    """What the keys that a method keeps of each head are worth to later queries, as a function of how many stay.

    A text is cut in two. At the end of the first part the method scores its keys; the worth of a key is the attention that
    the queries of the second part give it, mean over them and the group. Summed in the order of the scores that is a head's
    curve, taken at each hundredth of its keys; curves of texts are averaged.

    Args:
        press: gives the scores.
    Source: LU-KV 2026, arXiv:2602.08585, for budgets from the worth of keys to later queries, by concave envelopes and a greedy
    choice. What counts as worth, and that curves and not ratios are averaged, is our choice.
    """

    def __init__(self, press: Press) -> None:
        self.press = press
        self._orders: dict[int, Tensor] = {}
        self._gains: dict[int, Tensor] = {}

    @classmethod
    def of(cls, name: str) -> Self:
        """For `name`, "lukv:METHOD" with the method's options, as the press is written that will use the table.

        Raises:
            OptionError: an unknown method, or one that does more than keep the highest of scores that a layer gives by itself.
        """
        press = parse(name.removeprefix(STEM))
        plain = isinstance(press, Press) and isinstance(press.selector, TopK) and isinstance(press.schedule, AfterPrefill)
        if not isinstance(press, Press) or not plain or "replay" in press.needs:
            raise OptionError(
                f"what={name!r} is not allowed; budgets are learnt for methods that keep each head's highest scores after the "
                f"prefill, without a second reading"
            )
        scorer: Any = Protected(press.scorer, KEEP_FIRST, KEEP_LAST)
        return cls(replace(press, scorer=scorer))

    @property
    def needs(self) -> frozenset[str]:
        """What the method needs."""
        return self.press.needs

    def passes(self, length: int) -> list[tuple[int, Callable[[LayerCall], None]]]:
        """How a text of one row is read: tokens of each pass and who listens."""
        later = max(1, length // _LATER)
        return [(length - later, self._score), (later, self._ask)]

    def tensors(self, layers: int) -> dict[str, Tensor]:
        """Of the texts so far.

        Returns:
            "lukv" [99, layers, Hkv] float32 on the CPU: the fraction of its keys that each head loses where 1 to 99 % of all
            go, mean over heads exactly that; 0 in layers that keep no positions.
        """
        indices = sorted(self._gains)
        gains = torch.stack([self._gains[index] for index in indices])  # [layers that keep positions, Hkv, 100]
        kept = shares(falling(gains.flatten(0, 1))).unflatten(1, gains.shape[:2])
        table = torch.zeros(_STEPS - 1, layers, gains.shape[1])
        table[:, indices] = 1 - kept.float() / _STEPS
        return {"lukv": table}

    def _score(self, call: LayerCall) -> None:
        notes = Notes()
        notes.take(call, self.press)
        scores = self.press.scorer.score(notes.context(call, self.press, "prefill"))
        self._orders[call.index] = scores[0].argsort(dim=-1, descending=True, stable=True)

    def _ask(self, call: LayerCall) -> None:
        notes = Notes()
        notes.take(call, _ALL_QUERIES)
        order = self._orders.pop(call.index)
        total, _ = received(notes.context(call, _ALL_QUERIES, "decode"))  # these queries alone are not the prefill
        worth = total[0].gather(-1, order).double().cpu() / call.q.shape[1]
        gains = _at_steps(worth)
        self._gains[call.index] = self._gains[call.index] + gains if call.index in self._gains else gains


def _at_steps(worth: Tensor) -> Tensor:
    """[H, n] in the order of the scores -> [H, 100]: what each hundredth of the keys adds."""
    curve = torch.nn.functional.pad(worth.cumsum(-1), (1, 0))
    place = torch.arange(_STEPS + 1, dtype=worth.dtype) * (worth.shape[-1] / _STEPS)
    below = place.long().clamp(max=worth.shape[-1] - 1)
    return torch.lerp(curve[:, below], curve[:, below + 1], place - below).diff(dim=-1)


def falling(gains: Tensor) -> Tensor:
    """Slopes of the least concave curves above the sums of gains [H, n]: [H, n], none larger than the one before it.

    slope_j = min over i <= j of max over k >= j of mean(gains_i .. gains_k)
    """
    size = gains.shape[-1]
    curve = torch.nn.functional.pad(gains.cumsum(-1), (1, 0))
    place = torch.arange(size)
    width = place - place[:, None] + 1
    means = (curve[:, None, 1:] - curve[:, :-1, None]) / width.clamp(min=1)
    means = means.masked_fill(width < 1, -torch.inf)
    highest = means.flip(-1).cummax(-1).values.flip(-1)  # over ends from j on
    slopes: Tensor = highest.masked_fill(width < 1, torch.inf).amin(1)
    return slopes


def shares(slopes: Tensor) -> Tensor:
    """How many steps each head keeps where all together keep 99, 98 .. 1 hundredths: those with the highest slopes.

    Args:
        slopes: [H, 100], falling.
    Returns:
        [99, H] int64; row r adds up to (99 - r) H. Of equal slopes the earlier steps count first, then the first heads.
    """
    heads = slopes.shape[0]
    order = slopes.mT.flatten().argsort(descending=True, stable=True) % heads  # whose step comes next
    taken = torch.nn.functional.one_hot(order, heads).cumsum(0)
    return taken[heads * torch.arange(_STEPS - 1, 0, -1) - 1]
