"""How results of attnkit.race/1 are drawn: our operators against their peers, interleaved in one process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.report import race_training
from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.race_plots import OWN, dots, over_tokens
from attnkit.report.tables import ABSENT, TIMES, number

__all__ = ["OWN", "SPEC", "crossovers"]

Row = Mapping[str, Any]
TOKENS = "tokens"
_SHOWN = 40  # beyond that the plot is a wall of dots; the table has every row
_LISTED = 4  # shapes that somebody was not raced on, by name


def crossovers(rows: Sequence[Row]) -> list[str]:
    """One line a peer that says from how many tokens ours is faster, for each pass and kind of shape.

    "Pays from N tokens" means faster at N and at every longer length that was raced.
    """
    what = _Identity(rows)
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        kinds: dict[str, list[tuple[int, float]]] = {}
        for index, row in enumerate(rows):
            if row["peer"] == peer:
                kinds.setdefault(what.kind(index), []).append((tokens(row), row["ratio"]))
        verdicts: dict[str, list[str]] = {}
        for kind, points in kinds.items():
            verdicts.setdefault(_pays(points), []).append(kind)
        parts = [f"{verdict} ({', '.join(names)})" if len(verdicts) > 1 else verdict for verdict, names in verdicts.items()]
        lines.append(f"Against {peer} ours {'; '.join(parts)}.")
    return lines


def tokens(row: Row) -> int:
    """The length of a row's shape: its keys where they are counted apart, else its rows."""
    shape = row["shape"]
    return int(shape.get("S", shape["T"]))


def _pays(points: list[tuple[int, float]]) -> str:
    slower = [place for place, ratio in points if ratio <= 1]
    if not slower:
        return "pays at every length"
    after = [place for place, _ in points if place > max(slower)]
    return f"pays from {min(after):,} tokens" if after else f"never pays up to {max(slower):,} tokens"


class _Identity:
    """What each row is: columns of operator, pass, sizes, dtype and peer, and which of them vary.

    Attributes:
        columns: name -> one text a row.
        varying: those with several values, and the peer.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        sizes = [_sizes(row) for row in rows]
        self.columns = {
            "op": [str(row["op"]) for row in rows],
            "pass": [str(row["pass"]) for row in rows],
            **{
                name: [_text(each.get(name)) for each in sizes]
                for name in dict.fromkeys(name for each in sizes for name in each)
            },
            "dtype": [str(row["dtype"]) for row in rows],
            "peer": [str(row["peer"]) for row in rows],
        }
        self.varying = {name: texts for name, texts in self.columns.items() if name == "peer" or len(set(texts)) > 1}
        self._sizes = {name for each in sizes for name in each}

    def common(self) -> list[tuple[str, str]]:
        """What all rows share, as facts; sizes are one of them."""
        shared = {name: texts[0] for name, texts in self.columns.items() if name not in self.varying}
        shape = " ".join(f"{name}={text}" for name, text in shared.items() if name in self._sizes)
        facts = [(name, text) for name, text in shared.items() if name not in self._sizes]
        return [*facts, ("shape", shape)] if shape else facts

    def kind(self, index: int) -> str:
        """A row without its length and its peer: "fwd D=64"."""
        return self._label(index, without=("peer", TOKENS))

    def label(self, index: int) -> str:
        """A row without its peer: "fwd tokens=4,096 D=64"."""
        return self._label(index, without=("peer",))

    def _label(self, index: int, without: tuple[str, ...]) -> str:
        named = [(name, texts[index]) for name, texts in self.varying.items() if name not in without]
        return " ".join(f"{name}={text}" if name in self._sizes else text for name, text in named if text != ABSENT)


def _sizes(row: Row) -> dict[str, Any]:
    """Letter -> size, with `tokens` in the place of T and S; T stays where it is neither the length nor one row."""
    sizes: dict[str, Any] = {TOKENS: tokens(row)}
    for name, size in row["shape"].items():
        if name != "S" and (name != "T" or size not in (1, sizes[TOKENS])):
            sizes[name] = size
    return sizes


def _text(value: object) -> str:
    return ABSENT if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.race/1 -> section."""
    rows = document["rows"]
    skipped = _skipped(document)
    if not rows:
        return Section("Race", (), skipped, ["No race was run."])
    what = _Identity(rows)
    trained = [row for row in rows if "losses" in row]
    blocks: list[Block] = [_figure(rows, what), *race_training.figures(trained), _table(rows, what), *skipped]
    facts = [("device", str(document.get("device", ABSENT))), *what.common()]
    lead = [*_lead(rows), *(race_training.lead(trained) if trained else crossovers(rows))]
    return Section(f"Race: {', '.join(dict.fromkeys(what.columns['op']))}", facts, blocks, lead)


