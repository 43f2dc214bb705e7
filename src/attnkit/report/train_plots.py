"""The picture of a training run: loss over tokens."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnkit._core.errors import MissingExtra
from attnkit._core.lazy import require
from attnkit.report.files import write_bytes
from attnkit.report.plots import MUTED, canvas, encoded, series
from attnkit.report.tables import ABSENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["curves", "nats", "save_curves"]

Row = Mapping[str, Any]
_PRINTED = ("#1f77b4", "#d95f02")  # on white paper, where the page's colours are not


def curves(prefix: str, rows: Sequence[Row]) -> str:
    """Loss and validation loss over tokens, as SVG for a page.

    Args:
        prefix: of element ids.
        rows: lines of the log.
    """
    first, last = rows[0], rows[-1]
    alt = f"Loss over tokens: {nats(first['loss'])} at {first['tokens']:,}, {nats(last['loss'])} at {last['tokens']:,}."
    with canvas(prefix, 7.2, 3.2, alt=alt) as drawn:
        _draw(drawn.axes[0], rows, (series(0)[0], series(1)[0]))
        for text in drawn.axes[0].legend().get_texts():
            text.set_color(MUTED)
    return drawn.svg


def save_curves(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """Write `loss.svg` and `loss.png` into a folder, whole or not at all; nothing where matplotlib is not installed."""
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    _draw(axes, document["rows"], _PRINTED)
    axes.legend(frameon=False)
    axes.grid(linewidth=0.4)
    written = []
    for kind in ("svg", "png"):
        write_bytes(folder / f"loss.{kind}", encoded(figure, kind))
        written.append(folder / f"loss.{kind}")
    return written


def nats(loss: float | None) -> str:
    """Write a loss; one that was not finite is absent in results."""
    return ABSENT if loss is None else f"{loss:.3f}"


def _draw(axes: "Axes", rows: Sequence[Row], colors: tuple[str, str]) -> None:
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    axes.plot([row["tokens"] for row in rows], losses, color=colors[0], linewidth=1.2, label="training")
    judged = [row for row in rows if row.get("validation_loss") is not None]
    tokens, kept = [row["tokens"] for row in judged], [row["validation_loss"] for row in judged]
    axes.plot(tokens, kept, "s-", color=colors[1], markersize=4, linewidth=1, label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
