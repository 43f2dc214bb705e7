"""How results of attnkit.kv.memory/1 are drawn: what caches weigh."""

from collections.abc import Mapping
from typing import Any

from attnkit.report.page import Section, SectionSpec, Table
from attnkit.report.tables import ABSENT, number

__all__ = ["SPEC"]


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.kv.memory/1 -> section."""
    facts = [(name, str(document[name])) for name in ("model", "text", "length", "device", "dtype")]
    headers = ["method", "promised", "tokens kept", "KV MiB", "of dense", "held MiB", "peak MiB"]
    cells = [
        [
            row["method"],
            f"{1 - row['ratio']:.3f}" if row["ratio"] is not None else ABSENT,
            f"{row['tokens']:.3f}" if row["tokens"] is not None else ABSENT,
            number(row["kv_mib"], 4),
            f"{row['of_dense']:.3f}",
            number(row["held_mib"], 4),
            number(row["peak_mib"], 4),
        ]
        for row in document["rows"]
    ]
    note = (
        "Promised: 1 - ratio. Tokens kept: mean share of the context that a head stores. KV MiB: all tensors of the cache. "
        "Held: in use when the context was read, beyond before, as the allocator counts. Peak: the largest such meanwhile."
    )
    return Section("Memory of the cache", facts, [Table("Memory", headers, cells, note)])


SPEC = SectionSpec(_draw, ("method", "ratio", "tokens", "kv_mib", "of_dense", "held_mib", "peak_mib"))
