"""One kernel: every configuration that runs is timed, the fastest are judged, and the present one defends its place."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnkit._core.opspec import OPS
from attnkit._core.triton.configs import Config
from attnkit._core.triton.probe import Probe
from attnkit.lab.bench.heat import spread
from attnkit.lab.bench.timing import Calls, Entrant, interleave, reason
from attnkit.lab.tune.tunables import Tunable

__all__ = ["Dropped", "Row", "Timed", "Winner", "choose", "faithful", "race"]

_SCREENING = 3  # rounds that decide who comes into the final
_FINALISTS = 5


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A configuration that is out, and why."""

    config: Config
    reason: str


@dataclasses.dataclass(frozen=True)
class Timed:
    """A configuration of the final: seconds a call, one entry a round."""

    config: Config
    times: Sequence[float]

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.times) * 1e3


@dataclasses.dataclass(frozen=True)
class Winner:
    """A configuration that beats the present one; by how much is None where the present one does not run."""

    config: Config
    gain: float | None
    spread: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out for one kernel, dtype and padded head width.

    Attributes:
        kernel, dtype, bits, width: which.
        present: the configuration before.
        present_ms: its time in milliseconds; None where it does not run here.
        best: the configuration from now on, which may be the present one.
        best_ms: its time in milliseconds; None where nothing runs.
        gain: median over rounds of present / best, minus 1; 0 where the present one stays, None where it does not run.
        spread: interquartile range of those ratios divided by their median.
        tried: how many configurations.
        dropped: those that failed, and why.
        notes: what a reader must know about the times.
    """

    kernel: str
    dtype: str
    bits: int
    width: int
    present: Config
    present_ms: float | None
    best: Config
    best_ms: float | None
    gain: float | None
    spread: float | None
    tried: int
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]


def race(
    probe: Probe, device: torch.device, present: Config, configs: Sequence[Config], rounds: int
) -> tuple[list[Timed], list[Dropped], tuple[str, ...]]:
    """The final's times, fastest first and always with the present configuration if it runs; who failed; notes."""
    entrants: dict[Config, Entrant] = {}
    dropped = []
    for config in configs:
        try:
            calls = Calls(lambda config=config: probe.run(config), [{}])
            entrants[config] = Entrant.ready(str(config), device, calls, graph=probe.graph)
        except Exception as error:  # it ran in another process; here memory may be short
            dropped.append(Dropped(config, reason(error)))
    if not entrants:
        return [], dropped, ()
    interleave(list(entrants.values()), _SCREENING)
    order = sorted(entrants, key=lambda config: statistics.median(entrants[config].times))
    final = [config for config in order if config in order[:_FINALISTS] or config == present]
    again = {config: dataclasses.replace(entrants[config], times=[]) for config in final}
    interleave(list(again.values()), rounds, rested=False)
    notes = tuple(entrant.note for entrant in again.values() if entrant.note)
    return sorted((Timed(config, again[config].times) for config in final), key=lambda timed: timed.ms), dropped, notes


def choose(final: Sequence[Timed], present: Config) -> list[Winner]:
    """Who beats the present configuration by more than the spread, or all where that does not run; in the order given."""
    defender = next((timed for timed in final if timed.config == present), None)
    if defender is None:
        return [Winner(timed.config, None, None) for timed in final]
    winners = []
    for timed in final:
        ratios = [before / after for before, after in zip(defender.times, timed.times, strict=True)]
        gain, noise = statistics.median(ratios) - 1, spread(ratios)
        if gain > noise:
            winners.append(Winner(timed.config, gain, noise))
    return winners


def faithful(tunable: Tunable, probe: Probe, configs: Sequence[Config]) -> dict[Config, str]:
    """Why outputs are too far from float64, "" where they are not, for each configuration; they judge one another."""
    truth, budget = tunable.truth(probe), OPS[tunable.op].budget
    errors = {config: _errors(probe, config, truth) for config in configs}
    verdicts = dict.fromkeys(configs, "")
    for name in probe.outputs:
        gradient = name.startswith("d_")
        factor, ulps = (budget.backward, budget.backward_ulps) if gradient else (budget.forward, budget.ulps)
        for index, what in enumerate(("largest", "rms")):
            smallest = min(error[name][index] for error in errors.values())
            for config, error in errors.items():
                slack = ulps * error[name][2] / 2 * float(truth[name].abs().max())
                allowed = factor * smallest + slack
                if not error[name][index] <= allowed and not verdicts[config]:
                    verdicts[config] = f"{what} error of {name} is {error[name][index]:.1e}, allowed {allowed:.1e}"
    return verdicts


def _errors(probe: Probe, config: Config, truth: Mapping[str, Tensor]) -> dict[str, tuple[float, float, float]]:
    """Output -> largest and root mean square error (infinite where there is NaN), and the machine epsilon of its dtype."""
    found = {}
    for name, got in zip(probe.outputs, probe.run(config), strict=True):
        difference = got.double() - truth[name]
        figures = (float(difference.abs().max()), float(difference.square().mean().sqrt()))
        largest, rms = (math.inf if math.isnan(figure) else figure for figure in figures)
        found[name] = (largest, rms, torch.finfo(got.dtype).eps)
    return found
