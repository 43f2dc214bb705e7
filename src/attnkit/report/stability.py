"""How results of attnkit.stability/1 and attnkit.localise/1 are drawn: errors that lean one way, and where they come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.stability_plots import lines
from attnkit.report.tables import number

__all__ = ["LOCALISE", "SPEC"]

Row = Mapping[str, Any]
_HEADS = 16  # that lean most, in the table
_HEADERS = ("layer", "head", "level", "eps / |delta|", "z", "bias, units", "ties", "sink", "logit", "lean of v")
_COLUMNS = ("eps_mean", "z", "o_bias", "tie_rate", "sink_mass", "max_logit", "v_anisotropy")
_NOTE = (
    "Means over samples. eps: delta as the backward pass forms it, less the true one. z: of its mean over the last samples. "
    "Bias: of the output, away from zero. Ties: share of rows in which two probabilities or more round to 1. Sink: probability "
    "of the first key. Lean: largest |mean| / standard deviation of a channel of the values."
)


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.stability/1 -> section."""
    rows, events = document["rows"], document["events"]
    facts = [
        ("steps", f"{document['steps']:,}, every {document['every']}th looked at"),
        ("rows of a call", str(document["sampled_rows"])),
        ("action", str(document["action"])),
        ("time of the monitor, s", number(document["monitor_s"])),
        ("device", str(document["device"])),
    ]
    title = "Stability of attention"
    if not rows:
        return Section(title, facts, (), ["No step was looked at."])
    history = document["history"]
    blocks: list[Block] = []
    if len({row["step"] for row in history}) > 1:
        drift, norms = _over(history, "eps_total"), _over(history, "norm_q")
        blocks.append(Figure("Sum of eps / |delta|", lambda prefix: lines(prefix, drift, y="sum of eps / |delta|", zero=True)))
        blocks.append(Figure("Spectral norm of W_q", lambda prefix: lines(prefix, norms, y="largest singular value")))
    blocks.append(_heads(rows))
    if events:
        cells = [[f"{event['step']:,}", event["layer"], event["level"], event["text"]] for event in events]
        blocks.append(Table("What happened", ["step", "layer", "level", "text"], cells))
    return Section(title, facts, blocks, _lead(rows))


def _lead(rows: Sequence[Row]) -> list[str]:
    worst = max(rows, key=lambda row: abs(row["z"] or 0.0))
    where = f"{worst['layer']}, head {worst['head']}"
    ties = max(rows, key=lambda row: row["tie_rate"])
    return [
        f"{where} leans most: z = {number(worst['z'])} after {worst['samples']:,} samples, level {worst['level']}.",
        f"Two probabilities or more round to 1 in {100 * ties['tie_rate']:.1f} % of the rows of {ties['layer']}, "
        f"head {ties['head']}, the most of all heads.",
    ]


def _heads(rows: Sequence[Row]) -> Table:
    chosen = sorted(rows, key=lambda row: -abs(row["z"] or 0.0))[:_HEADS]
    cells = [[row["layer"], str(row["head"]), row["level"], *(number(row[name]) for name in _COLUMNS)] for row in chosen]
    return Table("Heads that lean most", _HEADERS, cells, _NOTE)


def _over(history: Sequence[Row], name: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        if row.get(name) is not None:
            found.setdefault(row["layer"], []).append((row["step"], row[name]))
    return {"of the head that leans most" if name == "eps_total" else "by layer": found}


def _draw_localise(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.localise/1 -> section."""
    rows, found = document["rows"], document["found"]
    facts = [
        ("batches", str(document["batches"])),
        ("rows of a call", str(document["sampled_rows"])),
        ("number format", str(document["dtype"])),
        ("device", str(document["device"])),
    ]
    before = [row for row in rows if row["change"] == rows[0]["change"]]
    chosen = found or max(before, key=lambda row: abs(row["z"] or 0.0))
    same = [row for row in rows if (row["layer"], row["head"]) == (chosen["layer"], chosen["head"])]
    where = f"{chosen['layer']}, head {chosen['head']}"
    names = ("eps_mean", "z", "o_bias", "tie_rate", "v_anisotropy")
    cells = [[row["change"], *(number(row[name]) for name in names)] for row in same]
    headers = ["change", "eps / |delta|", "z", "bias, units", "ties", "lean of v"]
    table = Table(f"{where}, one change at a time", headers, cells, _NOTE)
    if found is None:
        return Section("Where the error comes from", facts, [table, _heads(before)], ["No head leans one way."])
    mended = ", ".join(found["mended_by"]) or "nothing that was tried"
    lead = [f"{where}: eps leans one way, z = {number(found['z'])}. What removes it: {mended}."]
    return Section("Where the error comes from", facts, [table, _heads(before)], lead)


SPEC = SectionSpec(_draw, ("layer", "head", "level", "samples", *_COLUMNS))
LOCALISE = SectionSpec(_draw_localise, ("change", "layer", "head", "level", *_COLUMNS))
