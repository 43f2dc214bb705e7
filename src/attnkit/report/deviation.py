"""How results of attnkit.deviation/1 and attnkit.sites/1 are drawn: distance from the true value, and who causes it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.deviation_plots import Curves, bars, curves
from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.tables import ABSENT, TIMES, number

__all__ = ["SITES", "SPEC"]

Row = Mapping[str, Any]
_KEY = ("format", "distribution", "length", "algorithm", "policy", "normalizer", "block")
_SHOWN = ("rms", "max_abs", "ulp_row_max", "bias_ulp", "bits_lost")
_HEADERS = ("format", "inputs", "tokens", "roundings", "tile", "rms", "max", "units of a row", "bias, units", "bits lost")


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.deviation/1 -> section."""
    rows = _medians(document["rows"])
    facts = [
        ("formats", ", ".join(_unique(rows, "format"))),
        ("head width", str(document["width"])),
        ("causal", "yes" if document["causal"] else "no"),
        ("seeds", str(len(_unique(document["rows"], "seed")))),
        ("device", str(document["device"])),
    ]
    if not rows:
        return Section("Deviation from float64", facts, (), ["Nothing was measured."])
    blocks: list[Block] = [*_figures(rows), _table(rows)]
    return Section("Deviation from float64", facts, blocks, _lead(rows))


def _medians(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for all seeds, with the median of every metric."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _KEY), []).append(row)
    merged = []
    for key, group in groups.items():
        metrics = {name: _median([row[name] for row in group]) for name in (*_SHOWN, "ratio_rms", "ratio_max", "rel_fro")}
        merged.append(dict(zip(_KEY, key, strict=True)) | {"p": group[0]["p"]} | metrics)
    return merged


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _label(row: Row) -> str:
    """What rounds: the baseline, or algorithm, policy and normaliser."""
    if row["algorithm"] == "baseline":
        return "baseline"
    tail = ", consistent" if row["normalizer"] == "consistent" else ""
    return f"{row['algorithm']} {row['policy']}{tail}"


def _unique(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        rms, largest = (_with_ratio(row[name], row[ratio]) for name, ratio in (("rms", "ratio_rms"), ("max_abs", "ratio_max")))
        block = ABSENT if row["block"] is None else str(row["block"])
        head = [row["format"], row["distribution"], f"{row['length']:,}", _label(row), block]
        cells.append([*head, rms, largest, *(number(row[name]) for name in _SHOWN[2:])])
    note = (
        f"Medians over seeds. {TIMES}: in terms of the baseline on the same inputs. Units of a row: the largest error in "
        "units in the last place of the row's scale. Bits lost: against the true value rounded once."
    )
    return Table("Deviation", _HEADERS, cells, note)


def _with_ratio(value: float | None, ratio: float | None) -> str:
    return number(value) if ratio is None else f"{number(value)} ({number(ratio)}{TIMES})"


def _lead(rows: Sequence[Row]) -> list[str]:
    """What came out at the longest inputs and smallest tiles, a line for each format and distribution."""
    lines = []
    length = max(_unique(rows, "length"))
    block = min((row["block"] for row in rows if row["block"] is not None), default=None)
    for name, inputs in dict.fromkeys((row["format"], row["distribution"]) for row in rows):
        found = [
            f"{_label(row)} deviates {number(row['ratio_rms'])}{TIMES}"
            for row in rows
            if (row["format"], row["distribution"], row["length"], row["block"]) == (name, inputs, length, block)
        ]
        if found:
            where = f"{name}, {inputs}, {length:,} tokens, tiles of {block}"
            lines.append(f"{where}: {', '.join(found)} as much as the baseline (rms).")
    return lines


def _figures(rows: Sequence[Row]) -> list[Figure]:
    """Over whatever was varied: lengths, tiles, bits."""
    tiled = [row for row in rows if row["block"] is not None]
    figures = []
    if len(_unique(tiled, "length")) > 1:
        over = _curves(tiled, "length", "ratio_rms", fixed="block")
        figures.append(_figure("Over length", over, "tokens", f"rms, {TIMES} baseline", one=True))
    if len(_unique(tiled, "block")) > 1:
        over = _curves(tiled, "block", "ratio_rms", fixed="length")
        figures.append(_figure("Over tiles", over, "keys of a tile", f"rms, {TIMES} baseline", one=True))
    if len(_unique(tiled, "p")) > 2:
        over = _curves(rows, "p", "rel_fro", fixed="length", panel=("distribution",))
        figures.append(_figure("Over significant bits", over, "bits of the significand", "error / size of the true value"))
    return figures


def _figure(title: str, over: Curves, x: str, y: str, *, one: bool = False) -> Figure:
    return Figure(title, lambda prefix: curves(prefix, over, x=x, y=y, one=one, linear_x="bits" in x))


def _curves(rows: Sequence[Row], x: str, y: str, *, fixed: str, panel: tuple[str, ...] = ("format", "distribution")) -> Curves:
    """Panel -> line -> points; of what is held fixed, the value that shows most: smallest tiles, longest inputs."""
    known = [row[fixed] for row in rows if row[fixed] is not None]
    held = min(known) if fixed == "block" else max(known)
    smallest = min((row["block"] for row in rows if row["block"] is not None), default=None)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(rows, key=lambda row: float(row[x] or 0)):
        other_tile = x == "p" and row["block"] not in (None, smallest)
        if row[fixed] in (None, held) and not other_tile and row[y]:
            lines = panels.setdefault(", ".join(str(row[name]) for name in panel), {})
            lines.setdefault(_label(row), []).append((row[x], row[y]))
    return panels


def _draw_sites(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.sites/1 -> section."""
    rows = document["rows"]
    alone = document["mode"] == "one_in"
    facts = [
        ("format", str(document["dtype"])),
        ("roundings", f"{document['algorithm']} {document['policy']}"),
        ("inputs", f"{document['distribution']}, {document['length']:,} tokens, tiles of {document['block']}"),
        ("mode", "each site alone" if alone else "all sites but one"),
        ("device", str(document["device"])),
    ]
    cells = [
        [row["site"], row["what"], *(number(row[name]) for name in ("rms", "max_abs", "ulp_row_max", "bias_ulp"))]
        for row in rows
    ]
    table = Table("Sites", ["site", "what is rounded", "rms", "max", "units of a row", "bias, units"], cells)
    title = "Rms with one rounding alone" if alone else "Rms without one rounding"
    ordered = [row for row in rows if row["site"] != "all" and row["rms"] is not None]  # what overflows has none
    if not ordered:
        return Section("Rounding sites", facts, [table], ["No site has a finite deviation."])
    chosen = (max if alone else min)(ordered, key=lambda row: row["rms"])
    total = next(row["rms"] for row in rows if row["site"] == "all")
    verb = "alone makes" if alone else "left out leaves"
    lead = [f"{chosen['site']} ({chosen['what']}) {verb} an rms of {number(chosen['rms'])}; all sites make {number(total)}."]
    return Section("Rounding sites", facts, [Figure(title, lambda prefix: bars(prefix, rows)), table], lead)


SPEC = SectionSpec(_draw, (*_KEY, "seed", "p", *_SHOWN, "ratio_rms", "ratio_max", "rel_fro"))
SITES = SectionSpec(_draw_sites, ("site", "what", "rms", "max_abs", "ulp_row_max", "bias_ulp"))
