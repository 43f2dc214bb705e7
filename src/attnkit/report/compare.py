"""How results of attnkit.compare/1 are drawn: long-context methods side by side, quality first, then cost."""

from collections.abc import Callable, Sequence
from typing import Any

from attnkit.report import compare_plots as plots
from attnkit.report import presses
from attnkit.report.compare_results import Results, Row, asked
from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.tables import ABSENT, BEST, TIMES, interval, number

__all__ = ["SPEC"]

_REQUIRED = ("method", "length", "loss", "passkey_hits", "passkey_trials", "prefill_s", "decode_tok_s", "peak_mib", "kv_mib")

_NOTABLE = 0.05  # smaller gains are within the noise of timings
# field -> how the best of it is announced, and which end of it is best
_CHEAPEST: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("prefill_s", "shortest prefill", min),
    ("decode_tok_s", "fastest decoding", max),
    ("kv_mib", "smallest KV cache", min),
)


def _draw(document: Row) -> Section:
    """Envelope of attnkit.compare/1 -> section."""
    results = Results.of(document["rows"])
    facts = [(name, str(document[name])) for name in ("model", "text", "device", "dtype") if document.get(name) is not None]
    if document.get("tail") is not None:
        facts.append(("loss over", f"the last {number(document['tail'])} tokens"))
    if not results.methods:
        return Section("Comparison of long-context methods", facts, (), ["No method was run."])
    shared = document.get("shared_prefill") or ()
    blocks = [_glance(results), *presses.blocks(results), *_quality(results), *_cost(results, shared)]
    return Section("Comparison of long-context methods", facts, blocks, _lead(results))


def _lead(results: Results) -> list[str]:
    """What to know first, at the longest length: who is best at what, and what that costs in quality."""
    length = results.lengths[-1]
    base = results.rows.get((results.baseline, length))
    others = [row for row in results.at(length) if row is not base and row["loss"] is not None]
    if base is None or base["loss"] is None or not others:
        return []
    name = results.baseline
    lines = [f"{name} at {number(length)} tokens: loss {base['loss']:.3f}{_found(base)}."]
    merits: dict[str, list[str]] = {min(others, key=lambda row: row["loss"])["method"]: [f"lowest loss besides {name}"]}
    for field, words, better in _CHEAPEST:
        rows = [row for row in others if row[field] is not None and base[field]]
        best = better(rows, key=lambda row, field=field: row[field]) if rows else base
        gain = abs(best[field] / base[field] - 1) if rows else 0.0
        if gain >= _NOTABLE and better(best[field], base[field]) == best[field]:
            merits.setdefault(best["method"], []).append(f"{words} ({_ratio(best[field], base[field])})")
    for method, praise in merits.items():
        row = results.rows[method, length]
        lines.append(f"{method}: {', '.join(praise)}; loss {_difference(row, base)}{_found(row)}.")
    return lines


def _found(row: Row) -> str:
    return f", {row['passkey_hits']} of {row['passkey_trials']} pass-keys found" if row["passkey_trials"] else ""


def _difference(row: Row, base: Row) -> str:
    return ABSENT if row["loss"] is None or base["loss"] is None else f"{row['loss'] - base['loss']:+.3f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}{TIMES}" if value is not None and base else ABSENT


def _glance(results: Results) -> Table:
    length = results.lengths[-1]
    base = results.rows.get((results.baseline, length)) or results.at(length)[0]
    headers = ["method", "loss difference", "pass-keys", "prefill time", "decode speed", "peak memory", "KV memory"]
    cells = [
        [
            row["method"],
            _difference(row, base),
            _hits(row),
            _ratio(row["prefill_s"], base["prefill_s"]),
            _ratio(row["decode_tok_s"], base["decode_tok_s"]),
            _ratio(row["peak_mib"], base["peak_mib"]),
            _ratio(row["kv_mib"], base["kv_mib"]),
        ]
        for row in results.at(length)
    ]
    note = f"{number(length)} tokens, relative to {base['method']}: 0.50{TIMES} is half the time, speed or memory."
    return Table("At a glance", headers, cells, note)


def _hits(row: Row) -> str:
    return f"{row['passkey_hits']}/{row['passkey_trials']}" if row["passkey_trials"] else ABSENT


def _right(row: Row, task: str) -> str:
    found = asked(row, task)
    return ABSENT if found is None else f"{found['hits']}/{found['trials']}"


