"""System 2: language models of the mLSTM with exponential and with sigmoid gates, beside softmax and linear attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import lines, spread, table
from attnkit.lab.claims.language import LanguageSettings, mean_of, train_arm
from attnkit.lab.claims.place import Place
from attnkit.report import interval

__all__ = ["CLAIM"]

# the input gate's bias begins near 0, as published for small models
MIXERS = {
    "softmax": "attention",
    "mlstm exp": "mlstm:igate_bias_init=null",
    "mlstm sigmoid": "mlstm_sigmoid:igate_bias_init=null",
    "lightning": "lightning",
    "simple gla": "simple_gla",
}
_GATES, _SOFTMAX = 0.01, 0.03  # of the loss


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """As of `LanguageSettings`; 0.5 M parameters."""

    text: str = "novels"
    dim: int = 128
    layers: int = 2
    heads: int = 4
    lengths: tuple[int, ...] = (256,)
    step_tokens: int = 4096
    steps: int = 240
    learning_rate: float = 2e-3
    validations: int = 8
    seeds: tuple[int, ...] = (0, 1)


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"{length} tokens, seed {seed}, {arm}", settings.steps, partial(_measure, settings, length, seed, arm))
        for seed in settings.seeds
        for length in settings.lengths
        for arm in MIXERS
    ]


def _measure(settings: Settings, length: int, seed: int, arm: str, place: Place) -> list[Row]:
    row, _, _ = train_arm(settings, place, f"{length} tokens, seed {seed}, {arm}", MIXERS[arm], length, seed)
    return [row | {"arm": arm}]


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    numbers: dict[str, float | None] = {}
    cells: list[list[Any]] = []
    figures = []
    for length in sorted(settings.lengths):
        found = {arm: [row for row in rows if (row["arm"], row["length"]) == (arm, length)] for arm in MIXERS}
        losses = {arm: mean_of(chosen, "validation_loss") for arm, chosen in found.items()}
        numbers[f"sigmoid over exp at {length}"] = _above(losses["mlstm sigmoid"], losses["mlstm exp"])
        for end, pick in (("least", min), ("largest", max)):
            gaps = _by_seed(found["mlstm sigmoid"], found["mlstm exp"])
            numbers[f"sigmoid over exp at {length}, {end} of the seeds"] = pick(gaps) if gaps else None
        for arm in list(MIXERS)[1:]:
            numbers[f"{arm} over softmax at {length}"] = _above(losses[arm], losses["softmax"])
        for arm, chosen in found.items():
            of = spread([row["validation_loss"] for row in chosen]) if chosen else None
            loss = None if of is None else interval(of["mean"], of["low"], of["high"], 3)
            over = _above(losses[arm], losses["softmax"])
            percent = None if over is None else f"{100 * over:+.2f}"
            cells.append([f"{length:,}", arm, mean_of(chosen, "parameters"), loss, percent, mean_of(chosen, "step_ms")])
        curves = {arm: _curve(chosen) for arm, chosen in found.items()}
        figures.append(lines(f"Loss on the way at {length:,} tokens", "step", "validation loss, nats a byte", curves))
    headers = ["tokens", "arm", "parameters", "loss, nats", "over softmax, %", "ms a step"]
    note = "Loss on what was kept apart, nats a byte: mean over seeds, from the least to the largest."
    return Conclusion(_judge(settings, numbers), figures, [table("Gates and mixers", headers, cells, note)])


def _above(loss: float | None, base: float | None) -> float | None:
    """How much larger a loss is, as a share."""
    return None if loss is None or base is None else loss / base - 1


def _by_seed(rows: Sequence[Row], base: Sequence[Row]) -> list[float]:
    """How much larger the loss of each seed is than that of the same seed, as a share."""
    losses = {row["seed"]: row["validation_loss"] for row in base}
    return [row["validation_loss"] / losses[row["seed"]] - 1 for row in rows if row["seed"] in losses]


def _curve(rows: Sequence[Row]) -> list[tuple[float, list[float]]]:
    """(step, losses of all seeds) along the runs."""
    return [(step, [dict(row["curve"])[step] for row in rows]) for step, _ in rows[0]["curve"]] if rows else []


def _judge(settings: Settings, numbers: dict[str, float | None]) -> Verdict:
    gates, softmax = [], []
    for length in settings.lengths:
        gates.append(numbers[f"sigmoid over exp at {length}"])
        softmax += [numbers[f"mlstm {gate} over softmax at {length}"] for gate in ("exp", "sigmoid")]
    known, above = ([value for value in values if value is not None] for values in (gates, softmax))
    if len(known) < len(gates) or len(above) < len(softmax):
        return Verdict("undecided", "Trainings are missing.", numbers)
    apart = max(known, key=abs)
    seeds = [value for name, value in numbers.items() if name.endswith("of the seeds") and value is not None]
    reason = (
        f"The loss with sigmoid gates is {apart:+.2%} apart from that with exponential ones ({min(seeds):+.2%} to "
        f"{max(seeds):+.2%} with single seeds), and the mLSTM's {min(above):+.2%} to {max(above):+.2%} apart from softmax's."
    )
    close, good = abs(apart) <= _GATES, max(above) <= _SOFTMAX
    return Verdict("holds" if close and good else "holds in part" if close or good else "does not hold", reason, numbers)


CLAIM = Claim(
    name="mlstm-lm",
    systems=(2,),
    says="with a sigmoid input gate and no normaliser the mLSTM models language as well as with exponential gates",
    source="Beck et al. 2025 (arXiv:2503.14376); Beck et al. 2025 (arXiv:2503.13427)",
    protocol=(
        "Byte models of the same depth and width, the same steps and rows, a constant learning rate, full contexts; the "
        f"input gate's bias begins near 0. It holds if the losses of the two gates are at most {_GATES:.0%} apart and neither "
        f"is more than {_SOFTMAX:.0%} above softmax's, at every length; in part if one of both is so."
    ),
    minutes=10,
    device="cpu",
    settings=Settings,
    quick={
        "dim": 32, "heads": 2, "lengths": (64,), "step_tokens": 256, "steps": 4, "validations": 2, "validation_rows": 1,
        "seeds": (0,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
