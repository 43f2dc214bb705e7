"""What a monitor remembers of one layer, and when it is worried."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from attnkit.lab.numerics.drift import ALARM_Z, MIN_SAMPLES, WINDOW, Drift
from attnkit.lab.numerics.measured import ProbeReport
from attnkit.lab.numerics.probe import FACTS

__all__ = ["LEVELS", "Track"]

LEVELS = ("calm", "watch", "warn", "act")
_SUMMED = ("shift_leak", *(name for name in FACTS if name != "max_logit"))
_TIE_RATE, _ANISOTROPY, _GROWTH = 0.05, 2.0, 0.1  # growth of a spectral norm in 100 steps


class Track:
    """One layer over a run.

    Args:
        name: of the module.

    Attributes:
        drift: of eps in terms of |delta|, a sample a monitored step.
        norms: spectral norms as measured last; empty before.
    """

    def __init__(self, name: str) -> None:
        self.name, self.drift = name, Drift()
        self.norms: dict[str, float] = {}
        self._older: deque[tuple[int, dict[str, float]]] = deque(maxlen=WINDOW)
        self._sums: Tensor | None = None  # [facts, H]
        self._highest: Tensor | None = None

    def add(self, step: int, report: ProbeReport, norms: dict[str, float]) -> None:
        """Take over one sample."""
        assert report.shift_leak is not None  # reports of a watch have met their gradient
        self.drift.add(report.relative_eps())
        facts = torch.stack([getattr(report, name) for name in _SUMMED])
        self._sums = facts if self._sums is None else self._sums + facts
        highest = report.max_logit
        self._highest = highest if self._highest is None else torch.maximum(self._highest, highest)
        self.norms = norms
        self._older.append((step, norms))

    def growth(self) -> float:
        """Fastest growth of a spectral norm over the window, as a share in 100 steps; 0 before the second sample."""
        (first, then), (last, now) = self._older[0], self._older[-1]
        if first == last:
            return 0.0
        rates = [math.log(now[name] / then[name]) for name in now if now[name] > 0 and then[name] > 0]
        return math.expm1(max(rates, default=0.0) * 100 / (last - first))

    def levels(self) -> Tensor:
        """[H], indices into LEVELS."""
        alarmed = (self.drift.z().abs() >= ALARM_Z) & (self.drift.window >= MIN_SAMPLES)
        means = self._means()
        watched = (means["tie_rate"] >= _TIE_RATE) & (means["v_anisotropy"] >= _ANISOTROPY)
        worst = 3 if self.growth() >= _GROWTH else 2
        return torch.where(alarmed, worst, watched.long())

    def reason(self, level: int) -> str:
        """Why the layer has come to a level, in words."""
        if LEVELS[level] == "watch":
            return "two probabilities or more round to 1 in many rows, and values lie off 0"
        grown = f", and a spectral norm grows by {100 * self.growth():.0f} % in 100 steps" if LEVELS[level] == "act" else ""
        return f"eps leans one way, z = {float(self.drift.z().abs().max()):.1f}{grown}"

    def rows(self, stable: str) -> list[dict[str, Any]]:
        """A row of the report for each head."""
        if not self.drift.samples:
            return []
        z, levels, means = self.drift.z(), self.levels(), self._means()
        assert self.drift.total is not None
        return [
            {
                "layer": self.name,
                "head": head,
                "stable": stable,
                "level": LEVELS[int(levels[head])],
                "samples": self.drift.samples,
                "eps_total": float(self.drift.total[head]),
                "eps_mean": float(self.drift.total[head]) / self.drift.samples,
                "z": float(z[head]),
                **{name: float(value[head]) for name, value in means.items()},
            }
            for head in range(len(z))
        ]

    def moment(self, step: int, stable: str) -> dict[str, Any]:
        """One line of the history: the head that leans most, and the norms."""
        z = self.drift.z()
        head = int(z.abs().argmax())
        assert self.drift.total is not None
        facts = {"eps_total": float(self.drift.total[head]), "z": float(z[head])}
        facts |= {f"norm_{name}": value for name, value in self.norms.items()}
        return {"step": step, "layer": self.name, "head": head, "stable": stable, **facts}

    def _means(self) -> dict[str, Tensor]:
        assert self._sums is not None
        assert self._highest is not None
        means = dict(zip(_SUMMED, self._sums / self.drift.samples, strict=True))
        return {name: self._highest if name == "max_logit" else means[name] for name in ("shift_leak", *FACTS)}
