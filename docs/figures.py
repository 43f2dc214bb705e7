"""Draws the pictures of the documentation from real objects: python docs/figures.py rewrites docs/figures/*.svg."""

import itertools
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from attnkit.ops._attention_core.plan import Plan

FOLDER = Path(__file__).parent / "figures"
FULL, SEEN, WALKED, KEY, EDGE = "#2b6cb0", "#90bde8", "#e8edf3", "#c05621", "#4a5568"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "attnkit", "font.family": "sans-serif", "font.size": 8.5}


def plans() -> dict[str, Plan]:
    """Title -> a plan with tiles of four rows."""
    boundaries = torch.tensor([0, 5, 7, 16], dtype=torch.int32)
    return {
        "causal, 12 queries on 16 keys": Plan.causal(12, 16, block_q=4),
        "window_size=(5, 0)": Plan.window(16, 16, 5, 0, block_q=4),
        "packed 5 + 2 + 9 tokens, causal": Plan.varlen(boundaries, boundaries, 16, 16, right=0, block_q=4),
        "q_pos = 1 2 6 7 11 14": Plan.rows(torch.tensor([1, 2, 6, 7, 11, 14]), 16, block_q=4),
    }


def core() -> Figure:
    """Four plans as tiles, then what happens to one tile."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9), facecolor="white")
        place = {"left": 0.045, "right": 0.995, "top": 0.84, "bottom": 0.01}
        grid = figure.add_gridspec(2, 4, height_ratios=[4, 2], hspace=0.4, wspace=0.14, **place)
        for column, (title, plan) in enumerate(plans().items()):
            _draw_plan(figure.add_subplot(grid[0, column]), title, plan)
        _draw_norm(figure.add_subplot(grid[1, :]))
        legend = {
            "full part: no mask": FULL,
            "masked part: seen": SEEN,
            "masked part: walked over, not seen": WALKED,
            "the key a row stands on (q_pos)": KEY,
        }
        figure.legend(
            handles=[Patch(facecolor=colour, edgecolor=EDGE, label=label) for label, colour in legend.items()],
            loc="upper center",
            ncols=4,
            frameon=False,
        )
    return figure


def _draw_plan(axes: Axes, title: str, plan: Plan) -> None:
    seen = plan.to_dense_mask()
    for (first, count), (lo, full_lo, full_hi, hi) in zip(plan.tiles.tolist(), plan.bounds.tolist(), strict=True):
        for row in range(first, first + count):
            colours = [FULL if full_lo <= key < full_hi else SEEN if seen[row, key] else WALKED for key in range(lo, hi)]
            for colour, run in itertools.groupby(enumerate(colours, lo), key=lambda cell: cell[1]):
                keys = [key for key, _ in run]
                axes.add_patch(Rectangle((keys[0], row), len(keys), 1, facecolor=colour, edgecolor="white", linewidth=0.6))
        if count:
            axes.add_patch(Rectangle((lo, first), hi - lo, count, fill=False, edgecolor=EDGE, linewidth=1.1))
    for row, key in enumerate(plan.q_pos.tolist()):
        axes.plot(key + 0.5, row + 0.5, marker="o", markersize=3, color=KEY)
    axes.set(xlim=(-0.3, 16.3), ylim=(16.3, -0.3), aspect="equal", anchor="W")  # one scale for all four
    axes.set_xticks(range(0, plan.num_k + 1, 4))
    axes.set_yticks(range(0, plan.num_q + 1, 4))
    axes.set_xlabel("keys")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("rows of queries")
    axes.set_title(f"{title}\n{int(seen.sum())} pairs seen, {plan.pairs()} walked over", fontsize=8.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_norm(axes: Axes) -> None:
    """One tile of the window: three runs of keys, each a partial result, merged by their LSE and rounded once."""
    plan = plans()["window_size=(5, 0)"]
    tile = 2
    first, count = plan.tiles[tile].tolist()
    lo, full_lo, full_hi, hi = plan.bounds[tile].tolist()
    axes.set(xlim=(-0.2, 100.2), ylim=(0, 26))
    axes.axis("off")
    axes.text(0, 24, f"norm: what happens to the tile of rows {first}..{first + count - 1} of the window", fontsize=8.5)
    runs = ((lo, full_lo, SEEN, "masked"), (full_lo, full_hi, FULL, "full"), (full_hi, hi, SEEN, "masked"))
    for index, (start, stop, colour, kind) in enumerate(runs):
        bottom = 15 - 7 * index
        _box(axes, 0, bottom, 22, f"keys {start}..{stop - 1}, {kind}", colour)
        _arrow(axes, 22, bottom + 2.5, 28)
        _box(axes, 28, bottom, 24, "partial (out, lse) in fp32", "white")
        _arrow(axes, 52, bottom + 2.5, 60, 10.5)
    _box(axes, 60, 8, 16, "merge by lse", "white")
    _arrow(axes, 76, 10.5, 82)
    _box(axes, 82, 8, 18, "one rounding: out", "white")


def _box(axes: Axes, left: float, bottom: float, width: float, text: str, colour: str) -> None:
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(FancyBboxPatch((left, bottom), width, 5, boxstyle=style, facecolor=colour, edgecolor=EDGE, linewidth=0.9))
    ink = "white" if colour == FULL else "black"
    axes.text(left + width / 2, bottom + 2.5, text, ha="center", va="center", color=ink)


def _arrow(axes: Axes, start: float, height: float, end: float, end_height: float | None = None) -> None:
    target = (end, height if end_height is None else end_height)
    axes.add_patch(FancyArrowPatch((start, height), target, arrowstyle="-|>", mutation_scale=8, color=EDGE, linewidth=0.9))


FIGURES = {"core.svg": core}


def write(folder: Path) -> None:
    """Draw every figure into a folder; dates and versions stay out, so that equal pictures are equal files."""
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        with mpl.rc_context(STYLE):
            draw().savefig(folder / name, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    write(FOLDER)
