"""Rows of claims about compressed caches, and what they say: who is ahead at half of the keys, tables and figures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnkit import inference
from attnkit._core.errors import AttnkitError
from attnkit.lab.claims.claim import Conclusion, Row, Verdict
from attnkit.lab.claims.figures import heat, lines, table
from attnkit.lab.claims.kv_asked import ADAPTED, MAIN, ORACLES, Asked, ask

__all__ = ["DECIDING", "DENSE", "PROTOCOL", "conclude_rows", "measure"]

DECIDING = 0.5
DENSE = "dense"
_MEAN = "expected_attention, mean"
_ROWS = 20  # of a heat map with labels
_SLACK = 0.01  # by which the share that is held may be above what the ratio leaves
PROTOCOL = (
    "Contexts are read and compressed before anything is asked, and questions go to copies of the cache; accuracy is the mean "
    f"over kinds of questions of the share that is answered right. At ratio {DECIDING}, after the prefill: expected attention "
    "is at least level with SnapKV, TOVA, Knorm and StreamingLLM, each; budgets that heads share are at least level with equal "
    "ones in the mean of five methods; the moment form of expected attention is at least level with the paper's mean form; and "
    "no method that holds as few keys as it was asked to is ahead of an oracle that knows the attention to come. It holds if "
    "all four do, in part if some do. Compression while decoding and what is refused are reported."
)


def measure(
    model: Any,
    press: Callable[[float, Asked], Any],
    given: Asked,
    *,
    ratios: Sequence[float],
    kinds: Sequence[str],
    batch: int,
    pieces: Sequence[int] | None = None,
    errors: bool = True,
) -> list[Row]:
    """One row a ratio: right and answers of each kind, the share of keys held, and after a prefill the reconstruction error of
    the first batch.

    Args:
        model: see `attnkit.lab.claims.kv_asked.ask`.
        press: (ratio, the contexts it is for) -> a press, or None for the whole cache.
        given: contexts; `given.kinds` counts along `kinds`.
        ratios: to ask at.
        kinds: names.
        batch: contexts a pass.
        pieces: see `ask`.
        errors: whether the reconstruction error is measured, which takes two more passes.
    Returns:
        the rows; one with the reason in `refused` where the method cannot be served.
    """
    rows = []
    for ratio in ratios:
        right, answers, held, error = [0] * len(kinds), [0] * len(kinds), [], None
        try:
            for start in range(0, len(given), batch):
                part = given.rows(slice(start, start + batch))
                made = press(ratio, part)
                hits, share = ask(model, made, part, pieces=pieces)
                held.append(share)
                if errors and made is not None and pieces is None and not start:
                    error = _error(model, made, part)
                for kind in range(len(kinds)):
                    found, total = part.right(hits, kind)
                    right[kind], answers[kind] = right[kind] + found, answers[kind] + total
        except AttnkitError as refusal:
            return [{"ratio": ratio, "refused": str(refusal)}]
        rows.append(
            {
                "ratio": ratio, "right": dict(zip(kinds, right, strict=True)),
                "answers": dict(zip(kinds, answers, strict=True)),
                "held": round(sum(held) / len(held), 4), "error": error,
            }
        )  # fmt: skip
    return rows


def _error(model: Any, press: Any, given: Asked) -> float:
    """Of hidden states of the questions."""
    ids = torch.cat([given.context, given.asked.flatten(1)], 1)
    found = inference.reconstruction_error(model, press, ids, tail=given.asked[0].numel())
    return round(float(found.mean()), 5)


def conclude_rows(rows: Sequence[Row], *, learnt: float) -> Conclusion:
    """Verdict, figures and tables; takes any subset of the rows.

    Args:
        rows: of `measure`, with seed, phase ("prefill" or "decode") and method.
        learnt: accuracy with the whole cache below which nothing is decided.
    """
    found = _Found(rows)
    tables = [found.accuracies("prefill")]
    tables += [found.accuracies("decode")] if found.methods("decode") else []
    tables += [found.by_kind(), found.refused()]
    return Conclusion(_judge(found, learnt), _figures(found), tables)


class _Found:
    """Rows by phase, method and ratio."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.kinds: list[str] = next((list(row["answers"]) for row in rows if "answers" in row), [])
        self.rows: dict[tuple[str, str, float], list[Row]] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        for row in rows:
            if "refused" in row:
                self.reasons[row["phase"], row["method"]] = row["refused"]
            else:
                self.rows.setdefault((row["phase"], row["method"], row["ratio"]), []).append(row)

    def ratios(self, phase: str) -> list[float]:
        """Those that something was asked at."""
        return sorted({ratio for where, _, ratio in self.rows if where == phase and ratio})

    def methods(self, phase: str) -> list[str]:
        """Those with rows, in their order, the whole cache left out."""
        return list(dict.fromkeys(method for where, method, _ in self.rows if where == phase and method != DENSE))

    def values(self, phase: str, method: str, ratio: float, kind: str | None = None) -> list[float]:
        """Accuracy of each seed; of one kind, or the mean over all."""
        chosen = self.kinds if kind is None else (kind,)
        rows = self.rows.get((phase, method, ratio), [])
        return [sum(row["right"][name] / row["answers"][name] for name in chosen) / len(chosen) for row in rows]

    def accuracy(self, method: str, ratio: float = DECIDING, phase: str = "prefill", kind: str | None = None) -> float | None:
        """Mean of the seeds."""
        return _mean(self.values(phase, method, ratio, kind))

    def other(self, name: str, phase: str, method: str, ratio: float = DECIDING) -> float | None:
        """Mean over seeds of another quantity."""
        return _mean([row[name] for row in self.rows.get((phase, method, ratio), []) if row[name] is not None])

    def accuracies(self, phase: str) -> Row:
        """Method x ratio."""
        ratios = self.ratios(phase)
        cells = [
            [
                method, *(_written(self.accuracy(method, ratio, phase)) for ratio in ratios),
                _written(self.other("held", phase, method)), _written(self.other("error", phase, method)),
            ]
            for method in self.methods(phase)
        ]  # fmt: skip
        place = 1 + ratios.index(DECIDING) if DECIDING in ratios else 1
        cells.sort(key=lambda cell: cell[place] or "", reverse=True)
        headers = ["method", *(f"{ratio:g}" for ratio in ratios), f"held at {DECIDING}", f"error at {DECIDING}"]
        note = (
            "Accuracy by the ratio that is removed; share of keys held, and relative error of the hidden states of questions."
        )
        when = {"prefill": "after the prefill", "decode": "while the context comes in"}[phase]
        return table(f"Compressed {when}", headers, cells, note)

    def by_kind(self) -> Row:
        """Method x kind at the ratio that decides."""
        cells = [
            [method, *(_written(self.accuracy(method, kind=kind)) for kind in self.kinds)] for method in self.methods("prefill")
        ]
        whole = [DENSE, *(_written(self.accuracy(DENSE, 0.0, kind=kind)) for kind in self.kinds)]
        return table(f"Kinds of questions, ratio {DECIDING}", ["method", *self.kinds], [whole, *cells])

    def refused(self) -> Row:
        """What was not measured, and why."""
        cells = [[method, phase, reason] for (phase, method), reason in self.reasons.items()]
        return table("Not served", ["method", "phase", "reason"], cells)


