"""Pictures of deviation: curves on logarithmic scales, and bars of rounding sites."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.plots import INK, MUTED, canvas, series
from attnkit.report.tables import TIMES, number

__all__ = ["Curves", "bars", "curves"]

Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]  # panel -> line -> (x, y) in rising order


def curves(prefix: str, over: Curves, *, x: str, y: str, one: bool, linear_x: bool) -> str:
    """One panel beside the other, with common scales.

    Args:
        prefix: of element ids.
        over: what is drawn.
        x, y: names of the axes.
        one: whether values are ratios: a line at 1 marks equality, and the vertical scale has powers of two.
        linear_x: whether the horizontal scale is linear; it is logarithmic to base 2 else.
    """
    names = list(dict.fromkeys(name for panel in over.values() for name in panel))
    facts = "; ".join(
        f"{panel}, {name}: " + ", ".join(f"{number(value)} at {place:,g}" for place, value in points)
        for panel, lines in over.items()
        for name, points in lines.items()
    )
    with canvas(prefix, max(4.2, 2.7 * len(over)), 3.2, len(over), alt=f"{y} over {x}. {facts}", share_y=True) as drawn:
        for axes, (panel, lines) in zip(drawn.axes, over.items(), strict=True):
            if one:
                axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            for name, points in lines.items():
                color, marker = series(names.index(name))
                axes.plot(*zip(*points, strict=True), marker=marker, color=color, markersize=5, label=name)
            axes.set_title(panel)
            axes.set_yscale("log", base=2 if one else 10)
            if not linear_x:
                axes.set_xscale("log", base=2)
                places = sorted({place for points in lines.values() for place, _ in points})
                axes.set_xticks(places, [f"{place:,g}" for place in places])
                axes.minorticks_off()
            axes.set_xlabel(x)
        if one:
            drawn.axes[0].yaxis.set_major_formatter(lambda value, place: f"{value:g}{TIMES}")
        drawn.axes[0].set_ylabel(y)
        for text in drawn.axes[0].legend().get_texts():
            text.set_color(MUTED)
    return drawn.svg


def bars(prefix: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Root mean square error by site.

    Args:
        prefix: of element ids.
        rows: of attnkit.sites/1.
    """
    facts = ", ".join(f"{row['site']} {number(row['rms'])}" for row in rows)
    with canvas(prefix, 7.2, 0.9 + 0.24 * len(rows), alt=f"Root mean square error by rounding site: {facts}") as drawn:
        axes = drawn.axes[0]
        shown = [row["rms"] for row in rows if row["rms"]]
        axes.barh([row["site"] for row in rows], [row["rms"] or 0.0 for row in rows], color=series(0)[0], height=0.6)
        if shown:
            axes.set_xscale("log")
            axes.set_xlim(max(min(shown) / 2, max(shown) / 1e4), max(shown) * 2)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("rms")
    return drawn.svg
