"""System 4: does entmax keep finding pairs in sequences longer than those it was trained on?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnkit._core.checks import check_choice
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import lines, spread, table
from attnkit.lab.claims.place import Place

__all__ = ["CLAIM"]

NORMS = ("softmax", "entmax")
# the mixers of both layers: a short rotated window or all before, rotated or with the causal mask alone
POSITIONS = {
    "local": ("sliding_{}", "{}_nope"),
    "first": ("{}", "{}_nope"),
    "both": ("{}", "{}"),
    "none": ("{}_nope", "{}_nope"),
}
_WINDOW = 8  # tokens that a local layer sees
_LEARNT = 0.95  # accuracy at the trained length below which a model says nothing of longer ones


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Attributes:
        trained: tokens of training examples; the shortest come first.
        lengths: that are judged.
        positions: of POSITIONS: a first layer that sees 8 tokens ("local"), rotary embeddings in the first layer or in both, or
            none.
        alphabet: keys, and values; at least a quarter of the longest length.
        tokens: to train on.
        row_tokens: of a step.
        dim, heads: of the two layers.
        alpha: of entmax.
        learning_rate: of the recipe.
        examples: judged at each length.
        seeds: of weights, training and judging.
    Raises:
        OptionError: unknown positions.
    """

    trained: tuple[int, ...] = (16, 32, 64)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    positions: tuple[str, ...] = ("local",)
    alphabet: int = 512
    tokens: int = 2_500_000
    row_tokens: int = 2048
    dim: int = 64
    heads: int = 2
    alpha: float = 1.5
    learning_rate: float = 2e-3
    examples: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in self.positions:
            check_choice("positions", name, tuple(POSITIONS))


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"seed {seed}, {positions}, {norm}", settings.tokens, partial(_measure, settings, seed, positions, norm))
        for seed in settings.seeds
        for positions in settings.positions
        for norm in NORMS
    ]


