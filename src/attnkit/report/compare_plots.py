"""The figures of a comparison."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnkit.report.compare_results import Results, Row
from attnkit.report.plots import ACCENT, INK, MUTED, SURFACE, canvas, series
from attnkit.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COSTS", "depths", "losses", "retrieval", "tradeoff"]

_WIDTH = 8.2
_PANELS = 4  # lengths side by side; more would be too narrow to read
COSTS = {"prefill_s": "prefill, s", "kv_mib": "KV cache, MiB"}
_DASHED = (0, (4, 3))


def losses(prefix: str, results: Results) -> str:
    """Loss of every method with its 95 % interval, one panel a length."""
    lengths = results.lengths[-_PANELS:]
    height = 0.85 + 0.28 * len(results.methods)
    facts = "; ".join(f"{row['method']} at {row['length']}: {number(row['loss'], 4)}" for row in results.rows.values())
    with canvas(prefix, _WIDTH, height, len(lengths), alt=f"Loss by method. {facts}", share_y=True) as drawn:
        for axes, length in zip(drawn.axes, lengths, strict=True):
            base = results.rows.get((results.baseline, length))
            if base is not None and base["loss"] is not None:
                axes.axvline(base["loss"], color=MUTED, linewidth=1, linestyle=_DASHED)
            for place, method in enumerate(results.methods):
                row = results.rows.get((method, length))
                if row is not None and row["loss"] is not None:
                    _whisker(axes, row, place)
            axes.set_title(f"{number(length)} tokens")
            axes.set_xlabel("loss, nats per token")
            axes.locator_params(axis="x", nbins=4)
            axes.margins(x=0.12)
            axes.set_ylim(len(results.methods) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        drawn.axes[0].set_yticks(range(len(results.methods)), results.methods)
    return drawn.svg


def _whisker(axes: "Axes", row: Row, place: int) -> None:
    color, marker = series(place)
    if row.get("loss_low") is not None and row.get("loss_high") is not None:
        axes.plot(
            [row["loss_low"], row["loss_high"]], [place, place], color=color, linewidth=5, alpha=0.35, solid_capstyle="round"
        )
    axes.plot(row["loss"], place, marker, color=color, markersize=6.5, markeredgecolor=SURFACE, markeredgewidth=0.8)


def depths(prefix: str, results: Results) -> str:
    """Share of pass-keys found, depth in the text x method, one panel a length."""
    lengths = [length for length in results.lengths if any(map(_keys, results.at(length)))][-_PANELS:]
    height = 1.0 + 0.3 * len(results.methods)
    missed = sum(not trial["hit"] for row in results.rows.values() for trial in _keys(row))
    alt = f"Heat map of pass-keys found by depth and method; {missed} trials missed in all."
    with canvas(prefix, _WIDTH, height, len(lengths), alt=alt, share_y=True) as drawn:
        for axes, length in zip(drawn.axes, lengths, strict=True):
            _heat(axes, [results.rows.get((method, length)) for method in results.methods])
            axes.set_title(f"{number(length)} tokens")
            axes.set_xlabel("depth of the key, %")
        drawn.axes[0].set_yticks(range(len(results.methods)), results.methods)
    return drawn.svg


def _keys(row: Row) -> list[Row]:
    """Trials of pass-keys."""
    return [trial for trial in row.get("trials") or () if trial.get("task", "needle") == "needle"]


def _heat(axes: "Axes", rows: Sequence[Row | None]) -> None:
    found: list[dict[float, list[bool]]] = []
    for row in rows:
        hits: dict[float, list[bool]] = defaultdict(list)
        for trial in _keys(row) if row is not None else ():
            hits[trial["depth"]].append(bool(trial["hit"]))
        found.append(hits)
    columns = sorted({depth for hits in found for depth in hits})
    for place, hits in enumerate(found):
        for column, depth in enumerate(columns):
            trials = hits.get(depth)
            share = sum(trials) / len(trials) if trials else 0.0
            # the fill's opacity carries the share, so that empty cells take the page's own background
            axes.barh(
                place,
                0.92,
                left=column - 0.46,
                height=0.86,
                color=ACCENT,
                alpha=0.06 + 0.84 * share,
                linewidth=0,
                clip_on=False,
            )
            if trials:
                color = SURFACE if share > 0.6 else INK
                axes.text(column, place, f"{sum(trials)}/{len(trials)}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{100 * depth:.0f}" for depth in columns])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def retrieval(prefix: str, results: Results) -> str:
    """Share of pass-keys found over length, one line a method."""
    facts = "; ".join(
        f"{row['method']} at {row['length']}: {row['passkey_hits']}/{row['passkey_trials']}" for row in results.rows.values()
    )
    with canvas(prefix, _WIDTH, _beside_legend(len(results.methods)), alt=f"Pass-keys found by length. {facts}") as drawn:
        axes = drawn.axes[0]
        for place, method in enumerate(results.methods):
            rows = [results.rows[method, length] for length in results.lengths if (method, length) in results.rows]
            rows = [row for row in rows if row["passkey_trials"]]
            color, marker = series(place)
            shift = 1.025 ** (place - (len(results.methods) - 1) / 2)  # equal values stay visible side by side
            xs = [shift * row["length"] for row in rows]
            for x, row in zip(xs, rows, strict=True):
                if row.get("passkey_low") is not None and row.get("passkey_high") is not None:
                    axes.plot(
                        [x, x], [100 * row["passkey_low"], 100 * row["passkey_high"]], color=color, linewidth=4, alpha=0.3
                    )
            line: Any = _DASHED if method == results.baseline else "solid"
            shares = [100 * row["passkey_hits"] / row["passkey_trials"] for row in rows]
            axes.plot(
                xs, shares, marker=marker, color=color, linestyle=line, label=method, markeredgecolor=SURFACE, markersize=7
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(results.lengths, [number(length) for length in results.lengths])
        axes.minorticks_off()
        axes.set_ylim(-4, 104)
        axes.set_xlabel("tokens")
        axes.set_ylabel("pass-keys found, %")
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)
        for text in legend.get_texts():
            text.set_color(INK)
    return drawn.svg


def tradeoff(prefix: str, rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Loss against prefill time and against KV memory, one point a method."""
    costs = [(field, label) for field, label in COSTS.items() if any(row[field] is not None for row in rows)]
    facts = "; ".join(
        f"{row['method']}: loss {number(row['loss'], 4)}, prefill {number(row['prefill_s'])} s, KV {number(row['kv_mib'])} MiB"
        for row in rows
    )
    with canvas(
        prefix, _WIDTH, _beside_legend(len(rows)), len(costs), alt=f"Loss against cost. {facts}", share_y=True
    ) as drawn:
        for axes, (field, label) in zip(drawn.axes, costs, strict=True):
            for row in rows:
                if row[field] is None:
                    continue
                color, marker = series(methods.index(row["method"]))
                axes.plot(
                    row[field], row["loss"], marker, color=color, markersize=9, markeredgecolor=SURFACE, label=row["method"]
                )
            axes.set_xlabel(label)
            axes.margins(0.14)
            axes.locator_params(nbins=6)
            axes.tick_params(axis="y", labelcolor=MUTED)
        drawn.axes[0].set_ylabel("loss, nats per token")
        legend = drawn.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for text in legend.get_texts():
            text.set_color(INK)
    return drawn.svg


def _beside_legend(entries: int) -> float:
    """Height in inches of a figure with a legend of so many entries at its side."""
    return max(3.2, 0.8 + 0.2 * entries)