def _lead(rows: Sequence[Row]) -> list[str]:
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["peer"] == peer]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        won = sum(ratio > 1 for ratio in ratios)
        lines.append(f"Against {peer}: faster in {won} of {len(ratios)} races, {mean:.2f}{TIMES} in the geometric mean.")
    return lines


def _figure(rows: Sequence[Row], what: _Identity) -> Figure:
    title = "Peer time / our time"
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for index, row in sorted(enumerate(rows), key=lambda pair: tokens(pair[1])):
        lines.setdefault(what.kind(index), {}).setdefault(row["peer"], []).append((tokens(row), row["ratio"]))
    if TOKENS in what.varying:
        return Figure(title, lambda prefix: over_tokens(prefix, lines), "Above the line ours is faster.")
    note = "Right of the line ours is faster."
    if len(rows) > _SHOWN:
        note += f" The first {_SHOWN} of {len(rows)} rows; the table has all."
    shown = rows[:_SHOWN]
    labels = [what.label(index) for index in range(len(shown))]
    return Figure(title, lambda prefix: dots(prefix, shown, labels), note)


def _table(rows: Sequence[Row], what: _Identity) -> Table:
    columns: dict[str, list[str]] = {name: list(texts) for name, texts in what.varying.items()}
    columns |= {
        "ours ms": [number(row["ours_ms"]) for row in rows],
        "peer ms": [number(row["peer_ms"]) for row in rows],
        "peer / ours": [f"{row['ratio']:.2f} {'▲' if row['ratio'] > 1 else '▼'}" for row in rows],
        "spread": [_percent(row.get("spread"), 1) for row in rows],
        "first call s": [number(row.get("first_call_s")) for row in rows],
        "peer's first call s": [number(row.get("peer_first_call_s")) for row in rows],
        "ours TFLOP/s": [number(row.get("tflops")) for row in rows],
        "peer TFLOP/s": [number(row.get("peer_tflops")) for row in rows],
        "ours tokens/s": [number(row.get("tokens_s")) for row in rows],
        "peer tokens/s": [number(row.get("peer_tokens_s")) for row in rows],
        "ours of peak": [_percent(row.get("mfu"), 1) for row in rows],
        "peer of peak": [_percent(row.get("peer_mfu"), 1) for row in rows],
        "losses apart": [number(row.get("loss_difference"), 2) for row in rows],
        "of copy rate": [_percent(row.get("bandwidth_share"), 0) for row in rows],
        "ours MiB": [number(row.get("peak_mib")) for row in rows],
        "peer MiB": [number(row.get("peer_peak_mib")) for row in rows],
    }
    for name in dict.fromkeys(name for row in rows for name in row.get("facts", ())):
        columns[name] = [number(row.get("facts", {}).get(name)) for row in rows]
    shown = {name: cells for name, cells in columns.items() if name in what.varying or set(cells) != {ABSENT}}
    note = "▲ ours is faster, ▼ the peer is. Times are medians; spread is relative; MiB is peak memory."
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    return Table("Every race", list(shown), list(zip(*shown.values(), strict=True)), " ".join([note, *notes]))


def _percent(share: float | None, decimals: int) -> str:
    return ABSENT if share is None else f"{100 * share:.{decimals}f} %"


def _skipped(document: Mapping[str, Any]) -> list[Block]:
    """Who was not raced, where, and why."""
    entries = document.get("skipped") or []
    if not entries:
        return []
    shapes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        sizes = " ".join(f"{name}={size}" for name, size in entry["shape"].items())
        shapes.setdefault((entry["peer"], entry["reason"]), []).append(f"{entry['pass']} {sizes}")
    total = len(document.get("finished") or [])
    cells = [[peer, reason, _listing(places, total)] for (peer, reason), places in shapes.items()]
    note = f"Where {OWN} did not run, nobody was raced." if any(peer == OWN for peer, _ in shapes) else ""
    return [Table("Not raced", ["contestant", "reason", "shapes"], cells, note)]


def _listing(places: Sequence[str], total: int) -> str:
    if len(places) == total:
        return "all"
    rest = len(places) - _LISTED
    return "; ".join([*places[:_LISTED], f"{rest} more"] if rest > 0 else places)


SPEC = SectionSpec(_draw, ("op", "shape", "dtype", "pass", "peer", "ours_ms", "peer_ms", "ratio"))
