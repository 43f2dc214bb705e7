"""How results of attnkit.claim/1 are drawn: a paper's claim, what was measured, and the verdict.

Such a result brings its figures and tables along as data (see `attnkit.lab.claims.figures`), so that every claim is drawn by
the same few lines.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from attnkit.report.claims_plots import draw_figure
from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.tables import cell

__all__ = ["SPEC"]


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.claim/1 -> section."""
    claim, verdict = document["claim"], document["verdict"]
    facts = [
        ("systems", ", ".join(str(number) for number in claim["systems"])),
        ("the paper says", str(claim["says"])),
        ("source", str(claim["source"])),
        ("protocol", str(claim["protocol"])),
        ("settings", ", ".join(f"{name} {_text(value)}" for name, value in document["settings"].items())),
        ("device", str(document["device"])),
    ]
    blocks: list[Block] = [
        Figure(figure["title"], partial(draw_figure, figure=figure), figure["note"]) for figure in document["figures"]
    ]
    for table in document["tables"]:
        rows = [[cell(value) for value in row] for row in table["rows"]]
        blocks.append(Table(table["title"], table["headers"], rows, table["note"]))
    if verdict["numbers"]:
        numbers = [[name, cell(value)] for name, value in verdict["numbers"].items()]
        blocks.append(Table("What the verdict rests on", ["quantity", "value"], numbers))
    return Section(f"Claim: {claim['name']}", facts, blocks, [f"Verdict: {verdict['outcome']}. {verdict['reason']}"])


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


SPEC = SectionSpec(_draw, ("cell",))
