"""How results of attnkit.reproduce/1 are drawn: biased rounding, identities, trainings."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.stability_plots import Lines, lines
from attnkit.report.tables import number

__all__ = ["SPEC"]

Row = Mapping[str, Any]
_TITLES = {"training": "Trainings on a task full of ties", "text": "Trainings on bytes of a text"}


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.reproduce/1 -> section."""
    parts: dict[str, list[Row]] = {}
    for row in document["rows"]:
        parts.setdefault(row["part"], []).append(row)
    facts = [
        ("parts", ", ".join(parts)),
        ("seeds", str(len(document["seeds"]))),
        ("steps of a training", f"{document['steps']:,}"),
        ("device", str(document["device"])),
    ]
    blocks: list[Block] = []
    lead: list[str] = []
    if "bias" in parts:
        blocks += _bias(parts["bias"])
    if "algebra" in parts:
        worst = max(row["error"] for row in parts["algebra"])
        cells = [[row["name"], number(row["error"])] for row in parts["algebra"]]
        blocks.append(Table("Identities in float64", ["equation", "relative error"], cells))
        lead.append(f"The identities hold to {number(worst)}.")
    for part in ("training", "text"):
        if part in parts:
            blocks += _trainings(part, parts[part])
            worst_row = max(parts[part], key=lambda row: abs(row["z"] or 0.0))
            lead.append(
                f"{_TITLES[part]}: eps leans most in {worst_row['arm']} (seed {worst_row['seed']}, {worst_row['layer']}, head "
                f"{worst_row['head']}), z = {number(worst_row['z'])}."
            )
    return Section("Why low-precision training fails, scaled down", facts, blocks, lead)


def _bias(rows: Sequence[Row]) -> list[Table]:
    usual = (rows[0]["ones"], rows[0]["depth"], rows[0]["value_mean"])
    first = [row for row in rows if (row["ones"], row["depth"], row["value_mean"]) == usual]
    cells = [[row["name"], *(number(row[name]) for name in ("bias_ulp", "z", "mean_ulp"))] for row in first]
    note = f"{usual[0]} tied maxima, other scores {usual[1][0]:g} to {usual[1][1]:g} below, values around {usual[2]:g}."
    tables = [Table("Biased rounding", ["attention", "bias, units", "z", "mean size, units"], cells, note)]
    grid: dict[tuple[int, str, float], dict[str, float]] = {}
    for row in rows:
        key = (row["ones"], f"{row['depth'][0]:g} to {row['depth'][1]:g}", row["value_mean"])
        grid.setdefault(key, {}).setdefault(row["name"], row["bias_ulp"])
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if all(name in cell for cell in grid.values())]
    cells = [
        [str(ones), depth, f"{mean:g}", *(number(found[name]) for name in names)]
        for (ones, depth, mean), found in sorted(grid.items())
    ]
    headers = ["ties", "others below by", "values around", *(f"bias, {name}" for name in names)]
    return [*tables, Table("Biased rounding over ties, depth and values", headers, cells)]


def _trainings(part: str, rows: Sequence[Row]) -> list[Block]:
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    cells = []
    for arm, found in arms.items():
        growth = [row["series"]["norm_q"][-1] / row["series"]["norm_q"][0] for row in found]
        values = [
            max((row["z"] for row in found), key=lambda z: abs(z or 0.0)),
            statistics.mean(row["eps_size"] for row in found),
            statistics.mean(row["tie_rate"] for row in found),
            statistics.mean(row["o_bias"] for row in found),
            max(growth),
            statistics.mean(row["loss"] for row in found if row["loss"] is not None) if _finite(found) else None,
        ]
        cells.append([arm, *(number(value) for value in values)])
    headers = ["attention", "z", "|eps| / |delta|", "ties", "bias, units", "growth of W_q", "loss"]
    note = "z: the largest of all layers, heads and seeds. Growth: the largest ratio of spectral norms. Others: means."
    seed = rows[0]["seed"]
    drift = {layer: {row["arm"]: _points(row, "eps_total") for row in here} for layer, here in _by_layer(rows, seed).items()}
    norms = {layer: {row["arm"]: _points(row, "norm_q") for row in here} for layer, here in _by_layer(rows, seed).items()}
    losses: Lines = {f"seed {seed}": {row["arm"]: _points(row, "loss") for row in next(iter(_by_layer(rows, seed).values()))}}
    title = _TITLES[part]
    return [
        Table(title, headers, cells, note),
        Figure(f"{title}: sum of eps", lambda prefix: lines(prefix, drift, y="sum of eps / |delta|", zero=True)),
        Figure(f"{title}: spectral norm of W_q", lambda prefix: lines(prefix, norms, y="largest singular value")),
        Figure(f"{title}: loss", lambda prefix: lines(prefix, losses, y="loss, nats")),
    ]


def _finite(rows: Sequence[Row]) -> bool:
    return any(row["loss"] is not None for row in rows)


def _by_layer(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows of a seed; the first, the middle and the last layer where there are more than three."""
    layers: dict[str, list[Row]] = {}
    for row in rows:
        if row["seed"] == seed:
            layers.setdefault(row["layer"], []).append(row)
    names = sorted(layers)
    chosen = names if len(names) <= 3 else [names[0], names[len(names) // 2], names[-1]]
    return {name: layers[name] for name in chosen}


def _points(row: Row, name: str) -> list[tuple[float, float]]:
    pairs = zip(row["series"]["step"], row["series"][name], strict=True)
    return [(step, value) for step, value in pairs if value is not None]


SPEC = SectionSpec(_draw, ("part",))
