"""Figures as inline SVG that follows the page's colours, so that one drawing serves light, dark and paper."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ACCENT", "GRID", "INK", "MARKERS", "MUTED", "SURFACE", "Canvas", "canvas", "encoded", "series"]

# matplotlib draws with these placeholders; the SVG gets the page's CSS variables in their place.
INK, MUTED, GRID, SURFACE, ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
_SERIES = tuple(f"#1010{index:02d}" for index in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", ACCENT: "--accent"} | {
    color: f"--series-{index}" for index, color in enumerate(_SERIES)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # colour is never the only difference between two methods
_FONT = "DejaVu Sans"


def series(index: int) -> tuple[str, str]:
    """Colour and marker of the index-th method."""
    return _SERIES[index % len(_SERIES)], MARKERS[index % len(MARKERS)]


@dataclass
class Canvas:
    """A figure being drawn; `svg` holds the result after the `canvas` block has ended."""

    figure: "Figure"
    axes: Sequence["Axes"]
    svg: str = ""


@contextmanager
def canvas(prefix: str, width: float, height: float, columns: int = 1, *, alt: str, share_y: bool = False) -> Iterator[Canvas]:
    """Draw one row of `columns` axes.

    Args:
        prefix: unique on the page; starts every id inside the SVG.
        width, height: inches.
        columns: number of axes.
        alt: what the picture shows, in words.
        share_y: one vertical scale for all axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(prefix)):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(1, columns, squeeze=False, sharey=share_y)
        drawn = Canvas(figure, list(grid[0]))
        yield drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    drawn.svg = _inline(buffer.getvalue(), prefix, alt)


def encoded(figure: "Figure", kind: str = "png", dpi: int = 150) -> bytes:
    """A figure on white as the bytes of a file, "png" or "svg"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def _style(salt: str) -> Any:  # matplotlib 3.11 types the keys one by one, older versions do not
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": _FONT,
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.color": GRID,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
    }


def _inline(document: str, prefix: str, alt: str) -> str:
    """Cut an SVG file down to an element of an HTML page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
    svg = re.sub(rf"font: ([\d.]+px) '{_FONT}'", r"font-size: \1", svg)  # the family is inherited from the page
    svg = svg.replace(f" font-family: '{_FONT}';", "")
    svg = re.sub("|".join(_VARIABLES), lambda found: f"var({_VARIABLES[found[0]]})", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|<g/>', "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
