"""How results of attnkit.kv.memory/1 are drawn: what caches weigh."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnkit._core.errors import MissingExtra
from attnkit._core.lazy import require
from attnkit.report.files import write_bytes
from attnkit.report.page import Figure, Section, SectionSpec, Table
from attnkit.report.plots import ACCENT, INK, MUTED, canvas, encoded
from attnkit.report.tables import ABSENT, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SPEC", "save"]

Row = Mapping[str, Any]
_WIDTH = 8.2
_LABEL = 36  # letters
_DASHED: Any = (0, (4, 3))


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.kv.memory/1 -> section."""
    facts = [(name, str(document[name])) for name in ("model", "text", "length", "device", "dtype")]
    headers = ["method", "promised", "tokens kept", "KV MiB", "of dense", "held MiB", "peak MiB"]
    rows = document["rows"]
    cells = [
        [
            row["method"],
            f"{1 - row['ratio']:.3f}" if row["ratio"] is not None else ABSENT,
            f"{row['tokens']:.3f}" if row["tokens"] is not None else ABSENT,
            number(row["kv_mib"], 4),
            f"{row['of_dense']:.3f}",
            number(row["held_mib"], 4),
            number(row["peak_mib"], 4),
        ]
        for row in rows
    ]
    note = (
        "Promised: 1 - ratio. Tokens kept: mean share of the context that a head stores. KV MiB: all tensors of the cache. "
        "Held: in use when the context was read, beyond before, as the allocator counts. Peak: the largest such meanwhile."
    )
    figure = Figure(
        "Bytes of the cache",
        lambda prefix: _inline(prefix, rows),
        "Held in tensors: KV MiB. Dashed: dense. Promised: (1 - ratio) of it.",
    )
    return Section("Memory of the cache", facts, [Table("Memory", headers, cells, note), figure])


def save(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `memory.png`, whole or not at all; nothing where matplotlib is missing."""
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(_WIDTH, _height(document["rows"])), layout="constrained")
    _bars(picture.subplots(), document["rows"], "#1f77b4", "#555555", "#000000")
    write_bytes(folder / "memory.png", encoded(picture))


def _inline(prefix: str, rows: Sequence[Row]) -> str:
    facts = "; ".join(
        f"{row['method']}: {number(row['kv_mib'], 4)} MiB"
        + (f" of {number(promised, 4)} promised" if (promised := _promised(row, rows)) is not None else "")
        for row in rows
    )
    with canvas(prefix, _WIDTH, _height(rows), alt=f"Bytes of the cache. {facts}") as drawn:
        _bars(drawn.axes[0], rows, ACCENT, MUTED, INK)
    return drawn.svg


def _bars(axes: "Axes", rows: Sequence[Row], color: str, muted: str, ink: str) -> None:
    """For each method what its cache holds, and what the ratio promises."""
    pressed = [(place, promised) for place, row in enumerate(rows) if (promised := _promised(row, rows)) is not None]
    held = [row["kv_mib"] for row in rows]
    axes.barh([place - 0.19 for place in range(len(rows))], held, height=0.36, color=color, label="held in tensors")
    if pressed:
        places, promises = zip(*pressed, strict=True)
        axes.barh([place + 0.19 for place in places], promises, height=0.36, color=muted, alpha=0.45, label="promised")
    axes.axvline(rows[0]["kv_mib"], color=muted, linewidth=1, linestyle=_DASHED, label="dense")
    axes.set_yticks(range(len(rows)), [_short(row["method"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("KV cache, MiB")
    axes.grid(visible=False, axis="y")
    for text in axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False).get_texts():
        text.set_color(ink)


def _promised(row: Row, rows: Sequence[Row]) -> float | None:
    """MiB that the ratio leaves of dense, which comes first."""
    return None if row["ratio"] is None else float((1 - row["ratio"]) * rows[0]["kv_mib"])


def _short(name: str) -> str:
    """Names may hold paths of files, which would leave no room for bars."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL // 2]}…{name[-_LABEL // 2 :]}"


def _height(rows: Sequence[Row]) -> float:
    return max(2.4, 0.9 + 0.42 * len(rows))


SPEC = SectionSpec(_draw, ("method", "ratio", "tokens", "kv_mib", "of_dense", "held_mib", "peak_mib"))
