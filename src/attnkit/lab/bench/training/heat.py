"""One form of the data: a round that compares losses, rounds that are timed, and the row that comes out."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnkit._core.errors import AttnkitError
from attnkit.lab.bench.heat import spread
from attnkit.lab.bench.race import OWN
from attnkit.lab.bench.timing import reason
from attnkit.lab.bench.training.lap import Lap, run_lap
from attnkit.lab.bench.training.sides import PEER, SIDES, Setup
from attnkit.training.work import peak_flops

__all__ = ["TOLERANCE", "Out", "race"]

# relative difference of two losses that is put down to rounding: twenty times what was seen, and less than what a wrong
# learning rate, beta or border of a sequence does
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}


class Out(Exception):
    """A side is out of the race; the message is the reason.

    Attributes:
        side: ours, or the peer.
    """

    def __init__(self, side: str, why: str) -> None:
        super().__init__(why)
        self.side = side


def race(setup: Setup, rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Race both sides on one form of the data.

    Args:
        setup: what both have in common.
        rounds: that are timed.
        tell: told what begins.
    Returns:
        what a row of the result says beside its place.
    Raises:
        Out: a side broke, or the losses differ.
    """
    skipped = setup.recipe.steps // 4
    allowed = TOLERANCE[setup.recipe.precision]
    tell("comparing losses")
    curves = {side: _lap(side, setup, skipped) for side in (OWN, PEER)}
    ours, theirs = curves[OWN].losses, curves[PEER].losses
    apart, step = _apart(ours, theirs)
    if not apart <= allowed:
        gap = f"{ours[step]:.6g} and {theirs[step]:.6g}, {apart:.1e} apart, allowed {allowed:.0e}"
        raise Out(OWN, f"the losses of both sides differ: in step {step + 1} they are {gap}")
    timed = dataclasses.replace(setup, recipe=dataclasses.replace(setup.recipe, log_every=setup.recipe.steps))
    laps: dict[str, list[Lap]] = {OWN: [], PEER: []}
    for turn in range(rounds):
        tell(f"round {turn + 1} of {rounds}")
        for side in (OWN, PEER) if turn % 2 == 0 else (PEER, OWN):
            lap = _lap(side, timed, skipped)
            before = statistics.fmean(curves[side].losses)
            if not _apart(lap.losses, [before])[0] <= allowed:
                raise Out(side, f"its mean loss is {lap.losses[0]:.6g} in round {turn + 1} and was {before:.6g} before")
            laps[side].append(lap)
    row = _row(setup, laps, setup.recipe.steps - skipped)
    return row | {
        "first_call_s": curves[OWN].first_s, "losses": ours, "peer_losses": theirs, "loss_difference": apart
    }  # fmt: skip


def _lap(side: str, setup: Setup, skipped: int) -> Lap:
    try:
        return run_lap(SIDES[side], setup, skipped)
    except AttnkitError:
        raise  # foreseen: the call is wrong
    except Exception as error:  # peers raise what they like
        raise Out(side, reason(error)) from error


def _apart(losses: Sequence[float], others: Sequence[float]) -> tuple[float, int]:
    """The largest relative difference, infinite where a loss is no number, and where it is."""
    apart = [abs(loss - other) / abs(other) for loss, other in zip(losses, others, strict=True)]
    apart = [math.inf if math.isnan(each) else each for each in apart]
    return max(apart), apart.index(max(apart))


def _row(setup: Setup, laps: Mapping[str, Sequence[Lap]], counted: int) -> dict[str, Any]:
    ours, theirs = laps[OWN], laps[PEER]
    ours_s, peer_s = (statistics.median(lap.seconds for lap in side) / counted for side in (ours, theirs))
    tokens, flops = ours[0].tokens / counted, ours[0].flops / counted
    peak = peak_flops(setup.device, setup.recipe.precision)
    return {
        "ours_ms": 1e3 * ours_s,
        "peer_ms": 1e3 * peer_s,
        "ratio": peer_s / ours_s,
        "spread": spread([their.seconds / our.seconds for our, their in zip(ours, theirs, strict=True)]),
        "peak_mib": _largest(ours),
        "peer_peak_mib": _largest(theirs),
        "tflops": flops / ours_s / 1e12,
        "peer_tflops": flops / peer_s / 1e12,
        "tokens_s": tokens / ours_s,
        "peer_tokens_s": tokens / peer_s,
        "mfu": None if peak is None else flops / ours_s / peak,
        "peer_mfu": None if peak is None else flops / peer_s / peak,
    }


def _largest(laps: Sequence[Lap]) -> float | None:
    return max((lap.peak_mib for lap in laps if lap.peak_mib is not None), default=None)
