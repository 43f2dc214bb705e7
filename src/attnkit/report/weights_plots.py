"""Pictures of weights that come apart: distances over steps, and their significance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnkit._core.errors import MissingExtra
from attnkit._core.lazy import require
from attnkit.report.files import write_bytes
from attnkit.report.plots import GRID, MUTED, canvas, encoded, series
from attnkit.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["METRICS", "PAIRS", "distances", "save_curves", "significances"]

Row = Mapping[str, Any]
METRICS = {"max_abs": "D_max", "w1": "W1"}
PAIRS = {
    "runs": "attention",
    "random_init": "random start",
    "precision": "precision",
    "repeat": "nothing (repeated)",
}
_PRINTED = ("#1f77b4", "#d95f02", "#2ca02c", "#7f7f7f")  # on white paper, where the page's colours are not


def distances(prefix: str, rows: Sequence[Row]) -> str:
    """D_max and W1 over steps, a line for each pair of runs, as SVG for a page.

    Args:
        prefix: of element ids.
        rows: of attnkit.weights/1.
    """
    last = max(row["step"] for row in rows)
    facts = "; ".join(
        f"{PAIRS[row['pair']]}: " + ", ".join(f"{name} {number(row[metric])}" for metric, name in METRICS.items())
        for row in rows
        if row["step"] == last
    )
    with canvas(prefix, 7.2, 3.2, len(METRICS), alt=f"Distances of weights at step {last:,}: {facts}") as drawn:
        _draw_distances(drawn.axes, rows, [series(index)[0] for index in range(len(PAIRS))])
        for text in drawn.axes[0].legend().get_texts():
            text.set_color(MUTED)
    return drawn.svg


def significances(prefix: str, found: Sequence[Row], paper: Sequence[float]) -> str:
    """Significance over steps with its intervals, and the range of the paper as a band, as SVG for a page.

    Args:
        prefix: of element ids.
        found: entries of `significance` of attnkit.weights/1.
        paper: both ends of the band.
    """
    last = found[-1]
    facts = ", ".join(f"{name} {number(last[metric]['value'])}" for metric, name in METRICS.items())
    with canvas(prefix, 7.2, 2.8, alt=f"Significance at step {last['step']:,}: {facts}") as drawn:
        axes = drawn.axes[0]
        axes.axhspan(*paper, color=GRID, alpha=0.6, linewidth=0)
        for index, (metric, name) in enumerate(METRICS.items()):
            color, marker = series(index)
            values = [entry[metric] for entry in found]
            whiskers = [[_length(value, end) for value in values] for end in ("low", "high")]
            axes.errorbar(
                [entry["step"] for entry in found], [value["value"] for value in values], yerr=whiskers,
                color=color, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2, label=name,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("of the precision's")
        for text in axes.legend().get_texts():
            text.set_color(MUTED)
    return drawn.svg


def save_curves(stem: Path, document: Mapping[str, Any]) -> None:
    """Write the distances as `stem`.svg and `stem`.png, whole or not at all; nothing where matplotlib is not installed."""
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(METRICS))
    _draw_distances(axes, document["rows"], _PRINTED)
    axes[0].legend(frameon=False)
    for part in axes:
        part.grid(linewidth=0.4)
    for kind in ("svg", "png"):
        write_bytes(stem.with_suffix(f".{kind}"), encoded(figure, kind))


def _length(ratio: Row, end: str) -> float:
    """Of a whisker; one without an end is not drawn, nor one that would point inwards."""
    if ratio[end] is None:
        return 0.0
    outwards: float = ratio[end] - ratio["value"] if end == "high" else ratio["value"] - ratio[end]
    return max(0.0, outwards)


def _draw_distances(axes: Sequence["Axes"], rows: Sequence[Row], colors: Sequence[str]) -> None:
    """Zeros have no place on the scale: runs that are the same have no line."""
    for part, (metric, name) in zip(axes, METRICS.items(), strict=True):
        for index, (pair, label) in enumerate(PAIRS.items()):
            points = [(row["step"], row[metric]) for row in rows if row["pair"] == pair and row[metric]]
            if points:
                marker = series(index)[1]
                part.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colors[index], label=label)
        if part.lines:
            part.set_yscale("log")
        part.set_title(name)
        part.set_xlabel("step")
    axes[0].set_ylabel("distance from the reference run")
