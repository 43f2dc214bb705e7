"""Results for people and programs: JSON envelopes, tables, one self-contained HTML page."""

from attnkit.report import cache_memory, claims, compare, deviation, race, reproduce, shadow, stability, train, weights
from attnkit.report.files import envelope, plain, read_envelope, versions, write_bytes, write_json, write_text
from attnkit.report.page import SECTIONS, Figure, Section, SectionSpec, Table, render_html, write_html
from attnkit.report.tables import interval, markdown_table, number, table

__all__ = [
    "SECTIONS",
    "Figure",
    "Section",
    "SectionSpec",
    "Table",
    "render_html",
    "write_html",
    "envelope",
    "interval",
    "markdown_table",
    "number",
    "plain",
    "read_envelope",
    "table",
    "versions",
    "write_bytes",
    "write_json",
    "write_text",
]

SECTIONS.register("attnkit.claim/1", claims.SPEC)
SECTIONS.register("attnkit.compare/1", compare.SPEC)
SECTIONS.register("attnkit.deviation/1", deviation.SPEC)
SECTIONS.register("attnkit.kv.memory/1", cache_memory.SPEC)
SECTIONS.register("attnkit.localise/1", stability.LOCALISE)
SECTIONS.register("attnkit.race/1", race.SPEC)
SECTIONS.register("attnkit.reproduce/1", reproduce.SPEC)
SECTIONS.register("attnkit.shadow/1", shadow.SPEC)
SECTIONS.register("attnkit.sites/1", deviation.SITES)
SECTIONS.register("attnkit.stability/1", stability.SPEC)
SECTIONS.register("attnkit.train/1", train.SPEC)
SECTIONS.register("attnkit.weights/1", weights.SPEC)