def _passkeys(row: Row) -> str:
    if not row["passkey_trials"]:
        return ABSENT
    if row.get("passkey_low") is None or row.get("passkey_high") is None:
        return _hits(row)
    return f"{_hits(row)} ({100 * row['passkey_low']:.0f} to {100 * row['passkey_high']:.0f} %)"


def _quality(results: Results) -> list[Block]:
    headers = ["length", "method", "loss (95 %)", "pass-keys (95 %)", *results.tasks, "agreement", "KL, nats"]
    cells = []
    for length in results.lengths:
        rows = results.at(length)
        columns = [
            _marked(rows, "loss", min, lambda row: interval(row["loss"], row.get("loss_low"), row.get("loss_high"), 3)),
            _marked(rows, "passkey_hits", max, _passkeys),
            *([_right(row, task) for row in rows] for task in results.tasks),
            [f"{100 * row['agreement']:.1f} %" if row.get("agreement") is not None else ABSENT for row in rows],
            [number(row.get("kl")) for row in rows],
        ]
        names = [row["method"] for row in rows]
        cells += [[number(length), *line] for line in zip(names, *columns, strict=True)]
    base = results.baseline
    note = (
        f"{BEST} best of its length. {base} is the baseline. Loss: mean negative log-likelihood of the text's last tokens, "
        "in nats; lower is better. Pass-keys: keys hidden at several depths and asked for at the end. "
        f"Agreement: same next token as {base}."
    )
    note += f" Right answers: {', '.join(results.tasks)}." if results.tasks else ""
    return [Table("Quality", headers, cells, note, grouped=True), *_quality_figures(results)]


def _quality_figures(results: Results) -> list[Figure]:
    rows = results.rows.values()
    figures = []
    if any(row["loss"] is not None for row in rows):
        whiskers = "Left is better; each length has its own scale. Bars: 95 % intervals. Dashed: the baseline."
        figures.append(Figure("Loss", lambda prefix: plots.losses(prefix, results), whiskers))
    if any(row["passkey_trials"] and row.get("trials") for row in rows):
        start = "0 % is the start of the text."
        figures.append(Figure("Pass-keys by depth", lambda prefix: plots.depths(prefix, results), start))
    if len(results.lengths) > 1 and any(row["passkey_trials"] for row in rows):
        whiskers = "Dashed: the baseline. Bars: 95 % intervals."
        figures.append(Figure("Pass-keys by length", lambda prefix: plots.retrieval(prefix, results), whiskers))
    return figures


def _marked(rows: Sequence[Row], field: str, choose: Callable[..., float], write: Callable[[Row], str]) -> list[str]:
    """Write a column and put the sign at its best value, unless all are equal."""
    values = [row[field] for row in rows if row[field] is not None]
    best = choose(values) if len(set(values)) > 1 else None
    return [f"{write(row)} {BEST}" if best is not None and row[field] == best else write(row) for row in rows]


def _cost(results: Results, shared: Sequence[str]) -> list[Block]:
    headers = ["length", "method", "prefill s", "decode tok/s", "peak MiB", "KV MiB", "policy"]
    cells = []
    for length in results.lengths:
        rows = results.at(length)
        columns = [
            [number(row["prefill_s"]) + (" †" if row["method"] in shared else "") for row in rows],
            _marked(rows, "decode_tok_s", max, lambda row: number(row["decode_tok_s"])),
            _marked(rows, "peak_mib", min, lambda row: number(row["peak_mib"])),
            _marked(rows, "kv_mib", min, lambda row: number(row["kv_mib"])),
            [str(row.get("policy") or ABSENT) for row in rows],
        ]
        names = [row["method"] for row in rows]
        cells += [[number(length), *line] for line in zip(names, *columns, strict=True)]
    note = f"{BEST} best of its length. {results.baseline} is the baseline."
    if shared:
        note += " † prefilled once, densely, and shared by all methods marked so: the time is that of the dense prefill."
    blocks: list[Block] = [Table("Cost", headers, cells, note, grouped=True)]
    length = results.lengths[-1]
    rows = [row for row in results.at(length) if row["loss"] is not None]
    if any(row[field] is not None for row in rows for field in plots.COSTS):
        where = f"{number(length)} tokens. Lower and further left is better."
        blocks.append(Figure("Quality against cost", lambda prefix: plots.tradeoff(prefix, rows, results.methods), where))
    return blocks


SPEC = SectionSpec(_draw, _REQUIRED)
