"""Recorded steps -> the rows of attnkit.compare/1."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attnkit.lab.compare.methods import BASELINE, Method, describe
from attnkit.lab.compare.statistics import block_bootstrap, wilson

__all__ = ["make_rows"]

Step = Mapping[str, Any]


def make_rows(
    methods: Sequence[Method],
    lengths: Sequence[int],
    texts: Mapping[tuple[int, str], Sequence[Step]],
    asked: Mapping[tuple[int, str], Sequence[Step]],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each length and method, the baseline first.

    Args:
        methods, lengths: what ran.
        texts, asked: (length, method's name) -> what was recorded, in the order of the inputs.
        seed: of the bootstrap.
    """
    rows = []
    for length in lengths:
        for method in methods:
            place, base = (length, method.name), (length, BASELINE)
            prefills = base if method.shares_dense_prefill else place
            read, answered = texts.get(place, ()), asked.get(place, ())
            row = {"method": method.name, "length": length, "policy": describe(method.policy(length))}
            rows.append(
                row
                | {"press": method.press, "ratio": method.ratio, "codec": method.codec}
                | _quality(read, answered, seed)
                | _cost(read, answered, [*texts.get(prefills, ()), *asked.get(prefills, ())])
                | {"kept": next((step["kept"] for step in [*read, *answered]), None)}
            )
    return rows


def _quality(texts: Sequence[Step], asked: Sequence[Step], seed: int) -> dict[str, Any]:
    loss, low, high = block_bootstrap([step["losses"] for step in texts], seed=seed) if texts else (None, None, None)
    tasks = {name: [step for step in asked if step["task"] == name] for name in dict.fromkeys(step["task"] for step in asked)}
    passkeys = _hits(tasks.pop("needle", []))
    return {
        "loss": loss,
        "loss_low": low,
        "loss_high": high,
        **{f"passkey_{name}": value for name, value in passkeys.items()},
        "asked": {name: _hits(steps) for name, steps in tasks.items()},
        "agreement": statistics.fmean(step["agreement"] for step in texts) if texts else None,
        "kl": statistics.fmean(step["kl"] for step in texts) if texts else None,
        "trials": [{name: step[name] for name in ("task", "depth", "key", "answer", "hit")} for step in asked],
    }


def _hits(asked: Sequence[Step]) -> dict[str, Any]:
    """Right answers of a task, and the interval of their share."""
    hits = sum(step["hit"] for step in asked)
    low, high = wilson(hits, len(asked)) if asked else (None, None)
    return {"hits": hits, "trials": len(asked), "low": low, "high": high}


def _cost(texts: Sequence[Step], asked: Sequence[Step], prefills: Sequence[Step]) -> dict[str, Any]:
    peaks = [step["peak_mib"] for step in prefills if step["peak_mib"] is not None]
    token_s = [seconds for step in [*texts, *asked] for seconds in step["token_s"]]
    return {
        "prefill_s": statistics.median(step["prefill_s"] for step in prefills),
        "decode_tok_s": 1 / statistics.median(token_s) if token_s else None,
        "peak_mib": statistics.median(peaks) if peaks else None,
        "kv_mib": statistics.median(step["kv_mib"] for step in texts or asked),
    }
