"""How results of attnkit.shadow/1 are drawn: how far a live model's attention is from a second computation."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.stability_plots import lines
from attnkit.report.tables import number

__all__ = ["SPEC"]

Row = Mapping[str, Any]
_HEADS = 16  # that deviate most, in the table
_COLUMNS = ("rms", "max_abs", "rel_fro", "ulp_row_max", "bias_ulp")
_HEADERS = ("layer", "head", "call", "rms", "max", "relative", "units of a row", "bias, units")
_NOTE = (
    "The sampled call in which each head deviated most. Relative: norm of the error over that of what is compared with. Units "
    "of a row: the largest error in units in the last place of sum P |V|, which does not cancel. Bias: mean error in units in "
    "the last place."
)


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.shadow/1 -> section."""
    rows, left_out = document["rows"], document["left_out"]
    golden = document["against"] == "golden"
    facts = [
        ("compared with", "float64" if golden else str(document["against"])),
        ("calls of a layer", f"{document['calls']:,}, every {document['every']}th compared"),
        ("rows of a call", str(document["sampled_rows"])),
        ("time of the comparison, s", number(document["shadow_s"])),
        ("device", str(document["device"])),
    ]
    blocks: list[Block] = []
    lead = ["Nothing was compared."]
    if rows:
        worst = _worst(rows)
        top = worst[0]
        lead = [
            f"{top['layer']}, head {top['head']} deviates most: {number(top['ulp_row_max'])} units in the last place of a row, "
            f"in call {top['call']:,}."
        ]
        over = {"by layer": _over(rows)}
        if len({row["call"] for row in rows}) > 1:
            title, y = "Root mean square of the error", "rms of the worst head"
            blocks.append(Figure(title, lambda prefix: lines(prefix, over, y=y, x="calls")))
        cells = [
            [row["layer"], str(row["head"]), f"{row['call']:,}", *(number(row[name]) for name in _COLUMNS)]
            for row in worst[:_HEADS]
        ]
        blocks.append(Table("Heads that deviate most", _HEADERS, cells, _NOTE))
    if left_out:
        cells = [[f"{each['call']:,}", each["layer"], each["why"]] for each in left_out]
        blocks.append(Table("Not compared", ["call", "layer", "why"], cells))
    return Section("Attention beside a second computation", facts, blocks, lead)


def _worst(rows: Sequence[Row]) -> list[Row]:
    """Of every head the call in which it deviated most, by units of a row; heads that deviated most first."""
    found: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: -(row["ulp_row_max"] or 0.0)):
        found.setdefault((row["layer"], row["head"]), row)
    return list(found.values())


def _over(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        calls = found.setdefault(row["layer"], {})
        calls[row["call"]] = max(calls.get(row["call"], 0.0), row["rms"] or 0.0)
    return {layer: sorted(calls.items()) for layer, calls in found.items()}


SPEC = SectionSpec(_draw, ("call", "layer", "head", *_COLUMNS))
