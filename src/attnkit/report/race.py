"""How results of attnkit.race/1 are drawn: our operators against their peers, interleaved in one process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.plots import INK, MUTED, canvas, series
from attnkit.report.tables import ABSENT, TIMES, number

__all__ = ["SPEC"]

Row = Mapping[str, Any]
_SHOWN = 40  # beyond that the plot is a wall of dots; the table has every row


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.race/1 -> section."""
    rows = document["rows"]
    if not rows:
        return Section("Race", (), (), ["No race was run."])
    what = _identity(rows)
    common = {name: texts[0] for name, texts in what.items() if len(set(texts)) == 1 and name != "peer"}
    varying = {name: texts for name, texts in what.items() if name not in common}
    labels = [" ".join(parts) for parts in zip(*(texts for name, texts in varying.items() if name != "peer"), strict=True)]
    note = "Right of the line ours is faster."
    if len(rows) > _SHOWN:
        note += f" The first {_SHOWN} of {len(rows)} rows; the table has all."
    blocks: list[Block] = [
        Figure("Peer time / our time", lambda prefix: _ratios(prefix, rows[:_SHOWN], labels or [""] * len(rows)), note),
        _table(rows, varying),
    ]
    facts = [("device", str(document.get("device", ABSENT))), *common.items()]
    return Section(f"Race: {', '.join(dict.fromkeys(what['op']))}", facts, blocks, _lead(rows))


def _identity(rows: Sequence[Row]) -> dict[str, list[str]]:
    shapes = [" ".join(f"{name}={value}" for name, value in row["shape"].items()) for row in rows]
    fields = {name: [str(row[name]) for row in rows] for name in ("op", "pass", "dtype", "peer")}
    return {"op": fields["op"], "pass": fields["pass"], "shape": shapes, "dtype": fields["dtype"], "peer": fields["peer"]}


def _lead(rows: Sequence[Row]) -> list[str]:
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["peer"] == peer]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        won = sum(ratio > 1 for ratio in ratios)
        lines.append(f"Against {peer}: faster in {won} of {len(ratios)} races, {mean:.2f}{TIMES} in the geometric mean.")
    return lines


def _table(rows: Sequence[Row], varying: Mapping[str, Sequence[str]]) -> Table:
    headers = [*varying, "ours ms", "peer ms", "peer / ours", "spread", "first call s", "MiB, ours / peer"]
    cells = [
        [
            *(texts[index] for texts in varying.values()),
            number(row["ours_ms"]),
            number(row["peer_ms"]),
            f"{row['ratio']:.2f} {'▲' if row['ratio'] > 1 else '▼'}",
            number(row.get("spread")),
            number(row.get("first_call_s")),
            f"{number(row.get('peak_mib'))} / {number(row.get('peer_peak_mib'))}",
        ]
        for index, row in enumerate(rows)
    ]
    return Table(
        "Every race",
        headers,
        cells,
        "▲ ours is faster, ▼ the peer is. Times are medians; spread is relative; MiB is peak memory.",
    )


def _ratios(prefix: str, rows: Sequence[Row], labels: Sequence[str]) -> str:
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    facts = "; ".join(f"{label} against {row['peer']}: {row['ratio']:.2f}" for label, row in zip(labels, rows, strict=False))
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
        low, high = min(1.0, *(row["ratio"] for row in rows)), max(1.0, *(row["ratio"] for row in rows))
        ticks = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high * 1.2)) + 1)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks])
        axes.set_xlim(low / 1.2, high * 1.2)
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), list(labels)[: len(rows)])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        for index, peer in enumerate(peers):
            color, marker = series(index)
            axes.plot([], [], marker, color=color, label=peer)
        for text in axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4).get_texts():
            text.set_color(MUTED)
    return drawn.svg


SPEC = SectionSpec(_draw, ("op", "shape", "dtype", "pass", "peer", "ours_ms", "peer_ms", "ratio"))
