"""The pictures of a race: ratios over length, or one dot a race where there is one length."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.plots import INK, MUTED, canvas, series
from attnkit.report.tables import TIMES

__all__ = ["OWN", "dots", "over_tokens"]

Row = Mapping[str, Any]
OWN = "attnkit"  # how results name our side


def dots(prefix: str, rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Peer time / our time, one line a race.

    Args:
        prefix: of element ids.
        rows: of the result.
        labels: what each row is, without the peer.
    """
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    facts = "; ".join(f"{label} against {row['peer']}: {row['ratio']:.2f}" for label, row in zip(labels, rows, strict=True))
    with canvas(prefix, 8.2, 0.9 + 0.24 * len(rows), alt=f"Ratio of peer time to our time. {facts}") as drawn:
        axes = drawn.axes[0]
        axes.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for index, row in enumerate(rows):
            color, marker = series(peers.index(row["peer"]))
            right = row["ratio"] >= 1
            axes.plot([1.0, row["ratio"]], [index, index], color=color, linewidth=2.5, solid_capstyle="butt", alpha=0.5)
            axes.plot(row["ratio"], index, marker, color=color, markersize=6)
            axes.annotate(
                f"{row['ratio']:.2f}",
                (row["ratio"], index),
                (8 if right else -8, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                color=INK,
            )
        low, high, ticks = _scale(rows)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks])
        axes.set_xlim(low, high)
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), list(labels))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        for index, peer in enumerate(peers):
            color, marker = series(index)
            axes.plot([], [], marker, color=color, label=peer)
        for text in axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4).get_texts():
            text.set_color(MUTED)
    return drawn.svg


def over_tokens(prefix: str, lines: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Peer time / our time over tokens, one panel a kind of race.

    Args:
        prefix: of element ids.
        lines: panel -> peer -> (tokens, ratio) in rising order.
    """
    peers = list(dict.fromkeys(peer for panel in lines.values() for peer in panel))
    facts = "; ".join(
        f"{panel or 'all'} against {peer}: " + ", ".join(f"{ratio:.2f} at {tokens:,}" for tokens, ratio in points)
        for panel, curves in lines.items()
        for peer, points in curves.items()
    )
    alt = f"Ratio of peer time to our time over tokens. {facts}"
    with canvas(prefix, max(4.2, 2.7 * len(lines)), 3.2, len(lines), alt=alt, share_y=True) as drawn:
        ratios = [{"ratio": ratio} for curves in lines.values() for points in curves.values() for _, ratio in points]
        low, high, ticks = _scale(ratios)
        for axes, (panel, curves) in zip(drawn.axes, lines.items(), strict=True):
            axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            for peer, points in curves.items():
                color, marker = series(peers.index(peer))
                axes.plot(*zip(*points, strict=True), marker=marker, color=color, markersize=5, label=peer)
            axes.set_title(panel)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            tokens = sorted({place for points in curves.values() for place, _ in points})
            axes.set_xticks(tokens, [_short(place) for place in tokens])
            axes.set_yticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks])
            axes.set_ylim(low, high)
            axes.minorticks_off()
        for text in drawn.axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4).get_texts():
            text.set_color(MUTED)
    return drawn.svg


def _scale(rows: Sequence[Row]) -> tuple[float, float, list[float]]:
    """Limits of a ratio's axis, which always shows 1, and its ticks at powers of two."""
    ratios = [1.0, *(row["ratio"] for row in rows)]
    low, high = min(ratios), max(ratios)
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high * 1.2)) + 1)
    return low / 1.2, high * 1.2, [2.0**power for power in powers]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
