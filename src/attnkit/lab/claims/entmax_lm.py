"""System 4: a language model with entmax against one with softmax: loss, time of a step, and what is zero."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnkit import ops
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import heat, lines, table
from attnkit.lab.claims.language import LanguageSettings, mean_of, read, train_arm
from attnkit.lab.claims.place import Place
from attnkit.lab.numerics.localiser import changed
from attnkit.modules import EntmaxAttention

if TYPE_CHECKING:
    from attnkit.training import TextData

__all__ = ["CLAIM", "sparsity"]

MIXERS = {"softmax": "attention", "entmax": "entmax"}
_GAP = 0.02  # nats a byte
_RATIO = 0.95  # softmax's time over entmax's; the paper's models: 0.98 s / 1.03 s


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """As of `LanguageSettings`; 25 M parameters."""


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"{length} tokens, seed {seed}, {norm}", settings.steps, partial(_measure, settings, length, seed, norm))
        for seed in settings.seeds
        for length in settings.lengths
        for norm in MIXERS
    ]


def _measure(settings: Settings, length: int, seed: int, norm: str, place: Place) -> list[Row]:
    row, model, data = train_arm(settings, place, f"{length} tokens, seed {seed}, {norm}", MIXERS[norm], length, seed)
    row |= {"norm": norm}
    return [row | (sparsity(model, data, length, place.precision) if norm == "entmax" else {})]


def sparsity(model: Any, data: "TextData", length: int, precision: str) -> Row:
    """What share of attention is zero in each layer and head, on text that was kept apart.

    Args:
        model: with `EntmaxAttention` layers.
        data: whose validation text is read.
        length: tokens.
        precision: "bf16" or "fp32".
    Returns:
        `element` and `tile` [layers][heads], see `attnkit.ops.attention_sparsity`; `support` [layers][heads], keys of a row.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, EntmaxAttention)}
    found: list[dict[str, list[float]]] = []

    def watched(operator: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            result = operator(*args, **options, return_aux=True)
            found.append({name: [round(x, 4) for x in of.tolist()] for name, of in ops.attention_sparsity(result).items()})
            out: Tensor = result.out
            return out

        return call

    with changed(layers, dict.fromkeys(layers, watched)):
        read(model, data, length, precision)
    return {name: [entry[name] for entry in found] for name in ("element", "tile", "support")}


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    lengths = sorted(settings.lengths)
    cells: list[list[Any]] = []
    numbers: dict[str, float | None] = {}
    zeros: dict[str, list[tuple[float, list[float]]]] = {"pairs": [], "tiles of 64 x 64": []}
    for length in lengths:
        soft, ent = ([row for row in rows if (row["norm"], row["length"]) == (norm, length)] for norm in MIXERS)
        losses, times = ([mean_of(one, field) for one in (soft, ent)] for field in ("validation_loss", "step_ms"))
        gap = None if losses[0] is None or losses[1] is None else losses[1] - losses[0]
        ratio = None if times[0] is None or times[1] is None else times[0] / times[1]
        numbers |= {f"loss gap at {length}": gap, f"step-time ratio at {length}": ratio}
        shares = [[_mean(row[name]) for row in ent] for name in ("element", "tile")]
        for points, values in zip(zeros.values(), shares, strict=True):
            points.append((length, values))
        means = [sum(values) / len(values) if values else None for values in shares]
        cells.append([f"{length:,}", *losses, gap, *times, ratio, *means])
    headers = [
        "tokens",
        "softmax, nats",
        "entmax, nats",
        "gap",
        "softmax, ms",
        "entmax, ms",
        "ratio",
        "zero pairs",
        "zero tiles",
    ]
    note = (
        "Loss on what was kept apart; milliseconds of a step, and softmax's over entmax's; shares of pairs, and of tiles of 64 "
        "rows and 64 keys, that got nothing."
    )
    figures = [lines("What is zero, mean over layers and heads", "tokens", "share", zeros, log_x=True)]
    longest = [row for length in lengths for row in rows if row["length"] == length and "tile" in row][-1:]
    for name, what in (("element", "pairs"), ("tile", "tiles")):
        figures += [_map(row, name, f"Share of {what} that is zero at {row['length']:,} tokens") for row in longest]
    return Conclusion(_judge(numbers, lengths), figures, [table("Softmax and entmax", headers, cells, note)])


def _mean(values: Sequence[Sequence[float]]) -> float:
    return math.fsum(map(math.fsum, values)) / sum(map(len, values))  # the same in every version of Python


def _map(row: Row, name: str, title: str) -> dict[str, Any]:
    values = row[name]
    heads, layers = [str(head) for head in range(len(values[0]))], [str(layer) for layer in range(len(values))]
    return heat(title, "head", "layer", values, quantity="share", columns=heads, rows=layers, digits=2)


def _judge(numbers: dict[str, float | None], lengths: Sequence[int]) -> Verdict:
    gaps, ratios = ([numbers[f"{what} at {length}"] for length in lengths] for what in ("loss gap", "step-time ratio"))
    known_gaps, known_ratios = ([value for value in values if value is not None] for values in (gaps, ratios))
    if len(known_gaps) < len(lengths) or len(known_ratios) < len(lengths):
        return Verdict("undecided", "Trainings are missing.", numbers)
    reason = (
        f"Entmax's loss less softmax's is {min(known_gaps):+.3f} to {max(known_gaps):+.3f} nats a byte over the lengths; "
        f"softmax's time of a step over entmax's is {min(known_ratios):.2f} to {max(known_ratios):.2f}."
    )
    good, quick = max(known_gaps) <= _GAP, min(known_ratios) >= _RATIO
    return Verdict("holds" if good and quick else "holds in part" if good or quick else "does not hold", reason, numbers)


CLAIM = Claim(
    name="entmax-lm",
    systems=(4,),
    says="language models with entmax reach softmax's loss in steps that take about as long, and most of attention is zero",
    source="Goncalves et al. 2025 (arXiv:2502.12082), table 4; arXiv:2604.15180",
    protocol=(
        "Two byte models of 25 M parameters, the same steps and rows, a constant learning rate, full contexts. It holds if "
        f"entmax's loss is at most {_GAP} nats above softmax's and softmax's time over entmax's at least {_RATIO}, at every "
        "length; in part if one of both is so."
    ),
    minutes=3,
    device="cuda",
    settings=Settings,
    quick={
        "dim": 32, "layers": 2, "heads": 2, "lengths": (64, 128), "step_tokens": 256, "steps": 4, "validations": 2,
        "validation_rows": 1,
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
