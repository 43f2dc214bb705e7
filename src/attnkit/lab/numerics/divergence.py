"""How two training runs come apart, step by step, beside what other choices change."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.errors import InputError
from attnkit._core.events import Event
from attnkit.lab.numerics.bands import PAPER_RANGE, Ratio, ReferenceBands, Verdict, contextualize, significance
from attnkit.lab.numerics.snapshots import SavedWeights, snapshots
from attnkit.lab.numerics.weights import METRICS, WeightDeviation, weight_deviation
from attnkit.report.weights_plots import save_curves

__all__ = ["SCHEMA", "Divergence", "WeightDivergence", "save_divergence"]

SCHEMA = "attnkit.weights/1"
_FILE = "weights"


@dataclass(frozen=True)
class Divergence:
    """How far runs are apart, by step.

    Attributes:
        curves: "runs" and the bands that were given -> step -> deviation from the first run.
    """

    curves: Mapping[str, Mapping[int, WeightDeviation]]

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.curves["runs"])

    def significance(self) -> dict[int, dict[str, Ratio]]:
        """`significance` at every step at which a change of precision has changed something; empty without that band."""
        precision = self.curves.get("precision", {})
        return {
            step: significance(self.curves["runs"][step], band)
            for step, band in precision.items()
            if band.total("max_abs") and band.total("w1")
        }

    def verdict(self, margin: float) -> Verdict:
        """`contextualize` at the last step.

        Raises:
            InputError: a band is missing.
            OptionError: see `contextualize`.
        """
        bands = {name: curve[self.last] for name, curve in self.curves.items() if name != "runs"}
        missing = [name for name in ("random_init", "precision") if name not in bands]
        if missing:
            raise InputError(f"a verdict needs the bands random_init and precision; {' and '.join(missing)} was not given")
        return contextualize(self.curves["runs"][self.last], ReferenceBands(**bands), margin=margin)


@dataclass(frozen=True)
class WeightDivergence:
    """Two runs of one architecture, and what their distance is measured against.

    Attributes:
        run_a: folder of the reference run; `snapshots` says what is found there.
        run_b: folder of the run in question, with the same seed and data.
        random_init: of one that differs from the reference in its random start, or None.
        precision: of one that differs in its number format, or None.
        repeat: of one that does not differ, or None.
    """

    run_a: Path
    run_b: Path
    random_init: Path | None = None
    precision: Path | None = None
    repeat: Path | None = None

    def compare(
        self, *, device: str | torch.device = "cpu", on_event: Callable[[Event], None] = lambda event: None
    ) -> Divergence:
        """Compare all runs with the first, at every step that all of them have kept.

        Weights are read one tensor at a time. Where the first run has kept its start, updates are known too.

        Args:
            device: where to compute.
            on_event: told the progress, in comparisons.
        Raises:
            InputError: a run without weights, no step in common, or weights that cannot be compared.
            ShapeError: shapes differ.
        """
        reference = snapshots(self.run_a)
        others = {name: snapshots(run) for name, run in self.runs().items() if name != "run_a"}
        steps = [step for step in reference if all(step in found for found in others.values())]
        if not steps:
            kept = "; ".join(f"{run.name}: {', '.join(map(str, snapshots(run)))}" for run in self.runs().values())
            raise InputError(f"the runs have kept no step in common ({kept}); keep snapshots at the same steps")
        start = SavedWeights(reference[0]) if 0 in reference and steps[-1] > 0 else None
        total = len(steps) * len(others)
        on_event(Event("plan", "", 0, total))
        curves: dict[str, dict[int, WeightDeviation]] = {name: {} for name in others}
        for count, step in enumerate(steps):
            for place, (name, found) in enumerate(others.items(), 1):
                weights = SavedWeights(reference[step]), SavedWeights(found[step])
                curves[name][step] = weight_deviation(*weights, start, device=device)
                on_event(Event("step", f"step {step:,}, {name}", count * len(others) + place, total))
        return Divergence({"runs" if name == "run_b" else name: curve for name, curve in curves.items()})

    def document(
        self,
        divergence: Divergence,
        *,
        margin: float | None,
        command: str,
        device: torch.device,
        started: float,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The envelope of attnkit.weights/1.

        Args:
            divergence: what `compare` has found.
            margin: of the verdict; None gives none.
            command: the command line to record.
            device: where it was computed.
            started: `time.monotonic()` when the work began.
            extra: further entries.
        Raises:
            InputError, OptionError: see `Divergence.verdict`.
        """
        found = divergence.significance()
        facts: dict[str, Any] = {
            "runs": {name: run.name for name, run in self.runs().items()},
            "significance": [{"step": step, **ratios} for step, ratios in found.items()],
            "paper_range": PAPER_RANGE,
            "verdict": None if margin is None else divergence.verdict(margin),
            "tensors": [
                {"pair": pair, **dataclasses.asdict(tensor)}
                for pair, curve in divergence.curves.items()
                for tensor in curve[divergence.last].tensors
            ],
        }
        rows = [
            {"pair": pair, "step": step, **{metric: deviation.total(metric) for metric in METRICS}}
            for pair, curve in divergence.curves.items()
            for step, deviation in curve.items()
        ]
        return report.envelope(
            SCHEMA, rows, command=command, seed=None, device=device_name(device), dtype="float64",
            wall_s=time.monotonic() - started, extra=facts | dict(extra or {}),
        )  # fmt: skip

    def runs(self) -> dict[str, Path]:
        """Name of the part -> folder, for the runs that were given."""
        return {name: run for name, run in vars(self).items() if run is not None}


def save_divergence(out: Path, document: Mapping[str, Any]) -> None:
    """Write weights.json, weights.html and, where matplotlib is installed, weights.svg and weights.png into a folder."""
    report.write_json(out / f"{_FILE}.json", document)
    report.write_html(out / f"{_FILE}.html", [document])
    save_curves(out / _FILE, document)
