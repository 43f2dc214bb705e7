"""Compressed caches of a comparison: a leaderboard, curves over the ratio, and what heads keep."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnkit._core.errors import MissingExtra
from attnkit._core.lazy import require
from attnkit.report import presses_plots as plots
from attnkit.report.compare_results import Results, Row, asked
from attnkit.report.files import write_bytes, write_text
from attnkit.report.page import Block, Figure, Table
from attnkit.report.tables import ABSENT, interval, number

__all__ = ["TITLE", "blocks", "save"]

TITLE = "Compressed caches"
_COLUMNS = (
    "length", "method", "press", "ratio", "codec", "passkey_hits", "passkey_trials", "passkey_low", "passkey_high", "loss",
    "loss_low", "loss_high", "agreement", "kl", "kv_mib", "peak_mib", "prefill_s", "decode_tok_s",
)  # fmt: skip
_MAPS = 4  # heat maps side by side


def blocks(results: Results) -> list[Block]:
    """What a page says of presses; nothing where none ran."""
    pressed = [row for row in results.rows.values() if row.get("press") or row.get("codec")]
    if not pressed:
        return []
    found: list[Block] = [_leaderboard(results)]
    length = results.lengths[-1]
    last = [row for row in results.at(length) if row.get("press") or row.get("codec")]
    where = f"{number(length)} tokens."
    if last:
        note = (
            f"{where} Ratio: the fraction that a press is asked to remove. Dashed: dense; for memory, what the ratio promises."
        )
        found.append(Figure("Over the ratio", lambda prefix: plots.curves(prefix, results, length), note))
    maps = _strongest([row for row in last if row.get("kept")])
    uneven = [row for row in maps if len({round(share, 3) for layer in row["kept"]["heads"] for share in layer}) > 1][:_MAPS]
    if uneven:
        note = f"{where} Share of the context that each key head stores: pale is nothing, full is everything."
        found.append(Figure("What each head keeps", lambda prefix: plots.heads(prefix, uneven), note))
    if maps:
        note = f"{where} Share of the heads that keep each part of the context, from its beginning on the left to its end."
        shown = (uneven or maps)[:_MAPS]
        found.append(Figure("Where kept tokens lie", lambda prefix: plots.places(prefix, shown), note))
    return found


def _strongest(rows: list[Row]) -> list[Row]:
    """Of each press the row with the largest ratio."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["press"] not in best or row["ratio"] > best[row["press"]]["ratio"]:
            best[row["press"]] = row
    return list(best.values())


def _leaderboard(results: Results) -> Table:
    headers = [
        "length",
        "press",
        "ratio",
        "pass-keys (95 %)",
        *results.tasks,
        "loss",
        "KV MiB",
        "of dense",
        "peak MiB",
        "tok/s",
    ]
    cells = []
    for length in results.lengths:
        rows = [row for row in results.at(length) if row.get("press") or row.get("codec")]
        base = results.rows.get((results.baseline, length))
        rows.sort(key=lambda row: (row["ratio"] or 0.0, -_score(row, results.tasks)))
        for row in [*([base] if base is not None else []), *rows]:
            share = row["kv_mib"] / base["kv_mib"] if base is not None and row["kv_mib"] and base["kv_mib"] else None
            cells.append(
                [
                    number(length),
                    row["method"].rpartition("@")[0] or row["method"],
                    f"{row['ratio']:.2f}" if row.get("ratio") is not None else ABSENT,
                    _keys(row),
                    *(_right(row, task) for task in results.tasks),
                    interval(row["loss"], None, None, 3),
                    number(row["kv_mib"]),
                    f"{share:.2f}" if share is not None else ABSENT,
                    number(row["peak_mib"]),
                    number(row["decode_tok_s"]),
                ]
            )
    note = (
        "Ratio: the fraction that a press is asked to remove. KV MiB: memory behind the cache as it is stored. Peak MiB: the "
        "largest memory while the context is read and pressed. Best first within a ratio."
    )
    return Table(TITLE, headers, cells, note, grouped=True)


def _score(row: Row, tasks: Sequence[str]) -> float:
    """Right answers first, the loss breaks ties."""
    keys = row["passkey_hits"] / row["passkey_trials"] if row["passkey_trials"] else 0.0
    others = sum(found["hits"] / found["trials"] for task in tasks if (found := asked(row, task)) is not None)
    return float(keys + others - 1e-3 * (row["loss"] or 0.0))


def _right(row: Row, task: str) -> str:
    found = asked(row, task)
    return ABSENT if found is None else f"{found['hits']}/{found['trials']}"


def _keys(row: Row) -> str:
    if not row["passkey_trials"]:
        return ABSENT
    hits = f"{row['passkey_hits']}/{row['passkey_trials']}"
    return f"{hits} ({100 * row['passkey_low']:.0f}-{100 * row['passkey_high']:.0f} %)"


def save(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """Write `results.csv` and, where matplotlib is installed, `curves.png` of the longest context; returns their paths."""
    text, results = io.StringIO(), Results.of(document["rows"])
    more = [f"{task}_{name}" for task in results.tasks for name in ("hits", "trials", "low", "high")]
    table = csv.DictWriter(text, (*_COLUMNS, *more), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in document["rows"]:
        asked_for = {f"{task}_{name}": value for task in results.tasks for name, value in (asked(row, task) or {}).items()}
        table.writerow({**row, **asked_for})
    write_text(folder / "results.csv", text.getvalue())
    written = [folder / "results.csv"]
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return written
    write_bytes(folder / "curves.png", plots.printed(results, results.lengths[-1]))
    return [*written, folder / "curves.png"]
