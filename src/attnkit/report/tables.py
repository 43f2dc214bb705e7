"""One table, three ways: terminal, Markdown, HTML cells. Also how numbers are written everywhere."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ABSENT", "BEST", "TIMES", "cell", "interval", "is_numeric", "markdown_table", "number", "table"]

ABSENT = "-"
BEST = "★"
TIMES = "\u00d7"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with `digits` significant digits: 0.00012 -> 1.2e-04, 1234.5 -> 1,234, None -> -."""
    if value is None or value != value:
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e7):
        return f"{value:.{digits - 1}e}"
    magnitude = math.floor(math.log10(size)) if size else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}" if size else "0"


def interval(value: float | None, low: float | None, high: float | None, decimals: int) -> str:
    """Write a value with its 95 % interval: 2.713 (2.689-2.737)."""
    if value is None:
        return ABSENT
    if low is None or high is None:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"


def cell(value: object) -> str:
    """Write any value of a table cell."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return str(value)


def is_numeric(cells: Iterable[str]) -> bool:
    """Whether a column reads as numbers, and so is aligned to the right."""
    written = [text.removesuffix(BEST).strip() for text in cells if text != ABSENT]
    return bool(written) and all(text[:1].isdigit() or (text[:1] in "+-<" and text[1:2].isdigit()) for text in written)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", named: bool = False) -> "Table":
    """Build a terminal table; columns of numbers are aligned to the right.

    Args:
        headers: with units ("prefill s").
        rows: cells in the order of the headers; see `cell` for how values are written.
        title: printed above.
        named: rows begin with a name, which is never broken into two lines.
    """
    from rich import box
    from rich.table import Table

    written = [[cell(value) for value in row] for row in rows]
    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        right = is_numeric(row[index] for row in written)
        drawn.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=named and not index)
    for row in written:
        drawn.add_row(*row)
    return drawn


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Build a Markdown table; `|` and line breaks inside cells are escaped."""
    head, *written = [[cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in (headers, *rows)]
    marks = ["---:" if is_numeric(row[index] for row in written) else "---" for index in range(len(headers))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *written))
