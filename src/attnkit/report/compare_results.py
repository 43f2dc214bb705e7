"""The rows of a comparison, arranged for tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Results", "Row", "asked"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of one comparison, by method and length.

    Attributes:
        methods: in the order of the file; the first is the baseline.
        lengths: ascending, tokens.
        rows: (method, length) -> row.
    """

    methods: list[str]
    lengths: list[int]
    rows: Mapping[tuple[str, int], Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Results":
        """Sort the rows of an envelope."""
        return cls(
            methods=list(dict.fromkeys(row["method"] for row in rows)),
            lengths=sorted({row["length"] for row in rows}),
            rows={(row["method"], row["length"]): row for row in rows},
        )

    @property
    def tasks(self) -> list[str]:
        """What was asked besides pass-keys."""
        return list(dict.fromkeys(task for row in self.rows.values() for task in row.get("asked") or ()))

    @property
    def baseline(self) -> str:
        """The method that the others are compared with: dense where it was run."""
        return "dense" if "dense" in self.methods else self.methods[0]

    def at(self, length: int) -> list[Row]:
        """The rows of one length, baseline first."""
        ordered = sorted(self.methods, key=lambda method: method != self.baseline)
        return [self.rows[method, length] for method in ordered if (method, length) in self.rows]


def asked(row: Row, task: str) -> Row | None:
    """hits, trials, low and high of a task besides pass-keys; None where the row was not asked."""
    found: Row | None = (row.get("asked") or {}).get(task)
    return found
