"""One self-contained HTML page from any number of result files: no network, printable, dark and light."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from attnkit._core.errors import InputError, MissingExtra
from attnkit._core.lazy import require
from attnkit._core.registry import Registry
from attnkit.report.files import write_text
from attnkit.report.tables import cell, is_numeric

__all__ = ["SECTIONS", "Block", "Figure", "Section", "SectionSpec", "Table", "render_html", "write_html"]


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: above it.
        headers: with units.
        rows: written cells.
        note: below it.
        grouped: rows with equal first cells belong together; a line is drawn between groups.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    grouped: bool = False

    def starts_group(self, index: int) -> bool:
        """Whether row `index` opens a group that is not the first."""
        return self.grouped and index > 0 and self.rows[index][0] != self.rows[index - 1][0]

    @property
    def numeric(self) -> list[bool]:
        """Which columns are aligned to the right."""
        return [is_numeric(row[index] for row in self.rows) for index in range(len(self.headers))]


@dataclass(frozen=True)
class Figure:
    """A picture of a page.

    Attributes:
        title: above it.
        draw: prefix of element ids -> SVG; called only where matplotlib is installed.
        note: below it.
    """

    title: str
    draw: Callable[[str], str]
    note: str = ""


Block = Table | Figure


@dataclass(frozen=True)
class Section:
    """One result on a page.

    Attributes:
        title: of the section.
        facts: (name, value) pairs shown under the title.
        blocks: tables and figures in reading order.
        lead: sentences that say what came out.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    blocks: Sequence[Block]
    lead: Sequence[str] = field(default=())


@dataclass(frozen=True)
class SectionSpec:
    """How the results of one schema become a section.

    Attributes:
        draw: envelope -> section.
        required: fields that every row must have.
    """

    draw: Callable[[Mapping[str, Any]], Section]
    required: tuple[str, ...] = ()


SECTIONS: Registry[SectionSpec] = Registry("result schema")


def write_html(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of `render_html`, whole or not at all."""
    write_text(path, render_html(documents))


def render_html(documents: Sequence[Mapping[str, Any]]) -> str:
    """Draw one page of result envelopes; schemas that have no drawing of their own become a table of their rows.

    Raises:
        InputError: nothing to draw, or a row lacks a field that its schema requires.
    """
    import jinja2

    if not documents:
        raise InputError("documents is empty; give at least one result envelope")
    has_plots = _has_matplotlib()
    sections = [_section(document) for document in documents]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    folder = resources.files("attnkit.report").joinpath("templates")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text("utf-8"))
    pictures = {
        (number, place): block.draw(f"s{number}f{place}-")
        for number, section in enumerate(sections)
        for place, block in enumerate(section.blocks)
        if has_plots and isinstance(block, Figure)
    }
    return str(
        template.render(
            sections=sections,
            provenance=[_provenance(document) for document in documents],
            pictures=pictures,
            has_plots=has_plots,
            style=folder.joinpath("page.css").read_text("utf-8"),
        )
    )


def _section(document: Mapping[str, Any]) -> Section:
    schema = document["schema"]
    spec = SECTIONS[schema] if schema in SECTIONS else SectionSpec(_any_rows)
    for index, row in enumerate(document["rows"]):
        missing = [name for name in spec.required if name not in row]
        if missing:
            raise InputError(f"row {index} of a {schema} result lacks {', '.join(missing)}; was the file written by hand?")
    return spec.draw(document)


def _any_rows(document: Mapping[str, Any]) -> Section:
    """The fallback: every field of every row that is not itself a list or an object."""
    names = list(dict.fromkeys(name for row in document["rows"] for name in row))
    names = [name for name in names if not any(isinstance(row.get(name), list | dict) for row in document["rows"])]
    rows = [[cell(row.get(name)) for name in names] for row in document["rows"]]
    return Section(
        title=str(document["schema"]), facts=(), blocks=[Table("", [name.replace("_", " ") for name in names], rows)]
    )


def _provenance(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is needed to repeat a result, as far as the envelope holds it."""
    facts = [(name, str(document[key])) for key, name in _PROVENANCE if document.get(key) is not None]
    found = document.get("versions") or {}
    installed = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return [*facts, ("versions", installed)] if installed else facts


_PROVENANCE = (
    ("command", "command"),
    ("schema", "schema"),
    ("device", "device"),
    ("dtype", "number format"),
    ("seed", "seed"),
    ("commit", "commit"),
    ("wall_s", "wall time, s"),
)


def _has_matplotlib() -> bool:
    try:
        require("matplotlib", extra="plot")
    except MissingExtra:
        return False
    return True
