"""How results of attnkit.weights/1 are drawn: two trainings that come apart, and what that is measured against."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.tables import interval, number
from attnkit.report.weights_plots import METRICS, PAIRS, distances, significances

__all__ = ["SPEC"]

Row = Mapping[str, Any]
_COLUMNS = ("max_abs", "w1", "max_abs_std", "w1_std", "max_abs_update", "w1_update")
_HEADERS = ("D_max", "W1", "D_max, std", "W1, std", "D_max, updates", "W1, updates")


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.weights/1 -> section."""
    rows, runs = document["rows"], document["runs"]
    facts = [("runs", f"{runs['run_b']} against {runs['run_a']}"), *_study(document), ("device", str(document["device"]))]
    if not rows:
        return Section("Divergence of weights", facts, (), ["Nothing was compared."])
    last = max(row["step"] for row in rows)
    blocks: list[Block] = []
    if last > min(row["step"] for row in rows):
        blocks.append(Figure("Over steps", lambda prefix: distances(prefix, rows)))
    found = document["significance"]
    if len(found) > 1:
        note = "The band is what the paper reports; whiskers are 95 % intervals over tensors."
        over = Figure("Significance", lambda prefix: significances(prefix, found, document["paper_range"]), note)
        blocks.append(over)
    blocks.append(_distances(rows, runs, last))
    if found:
        blocks.append(_tensors(document["tensors"]))
    return Section(
        "Divergence of weights", facts, blocks, [*_significance(document), *_repeat(rows, last), *_verdict(document)]
    )


def _study(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    study = document.get("study")
    if not study:
        return []
    losses = ", ".join(f"{name} {number(loss, 5)}" for name, loss in document["losses"].items())
    return [
        ("model", f"{document['parameters']:,} parameters, {study['layers']} layers of width {study['dim']}"),
        ("training", f"{study['steps']:,} steps, learning rate {number(study['learning_rate'])}, seed {study['seed']}"),
        ("loss on what was kept apart", losses),
    ]


def _distances(rows: Sequence[Row], runs: Mapping[str, str], last: int) -> Table:
    cells = []
    for row in rows:
        if row["step"] == last:
            name = runs["run_b" if row["pair"] == "runs" else row["pair"]]
            cells.append([PAIRS[row["pair"]], name, *(number(row[metric]) for metric in _COLUMNS)])
    note = (
        f"From {runs['run_a']}. D_max: the largest difference of two weights. W1: distance between distributions of values, "
        "mean over all weights. Then both in standard deviations of each tensor, and in terms of how far training has moved it."
    )
    return Table(f"Distances at step {last:,}", ["what differs", "run", *_HEADERS], cells, note)


def _tensors(tensors: Sequence[Row]) -> Table:
    bands = {tensor["name"]: tensor for tensor in tensors if tensor["pair"] == "precision"}
    cells = [
        [tensor["name"], f"{tensor['numel']:,}"]
        + [text for metric in METRICS for text in (number(tensor[metric]), _quotient(tensor, bands[tensor["name"]], metric))]
        for tensor in tensors
        if tensor["pair"] == "runs"
    ]
    headers = ["tensor", "weights", "D_max", "of the precision's", "W1", "of the precision's"]
    return Table("Tensors at the last step", headers, cells)


def _quotient(tensor: Row, band: Row, metric: str) -> str:
    return number(tensor[metric] / band[metric] if band[metric] else None)


def _significance(document: Mapping[str, Any]) -> list[str]:
    """What the headline quantity is at the last step."""
    if not document["significance"]:
        return []
    last, (low, high) = document["significance"][-1], document["paper_range"]
    pairs = {name: [tensor for tensor in document["tensors"] if tensor["pair"] == name] for name in ("runs", "precision")}
    lines = []
    for metric, name in METRICS.items():
        ratio = last[metric]
        place = "inside" if low <= ratio["value"] <= high else "outside"
        smaller = sum(a[metric] < b[metric] for a, b in zip(pairs["runs"], pairs["precision"], strict=True))
        lines.append(
            f"Step {last['step']:,}, {name}: {interval(ratio['value'], ratio['low'], ratio['high'], 2)} of what a change of "
            f"precision causes, {place} the paper's {low} to {high}; smaller in {smaller} of {len(pairs['runs'])} tensors."
        )
    return lines


def _repeat(rows: Sequence[Row], last: int) -> list[str]:
    found = [row["max_abs"] for row in rows if row["pair"] == "repeat" and row["step"] == last]
    if not found:
        return []
    return [f"The same run done again differs by {number(found[0])}." if found[0] else "The same run done again is identical."]


def _verdict(document: Mapping[str, Any]) -> list[str]:
    verdict = document["verdict"]
    if verdict is None:
        return []
    sense = "This bounds how similar two trainings are; it is no proof that either is stable."
    return [f"Verdict: {verdict['outcome']} ({verdict['reason']}). {sense}"]


SPEC = SectionSpec(_draw, ("pair", "step", *_COLUMNS))
