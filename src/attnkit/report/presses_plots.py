"""The figures of compressed caches."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attnkit.report.compare_results import Results, Row, asked
from attnkit.report.plots import INK, MARKERS, MUTED, canvas, encoded, series
from attnkit.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["curves", "heads", "places", "printed"]

_WIDTH = 8.2
_PRINTED = ("#1f77b4", "#d95f02", "#2ca02c", "#7570b3", "#e7298a", "#a6761d", "#666666", "#17becf")  # on white paper
_MAP = (0x3B / 255, 0x82 / 255, 0xC4 / 255)  # seen on light and on dark pages
_DASHED: Any = (0, (4, 3))


def curves(prefix: str, results: Results, length: int) -> str:
    """Answers, loss and memory over the ratio at one length, a line each press."""
    facts = "; ".join(
        f"{row['method']}: keys {row['passkey_hits']}/{row['passkey_trials']}, loss {number(row['loss'], 4)}, "
        f"KV {number(row['kv_mib'])} MiB"
        for row in results.at(length)
        if row.get("press") or row.get("codec")
    )
    lines = _lines(results, length)
    height = max(3.0, 0.8 + 0.2 * len(lines))
    panels = _panels(results, length)
    with canvas(prefix, _width(panels), height, len(panels), alt=f"Presses over the ratio. {facts}") as drawn:
        _draw(drawn.axes, panels, lines, results, length, lambda index: series(index)[0], MUTED)
        for text in drawn.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7).get_texts():
            text.set_color(INK)
    return drawn.svg


def printed(results: Results, length: int) -> bytes:
    """The same curves as a PNG on white."""
    from matplotlib.figure import Figure

    panels, lines = _panels(results, length), _lines(results, length)
    figure = Figure(figsize=(_width(panels), max(3.0, 0.8 + 0.2 * len(lines))), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    _draw(axes, panels, lines, results, length, lambda index: _PRINTED[index % len(_PRINTED)], "#555555")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    return encoded(figure)


def heads(prefix: str, rows: Sequence[Row]) -> str:
    """Layers x key heads, one panel a press."""
    alt = "; ".join(f"{row['method']}: {_range(row['kept']['heads'])}" for row in rows)
    return _maps(prefix, rows, "heads", "key head", f"Share of tokens that heads keep. {alt}")


def places(prefix: str, rows: Sequence[Row]) -> str:
    """Layers x parts of the context, one panel a press."""
    alt = "; ".join(f"{row['method']}: {_range(row['kept']['places'])}" for row in rows)
    return _maps(prefix, rows, "places", "part of the context", f"Share of heads that keep each part of the context. {alt}")


def _range(shares: Sequence[Sequence[float]]) -> str:
    every = [share for layer in shares for share in layer]
    return f"{100 * min(every):.0f} to {100 * max(every):.0f} %"


def _maps(prefix: str, rows: Sequence[Row], field: str, label: str, alt: str) -> str:
    import numpy as np

    with canvas(prefix, _WIDTH, 3.4, len(rows), alt=alt, share_y=True) as drawn:
        for axes, row in zip(drawn.axes, rows, strict=True):
            shares = np.asarray(row["kept"][field], dtype=float)
            colors = np.empty((*shares.shape, 4))
            colors[..., :3] = _MAP
            colors[..., 3] = 0.06 + 0.94 * shares.clip(0.0, 1.0)  # opacity, so that empty cells take the page's background
            axes.imshow(colors, aspect="auto", interpolation="nearest")
            axes.set_title(row["method"], fontsize=7)
            axes.set_xlabel(label)
            axes.grid(visible=False)
            axes.locator_params(axis="x", nbins=4, integer=True)
        drawn.axes[0].set_ylabel("layer")
    return drawn.svg


Panel = tuple[str, Callable[[Row], float | None]]


def _width(panels: Sequence[Panel]) -> float:
    """Inches, with a legend at the side."""
    return 2 + max(_WIDTH, 2.7 * len(panels))


def _panels(results: Results, length: int) -> list[Panel]:
    """Those that have something to show."""
    base = results.rows.get((results.baseline, length))
    dense = None if base is None else base["kv_mib"]
    panels: list[Panel] = [
        (
            "pass-keys found, %",
            lambda row: 100 * row["passkey_hits"] / row["passkey_trials"] if row["passkey_trials"] else None,
        ),
        *((f"{task}, right answers, %", partial(_share, task)) for task in results.tasks),
        ("loss, nats per token", lambda row: row["loss"]),
        ("KV memory, of dense", lambda row: row["kv_mib"] / dense if dense and row["kv_mib"] else None),
    ]
    return [panel for panel in panels if any(panel[1](row) is not None for row in results.at(length))]


def _share(task: str, row: Row) -> float | None:
    found = asked(row, task)
    return None if found is None else 100 * found["hits"] / found["trials"]


def _lines(results: Results, length: int) -> dict[str, list[Row]]:
    """Press with its codec -> rows by ratio; dense in the same codec stands at 0."""
    lines: dict[str, list[Row]] = defaultdict(list)
    rows = results.at(length)
    for row in rows:
        if row.get("press"):
            lines[row["method"].rpartition("@")[0]].append(row)
    for line in lines.values():
        codec = line[0].get("codec")
        line += [
            row for row in rows if not row.get("press") and row["method"].startswith("dense") and row.get("codec") == codec
        ]
        line.sort(key=lambda row: row["ratio"] or 0.0)
    if not lines:
        lines = defaultdict(list, {row["method"]: [row] for row in rows if row.get("codec")})
    return dict(lines)


def _draw(
    every: Sequence["Axes"],
    panels: Sequence[Panel],
    lines: dict[str, list[Row]],
    results: Results,
    length: int,
    color: Callable[[int], str],
    muted: str,
) -> None:
    base = results.rows.get((results.baseline, length))
    for axes, (label, value) in zip(every, panels, strict=True):
        if label.startswith("KV"):
            axes.plot([0, 1], [1, 0], color=muted, linewidth=1, linestyle=_DASHED)
        elif base is not None and (level := value(base)) is not None:
            axes.axhline(level, color=muted, linewidth=1, linestyle=_DASHED)
        for index, (name, rows) in enumerate(lines.items()):
            points = [(row["ratio"] or 0.0, value(row)) for row in rows if value(row) is not None]
            style = "-" if index < len(_PRINTED) else "--"  # colours and markers come round again
            marker = MARKERS[index % len(MARKERS)]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, style, marker=marker, markersize=5, color=color(index), linewidth=1.2, label=name)
        axes.set_xlabel("ratio removed")
        axes.set_ylabel(label)
        axes.set_xlim(-0.04, 1.0)