def _measure(settings: Settings, seed: int, positions: str, norm: str, place: Place) -> list[Row]:
    from attnkit import training
    from attnkit.training.judge import judge_task

    name = f"seed {seed}, {positions}, {norm}"
    steps = max(1, settings.tokens // settings.row_tokens)
    task = training.TASKS["mqar"](alphabet=settings.alphabet)  # type: ignore[call-arg]
    data = training.TaskData.make(
        task, settings.trained, row_tokens=settings.row_tokens, rows=steps, seed=seed, validation_rows=2
    )
    recipe = training.Recipe(
        steps=steps, learning_rate=settings.learning_rate, precision=place.precision, seed=seed, log_every=min(50, steps)
    )
    place.train(name, _model(settings, seed, positions, norm), data, recipe)
    found = judge_task(
        place.run_folder(name), task, settings.lengths, examples=settings.examples, seed=seed, device=str(place.device)
    )
    kept = ("length", "accuracy", "right", "answers", "examples", "chance")
    return [{"seed": seed, "positions": positions, "norm": norm} | {key: row[key] for key in kept} for row in found]


def _model(settings: Settings, seed: int, positions: str, norm: str) -> Any:
    import torch

    from attnkit.models import AttnkitDecoderConfig, AttnkitDecoderForCausalLM

    kind = {"softmax": "attention", "entmax": "entmax"}[norm]
    extra: dict[str, Any] = {"entmax_alpha": settings.alpha}  # what the mixer reads
    config = AttnkitDecoderConfig(
        vocab_size=2 * settings.alphabet,
        hidden_size=settings.dim,
        intermediate_size=-(-8 * settings.dim // 48) * 16,
        num_hidden_layers=2,
        num_attention_heads=settings.heads,
        max_position_embeddings=max(*settings.lengths, *settings.trained),
        mixer_types=[mixer.format(kind) for mixer in POSITIONS[positions]],
        sliding_window=_WINDOW,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttnkitDecoderForCausalLM(config)


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    def accuracies(positions: str, norm: str, length: int) -> list[float]:
        chosen = [row for row in rows if (row["positions"], row["norm"], row["length"]) == (positions, norm, length)]
        return [row["accuracy"] for row in chosen]

    figures = [
        lines(
            f"Recall beyond {max(settings.trained)} tokens, positions: {positions}",
            "tokens", "share of answers right",
            {norm: [(length, accuracies(positions, norm, length)) for length in settings.lengths] for norm in NORMS},
            log_x=True, marks=[max(settings.trained)],
            note="Mean of the seeds, and their range. The line marks the longest length of training.",
        )
        for positions in settings.positions
    ]  # fmt: skip
    cells = []
    for positions in settings.positions:
        for norm in NORMS:
            found = [accuracies(positions, norm, length) for length in settings.lengths]
            cells.append([positions, norm, *(_written(values) for values in found)])
    headers = ["positions", "norm", *(f"{length} tokens" for length in settings.lengths)]
    note = "Share of answers that are right: mean of the seeds (least to most)."
    return Conclusion(_judge(settings, rows), figures, [table("Accuracy by length", headers, cells, note)])


def _written(values: list[float]) -> str | None:
    if not values:
        return None
    of = spread(values)
    return f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"


def _judge(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """A form of positions holds where every seed gains on the mean over the longer lengths, and fails where none does."""
    longer = [length for length in settings.lengths if length > max(settings.trained)]
    accuracy = {(row["positions"], row["norm"], row["seed"], row["length"]): row["accuracy"] for row in rows}
    numbers: dict[str, float | None] = {}
    wins: list[str] = []
    judged = 0
    for positions in settings.positions:
        gains = []
        for seed in settings.seeds:
            pairs = [[accuracy.get((positions, norm, seed, length)) for norm in NORMS] for length in longer]
            learnt = [accuracy.get((positions, norm, seed, max(settings.trained))) or 0.0 for norm in NORMS]
            if min(learnt) >= _LEARNT and all(value is not None for pair in pairs for value in pair):
                gains.append(sum(pair[1] - pair[0] for pair in pairs) / len(longer))  # type: ignore[operator]
        if len(gains) < len(settings.seeds):
            numbers[f"gain, {positions}"] = None
            continue
        judged += 1
        numbers[f"gain, {positions}"] = sum(gains) / len(gains)
        numbers[f"least gain of a seed, {positions}"] = min(gains)
        wins += ["all" if min(gains) > 0 else "none" if max(gains) <= 0 else "some"]
    if not judged:
        return Verdict("undecided", "No form of positions has learnt the trained length with every seed.", numbers)
    told = "; ".join(f"{name} {value:+.3f}" for name, value in numbers.items() if value is not None)
    reason = f"Accuracy of entmax less that of softmax, mean over {'/'.join(map(str, longer))} tokens: {told}."
    if set(wins) == {"all"}:
        return Verdict("holds", reason, numbers)
    if set(wins) == {"none"}:
        return Verdict("does not hold", reason, numbers)
    return Verdict("holds in part" if "all" in wins else "undecided", reason, numbers)


CLAIM = Claim(
    name="entmax-recall",
    systems=(4,),
    says="entmax attention generalises to longer contexts than it was trained on better than softmax attention does",
    source="Goncalves et al. 2025 (arXiv:2502.12082), arXiv:2604.15180 and arXiv:2506.16640",
    protocol=(
        "Two layers, associative recall with up to 16 pairs, equal steps and weights at the start; judged on up to 512 pairs. "
        "The first layer sees 8 tokens, so that all that changes with the length is what the second one chooses from. It holds "
        "if entmax has the higher mean accuracy over the longer lengths with every seed."
    ),
    minutes=10,
    device="cpu",
    settings=Settings,
    quick={
        "trained": (16,), "lengths": (16, 32), "tokens": 2048, "row_tokens": 256, "dim": 32,
        "examples": 16, "seeds": (0,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
