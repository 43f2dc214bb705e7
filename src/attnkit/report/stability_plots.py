"""Pictures of a run that is watched: signed curves over steps, panel by panel."""

from collections.abc import Mapping, Sequence

from attnkit.report.plots import INK, MUTED, canvas, series
from attnkit.report.tables import number

__all__ = ["Lines", "lines"]

Lines = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]  # panel -> line -> (step, value)


def lines(prefix: str, over: Lines, *, y: str, x: str = "steps", zero: bool = False) -> str:
    """One panel beside the other, each with its own vertical scale.

    Args:
        prefix: of element ids.
        over: what is drawn.
        y: name of the vertical axis.
        x: what is counted along the horizontal one.
        zero: whether a line marks 0.
    """
    ends = "; ".join(
        f"{panel}, {name}: {number(points[-1][1])}" for panel, found in over.items() for name, points in found.items() if points
    )
    with canvas(prefix, 3.2 * len(over) + 2.6, 3.4, len(over), alt=f"{y} over {x}, at the end: {ends}") as drawn:
        for axes, (panel, found) in zip(drawn.axes, over.items(), strict=True):
            if zero:
                axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            for index, (name, points) in enumerate(found.items()):
                color, marker = series(index)
                spread = max(1, len(points) // 8)
                style = "-" if index < 8 else "--"  # colours and markers come round again after eight
                axes.plot(
                    *zip(*points, strict=True), style, marker=marker, markevery=spread, color=color, markersize=4, label=name
                )
            axes.set_title(panel)
            axes.set_xlabel(x)
        drawn.axes[0].set_ylabel(y)
        for text in drawn.axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5)).get_texts():
            text.set_color(MUTED)
    return drawn.svg
