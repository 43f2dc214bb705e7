"""Figures and tables of claims as plain data, which result files keep and `attnkit.report.claims` draws."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["heat", "lines", "spread", "table"]

Points = Iterable[tuple[float, Sequence[float]]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """`mean`, `low` and `high` of what the seeds gave, at least one."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def lines(
    title: str,
    x: str,
    y: str,
    over: Mapping[str, Points],
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[float] = (),
    note: str = "",
) -> dict[str, Any]:
    """Lines with their range.

    Args:
        title, x, y, note: what is written.
        over: name of a line -> (x, values of all seeds) pairs; the line is the mean, its band reaches from the least to the
            largest. Points without values are left out.
        log_x, log_y: scales; x in powers of two.
        marks: where a vertical line stands.
    """
    drawn = []
    for name, points in over.items():
        found = [(place, spread(values)) for place, values in points if values]
        entries = [{"x": place, "y": of["mean"], "low": of["low"], "high": of["high"]} for place, of in found]
        drawn.append({"name": name, "points": entries})
    return {
        "kind": "lines", "title": title, "x": x, "y": y, "log_x": log_x, "log_y": log_y, "marks": list(marks),
        "lines": drawn, "note": note,
    }  # fmt: skip


def heat(
    title: str,
    x: str,
    y: str,
    values: Sequence[Sequence[float | None]],
    *,
    quantity: str,
    columns: Sequence[str],
    rows: Sequence[str],
    bounds: tuple[float, float] = (0.0, 1.0),
    digits: int = 3,
    note: str = "",
) -> dict[str, Any]:
    """A heat map.

    Args:
        title, x, y, note: what is written.
        values: [rows][columns], rounded to `digits` decimals.
        quantity: what a value is, for the scale.
        columns, rows: labels.
        bounds: ends of the scale.
    """
    rounded = [[None if value is None else round(value, digits) for value in row] for row in values]
    return {
        "kind": "heat", "title": title, "x": x, "y": y, "quantity": quantity, "columns": list(columns), "rows": list(rows),
        "values": rounded, "range": list(bounds), "note": note,
    }  # fmt: skip


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> dict[str, Any]:
    """A table; cells are numbers, text or None."""
    return {"title": title, "headers": list(headers), "rows": [list(row) for row in rows], "note": note}
