"""Pictures of claims from their data: lines with the range over seeds, and heat maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnkit._core.errors import MissingExtra
from attnkit._core.lazy import require
from attnkit.report.files import write_bytes
from attnkit.report.plots import INK, MUTED, canvas, encoded, series
from attnkit.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_figure", "save_figures"]

Drawn = Mapping[str, Any]
_PRINTED = ("#1f77b4", "#d95f02", "#2ca02c", "#7b3294", "#c51b7d", "#8c6d31", "#17becf", "#7f7f7f")  # on white paper
_WRITTEN = 100  # cells of a heat map up to which each shows its number


def draw_figure(prefix: str, figure: Drawn) -> str:
    """One figure of a result, as SVG for a page.

    Args:
        prefix: of element ids.
        figure: an entry of `figures` of attnkit.claim/1.
    """
    heat = figure["kind"] == "heat"
    height = min(8.0, 1.4 + 0.3 * len(figure["rows"])) if heat else 3.4
    with canvas(prefix, 7.2, max(3.0, height), alt=f"{figure['title']}. {_facts(figure)}") as drawn:
        axes = drawn.axes[0]
        if heat:
            _heat(axes, figure)
        else:
            _lines(axes, figure, [series(index)[0] for index in range(len(_PRINTED))], INK)
            for text in axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5)).get_texts():
                text.set_color(MUTED)
    return drawn.svg


def save_figures(path: Path, document: Drawn) -> None:
    """Write all figures of a result below each other as one PNG, whole or not at all; nothing where matplotlib is missing."""
    figures = document["figures"]
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return
    if not figures:
        return
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7.6, 3.8 * len(figures)), layout="constrained")
    grid = picture.subplots(len(figures), 1, squeeze=False)
    for axes, figure in zip(grid[:, 0], figures, strict=True):
        axes.set_title(figure["title"], fontsize=9, loc="left")
        if figure["kind"] == "heat":
            _heat(axes, figure)
        else:
            _lines(axes, figure, _PRINTED, "#333333")
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
            axes.grid(linewidth=0.4)
    write_bytes(path, encoded(picture, dpi=130))


def _facts(figure: Drawn) -> str:
    if figure["kind"] == "heat":
        values = [value for row in figure["values"] for value in row if value is not None]
        return f"{figure['quantity']}: {number(min(values))} to {number(max(values))}" if values else ""
    ends = [(line["name"], line["points"][-1]) for line in figure["lines"] if line["points"]]
    return "; ".join(f"{name}: {number(point['y'])} at {number(point['x'])}" for name, point in ends)


def _lines(axes: "Axes", figure: Drawn, colors: Any, ink: str) -> None:
    for mark in figure["marks"]:
        axes.axvline(mark, color=ink, linewidth=0.8, linestyle=(0, (4, 3)))
    for index, line in enumerate(figure["lines"]):
        points = [point for point in line["points"] if point["y"] is not None]
        x = [point["x"] for point in points]
        color, marker = colors[index % len(colors)], series(index)[1]
        style = "-" if index < len(colors) else "--"
        axes.plot(
            x, [point["y"] for point in points], style, marker=marker, markevery=max(1, len(points) // 12), markersize=4,
            linewidth=1.2, color=color, label=line["name"],
        )  # fmt: skip
        if any(point["low"] != point["high"] for point in points):
            low, high = ([point[end] for point in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if figure["log_x"]:
        axes.set_xscale("log", base=2)
        ticks = sorted({point["x"] for line in figure["lines"] for point in line["points"]})
        if len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    if figure["log_y"]:
        axes.set_yscale("log")
    axes.set_xlabel(figure["x"])
    axes.set_ylabel(figure["y"])


def _heat(axes: "Axes", figure: Drawn) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in figure["values"]]
    low, high = figure["range"]
    drawn = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if len(values) * len(values[0]) <= _WRITTEN:
        middle = (low + high) / 2
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "#ffffff" if value < middle else "#000000"
                axes.text(x, y, number(value, 2), ha="center", va="center", fontsize=7, color=color)
    axes.grid(visible=False)
    if len(figure["columns"]) <= 20:
        axes.set_xticks(range(len(figure["columns"])), figure["columns"])
    if len(figure["rows"]) <= 20:
        axes.set_yticks(range(len(figure["rows"])), figure["rows"])
    axes.set_xlabel(figure["x"])
    axes.set_ylabel(figure["y"])
    axes.figure.colorbar(drawn, ax=axes, label=figure["quantity"])
