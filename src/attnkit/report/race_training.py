"""What a race of training shows besides: tokens a second and the losses of both sides, for each form of the data."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure
from attnkit.report.plots import INK, MUTED, canvas, series
from attnkit.report.race_plots import OWN
from attnkit.report.tables import ABSENT, TIMES, number

__all__ = ["figures", "lead"]

Row = Mapping[str, Any]


def lead(rows: Sequence[Row]) -> list[str]:
    """One sentence a row: how fast, in how much memory, and how far the losses are apart.

    Args:
        rows: of a race of training.
    """
    return [
        f"{_form(row)}: {number(row['tokens_s'])} tokens a second, {row['peer']} {number(row['peer_tokens_s'])} "
        f"({row['ratio']:.2f}{TIMES}); peak memory {_mib(row['peak_mib'])}, {row['peer']} {_mib(row['peer_peak_mib'])}; "
        f"over {len(row['losses'])} steps the losses are at most {number(row['loss_difference'], 2)} apart (relative)."
        for row in rows
    ]


def figures(rows: Sequence[Row]) -> list[Block]:
    """The pictures; none where nothing was trained.

    Args:
        rows: of a race of training.
    """
    if not rows:
        return []
    return [
        Figure("Tokens a second", lambda prefix: _bars(prefix, rows), "Real tokens; medians of the rounds."),
        Figure("Losses", lambda prefix: _curves(prefix, rows), "Both sides begin with the same weights."),
    ]


def _bars(prefix: str, rows: Sequence[Row]) -> str:
    facts = "; ".join(
        f"{_form(row)}: {OWN} {number(row['tokens_s'])}, {row['peer']} {number(row['peer_tokens_s'])}" for row in rows
    )
    with canvas(prefix, 7.2, 1.0 + 0.7 * len(rows), alt=f"Tokens a second. {facts}") as drawn:
        axes = drawn.axes[0]
        for side, (name, key) in enumerate(((OWN, "tokens_s"), (rows[0]["peer"], "peer_tokens_s"))):
            places, speeds = [index + 0.38 * (side - 0.5) for index in range(len(rows))], [row[key] for row in rows]
            axes.barh(places, speeds, 0.34, color=series(side)[0], label=name)
            for place, speed in zip(places, speeds, strict=True):
                axes.annotate(number(speed), (speed, place), (4, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(range(len(rows)), [_form(row) for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens a second")
        for text in axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2).get_texts():
            text.set_color(MUTED)
    return drawn.svg


def _curves(prefix: str, rows: Sequence[Row]) -> str:
    facts = "; ".join(f"{_form(row)}: {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}" for row in rows)
    with canvas(prefix, max(4.2, 3.6 * len(rows)), 3.0, len(rows), alt=f"Losses over steps. {facts}", share_y=True) as drawn:
        for axes, row in zip(drawn.axes, rows, strict=True):
            for side, (name, key, style) in enumerate(((OWN, "losses", "-"), (row["peer"], "peer_losses", "--"))):
                color, marker = series(side)
                axes.plot(
                    range(1, len(row[key]) + 1), row[key], style, color=color, marker=marker, markersize=4 - side, label=name
                )
            axes.set_title(_form(row))
            axes.set_xlabel("step")
        drawn.axes[0].set_ylabel("loss, nats a token")
        for text in drawn.axes[0].legend().get_texts():
            text.set_color(MUTED)
    return drawn.svg


def _form(row: Row) -> str:
    return str(row["shape"].get("form", ABSENT))


def _mib(value: float | None) -> str:
    return ABSENT if value is None else f"{number(value)} MiB"
