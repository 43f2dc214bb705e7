"""How results of attnkit.train/1 are drawn: one training run."""

from collections.abc import Mapping
from typing import Any

from attnkit.report.page import Block, Figure, Section, SectionSpec, Table
from attnkit.report.tables import ABSENT, number
from attnkit.report.train_plots import curves, nats

__all__ = ["SPEC"]

_SHOWN = 12  # lines of the log in the table


def _draw(document: Mapping[str, Any]) -> Section:
    """Envelope of attnkit.train/1 -> section."""
    rows, data, recipe = document["rows"], document["data"], document["recipe"]
    what = data.get("task") or data.get("text")
    facts = [
        ("model", f"{document['model']['class']}, {document['model']['parameters']:,} parameters"),
        ("data", ", ".join(f"{name} {_text(data[name])}" for name in ("text", "tokenizer", "task", "lengths") if name in data)),
        ("steps", f"{recipe['steps']:,}"),
        ("learning rate", number(recipe["learning_rate"])),
        ("device", str(document["device"])),
    ]
    if not rows:
        return Section(f"Training: {what}", facts, (), ["Nothing was logged."])
    last = rows[-1]
    blocks: list[Block] = [Figure("Loss", lambda prefix: curves(prefix, rows)), _log(rows), _speed(document["speed"])]
    return Section(f"Training: {what}", facts, blocks, _lead(last))


def _lead(last: Mapping[str, Any]) -> list[str]:
    lines = [f"After {last['tokens']:,} tokens in {last['seconds']:,.0f} s the loss is {nats(last['loss'])} nats a token."]
    if last.get("validation_loss") is not None:
        lines.append(f"On what was kept apart it is {nats(last['validation_loss'])}.")
    for length, share in (last.get("accuracy") or {}).items():
        lines.append(f"At {length} tokens {100 * share:.2f} % of the answers are right.")
    return lines


def _log(rows: list[Mapping[str, Any]]) -> Table:
    step = max(1, len(rows) // _SHOWN)
    chosen = rows[::-step][::-1]
    cells = [
        [
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            nats(row["loss"]),
            nats(row.get("validation_loss")),
            number(row["learning_rate"]),
            number(row.get("grad_norm")),
            number(row.get("tokens_s")),
        ]
        for row in chosen
    ]
    headers = ["step", "tokens", "loss", "validation", "rate", "gradient norm", "tokens/s"]
    return Table("Log", headers, cells, "" if step == 1 else f"Every {step}th line; log.jsonl has all.")


def _speed(speed: Mapping[str, Any]) -> Table:
    mfu = speed.get("mfu")
    cells = [
        [
            number(speed.get("tokens_s")),
            number(speed.get("step_ms_p50")),
            number(speed.get("step_ms_p95")),
            number(speed.get("tflops")),
            ABSENT if mfu is None else f"{100 * mfu:.1f} %",
            number(speed.get("peak_mib")),
        ]
    ]
    note = "Operations: 6 x parameters x tokens, and 6 x layers x width x the sum of squared sequence lengths (causal)."
    return Table("Speed", ["tokens/s", "step ms, median", "95 %", "TFLOP/s", "of the peak", "peak MiB"], cells, note)


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


SPEC = SectionSpec(_draw, ("step", "tokens", "loss", "learning_rate", "seconds"))
