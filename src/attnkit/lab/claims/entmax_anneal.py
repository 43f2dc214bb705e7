"""System 4: a softmax model becomes an entmax model, gradually or at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import lines, spread, table
from attnkit.lab.claims.place import Place
from attnkit.modules import AlphaSchedule

__all__ = ["CLAIM"]

ARMS = ("softmax", "jump", "anneal")
_SPIKE = 0.05  # nats above the softmax model that are a spike
_WINDOW = 4  # steps over which losses are averaged


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Attributes:
        text: what is read, byte by byte.
        dim, layers, heads, context: of the model.
        batch: contexts a step.
        base_steps: of the softmax model that the arms go on from.
        steps: of each arm.
        anneal_steps: in which alpha goes from 1 to `alpha`.
        alpha: of entmax.
        base_rate, rate: learning rates of the base and of the arms.
        seeds: of weights and order.
    """

    text: str = "novels"
    dim: int = 128
    layers: int = 4
    heads: int = 2
    context: int = 256
    batch: int = 8
    base_steps: int = 400
    steps: int = 160
    anneal_steps: int = 100
    alpha: float = 1.5
    base_rate: float = 4e-3
    rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def _cells(settings: Settings) -> list[Cell]:
    cells = []
    for seed in settings.seeds:
        cells.append(Cell(f"seed {seed}, base", settings.base_steps, partial(_base, settings, seed)))
        cells += [Cell(f"seed {seed}, {arm}", settings.steps, partial(_arm, settings, seed, arm)) for arm in ARMS]
    return cells


def _base(settings: Settings, seed: int, place: Place) -> list[Row]:
    document = _train(settings, seed, "base", place)
    return [{"seed": seed, "arm": "base", "validation_loss": document["rows"][-1]["validation_loss"]}]


def _arm(settings: Settings, seed: int, arm: str, place: Place) -> list[Row]:
    document = _train(settings, seed, arm, place)
    lines = document["rows"]
    return [
        {
            "seed": seed, "arm": arm, "validation_loss": lines[-1]["validation_loss"],
            "losses": [round(line["loss"], 4) for line in lines],
        }
    ]  # fmt: skip


def _train(settings: Settings, seed: int, arm: str, place: Place) -> Row:
    """The base has a recipe with a decay; arms begin with its weights, keep a constant rate, and read the same rows."""
    from attnkit import training

    base = arm == "base"
    steps = settings.base_steps if base else settings.steps
    data = place.text(
        settings.text, row_tokens=settings.batch * settings.context, length=settings.context, rows=steps,
        seed=seed,
    )  # fmt: skip
    model = training.new_model(
        vocab_size=data.vocab_size, dim=settings.dim, layers=settings.layers, heads=settings.heads, positions=settings.context,
        mixer="attention" if arm in ("base", "softmax") else "entmax", seed=seed,
    )  # fmt: skip
    alpha = None
    if not base:
        model.load_state_dict(place.load(f"seed {seed}, base").state_dict())
    if arm in ("jump", "anneal"):
        warmup = settings.anneal_steps * settings.batch * settings.context if arm == "anneal" else 0
        alpha = AlphaSchedule(settings.alpha, warmup_tokens=warmup)
    recipe = training.Recipe(
        steps=steps, learning_rate=settings.base_rate if base else settings.rate, decay=0.2 if base else 0.0, seed=seed,
        precision=place.precision, log_every=min(50, steps) if base else 1,
    )  # fmt: skip
    return place.train(f"seed {seed}, {arm}", model, data, recipe, alpha=alpha, validation_rows=32)


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    found = {(row["seed"], row["arm"]): row for row in rows}
    excess = {
        (seed, arm): [a - b for a, b in zip(_smooth(found[seed, arm]), _smooth(found[seed, "softmax"]), strict=True)]
        for seed in settings.seeds
        for arm in ARMS[1:]
        if (seed, arm) in found and (seed, "softmax") in found
    }
    over: dict[str, list[tuple[float, list[float]]]] = {}
    for arm in ARMS[1:]:
        curves = [excess[seed, arm] for seed in settings.seeds if (seed, arm) in excess]
        over[f"{arm} to alpha {settings.alpha:g}"] = [
            (index + 1, list(values)) for index, values in enumerate(zip(*curves, strict=True))
        ]
    note = f"Mean over {_WINDOW} steps on the same rows; mean and range of the seeds. The line marks the end of the schedule."
    figure = lines(
        "Loss above that of the model that stays with softmax",
        "step",
        "nats a byte",
        over,
        marks=[settings.anneal_steps],
        note=note,
    )
    cells = []
    for arm in ("base", *ARMS):
        losses = [found[seed, arm]["validation_loss"] for seed in settings.seeds if (seed, arm) in found]
        spikes = [max(excess[seed, arm]) for seed in settings.seeds if (seed, arm) in excess]
        cells.append([arm, *(None if not values else _written(values) for values in (losses, spikes))])
    headers = ["arm", "validation loss, nats", "highest loss above softmax, nats"]
    written = table("Ends and spikes", headers, cells, "Mean of the seeds (least to most).")
    return Conclusion(_judge(settings, excess, found), [figure], [written])


def _smooth(row: Row) -> list[float]:
    losses = row["losses"]
    return [sum(part) / len(part) for part in (losses[max(0, end - _WINDOW) : end] for end in range(1, len(losses) + 1))]


def _written(values: list[float]) -> str:
    of = spread(values)
    return f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"


def _judge(settings: Settings, excess: dict[tuple[int, str], list[float]], found: dict[tuple[int, str], Row]) -> Verdict:
    spikes = {arm: [max(excess[seed, arm]) for seed in settings.seeds if (seed, arm) in excess] for arm in ARMS[1:]}
    if not all(len(values) == len(settings.seeds) for values in spikes.values()):
        return Verdict("undecided", "Arms are missing.")
    numbers: dict[str, float | None] = {}
    for arm, values in spikes.items():
        numbers[f"highest loss above softmax, {arm}"] = sum(values) / len(values)
        ends = [found[seed, arm]["validation_loss"] - found[seed, "softmax"]["validation_loss"] for seed in settings.seeds]
        numbers[f"validation loss above softmax at the end, {arm}"] = sum(ends) / len(ends)
    told = "; ".join(f"{name} {value:+.3f}" for name, value in numbers.items() if value is not None)
    reason = f"Nats, mean over {len(settings.seeds)} seeds: {told}."
    if min(spikes["jump"]) <= _SPIKE:
        return Verdict("undecided", f"Not even the jump makes a spike with every seed. {reason}", numbers)
    if max(spikes["anneal"]) <= _SPIKE:
        return Verdict("holds", reason, numbers)
    less = all(soft < hard / 2 for soft, hard in zip(spikes["anneal"], spikes["jump"], strict=True))
    return Verdict("holds in part" if less else "does not hold", reason, numbers)


CLAIM = Claim(
    name="entmax-anneal",
    systems=(4,),
    says="a softmax model is continued with entmax without a spike in the loss when alpha is annealed from 1",
    source="Goncalves et al. 2025 (arXiv:2502.12082), section 4",
    protocol=(
        "A byte model trained with softmax goes on in three ways on the same rows: with softmax, with entmax at once, and with "
        f"alpha rising from 1. It holds if with every seed the jump costs more than {_SPIKE} nats somewhere and annealing "
        "never does; in part if annealing at least halves the spike."
    ),
    minutes=15,
    device="cpu",
    settings=Settings,
    quick={
        "dim": 32, "layers": 1, "context": 32, "batch": 4, "base_steps": 6, "steps": 6, "anneal_steps": 4, "seeds": (0,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