def _judge(found: _Found, learnt: float) -> Verdict:
    whole = found.accuracy(DENSE, 0.0)
    expected = found.accuracy(MAIN[0])
    others = {name: found.accuracy(name) for name in MAIN[1:]}
    pairs = [(found.accuracy(f"adakv:{name}"), found.accuracy(name)) for name in ADAPTED]
    mean = found.accuracy(_MEAN)
    oracle = _largest([found.accuracy(name) for name in ORACLES])
    fair = [name for name in found.methods("prefill") if name not in ORACLES and _fair(found, name)]
    best = max(fair, key=lambda name: found.accuracy(name) or 0.0, default=None)
    if whole is None or whole < learnt:
        numbers: dict[str, float | None] = {"whole cache": whole}
        return Verdict("undecided", "With the whole cache the model does not answer well enough to tell.", numbers)
    known = [expected, mean, oracle, *others.values(), *(value for pair in pairs for value in pair)]
    numbers = {"whole cache": whole, "expected attention": expected, **others, "mean form": mean, "oracle": oracle}
    if expected is None or mean is None or oracle is None or best is None or any(value is None for value in known):
        return Verdict("undecided", "Some of the methods that are compared are missing.", numbers)
    ahead = all(value is not None and expected >= value for value in others.values())
    gain = sum(a - b for a, b in pairs if a is not None and b is not None) / len(pairs)
    top = found.accuracy(best) or 0.0
    numbers |= {"gain of shared budgets": gain, f"best method, {best}": top}
    told = ", ".join(f"{name} {value:.3f}" for name, value in others.items())
    checks = {
        f"expected attention {expected:.3f} ({told})": ahead,
        f"budgets shared by heads {gain:+.3f}": gain >= 0,
        f"moment form less mean form {expected - mean:+.3f}": expected >= mean,
        f"oracle {oracle:.3f}, best method {best} {top:.3f}": oracle >= top,
    }
    held = "; ".join(f"{text}: {'yes' if check else 'no'}" for text, check in checks.items())
    reason = f"Accuracy with half of the keys, {whole:.3f} with all: {held}."
    right = sum(checks.values())
    outcome = "holds" if right == len(checks) else "holds in part" if right else "does not hold"
    return Verdict(outcome, reason, numbers)  # type: ignore[arg-type]


def _fair(found: _Found, method: str) -> bool:
    """Whether it holds no more than the ratio leaves."""
    held = found.other("held", "prefill", method)
    return held is not None and held <= 1 - DECIDING + _SLACK


def _figures(found: _Found) -> list[Row]:
    note = "Mean of the seeds, and their range."
    ratios = found.ratios("prefill")
    shown = (*MAIN, "adakv:expected_attention", "random", "oracle")
    figures = [
        lines(
            "Accuracy after the prefill was compressed", "ratio removed", "accuracy",
            {name: [(ratio, found.values("prefill", name, ratio)) for ratio in ratios] for name in shown}, note=note,
        ),
        lines(
            "Reconstruction error", "ratio removed", "|h - h'| / |h|",
            {name: [(ratio, _listed(found.other("error", "prefill", name, ratio))) for ratio in ratios] for name in shown},
            note="Hidden states of the questions, mean over layers.",
        ),
    ]  # fmt: skip
    for phase in ("prefill", "decode"):
        methods = sorted(found.methods(phase), key=lambda name: -(found.accuracy(name, phase=phase) or 0.0))
        for start in range(0, len(methods), _ROWS):
            some = methods[start : start + _ROWS]
            values = [[found.accuracy(name, ratio, phase) for ratio in found.ratios(phase)] for name in some]
            title = f"Accuracy, {phase}, methods {start + 1} to {start + len(some)}"
            columns = [f"{ratio:g}" for ratio in found.ratios(phase)]
            figures.append(heat(title, "ratio removed", "", values, quantity="accuracy", columns=columns, rows=some))
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _listed(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _written(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
