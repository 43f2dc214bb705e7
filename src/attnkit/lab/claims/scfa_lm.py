"""System 5: language models whose heads meet in hash buckets or drop rows, against dense attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnkit import ops
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import heat, lines, table
from attnkit.lab.claims.language import LanguageSettings, at_time, mean_of, read, train_arm
from attnkit.lab.claims.place import Place
from attnkit.modules import LSHHasher, RandomDrop

if TYPE_CHECKING:
    from attnkit.training import TextData

__all__ = ["CLAIM"]

DENSE = "dense"
_GAP = 0.02  # nats a byte
_PAPER = {8192: 2.0, 16384: 3.3}  # times faster
_GRID, _SHOWN = 64, 4096  # tiles of the picture, tokens that it shows


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """As of `LanguageSettings`; about 31 M parameters.

    Attributes:
        buckets: of the hashed models.
        drops: shares of queries and of keys that are dropped.
    """

    layers: int = 10
    lengths: tuple[int, ...] = (16384, 8192)
    steps: int = 80
    validations: int = 8
    buckets: tuple[int, ...] = (16, 8)
    drops: tuple[float, ...] = (0.5, 0.3)


def _mixers(settings: Settings) -> dict[str, str]:
    """Arm -> mixer, in the paper's form: keys are queries of length 1."""
    hashed = {f"hash {n}": f"hash_sparse_attention:num_buckets={n}:qk_shared=true" for n in settings.buckets}
    dropped = {f"drop {rate:g}": f"drop_sparse_attention:drop_rate={rate}:qk_shared=true" for rate in settings.drops}
    return {DENSE: "attention"} | hashed | dropped


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"{arm}, {length} tokens, seed {seed}", settings.steps, partial(_measure, settings, arm, mixer, length, seed))
        for seed in settings.seeds
        for arm, mixer in _mixers(settings).items()
        for length in settings.lengths
    ]


def _measure(settings: Settings, arm: str, mixer: str, length: int, seed: int, place: Place) -> list[Row]:
    row, model, data = train_arm(settings, place, f"{arm}, {length} tokens, seed {seed}", mixer, length, seed)
    return [row | {"arm": arm} | ({} if arm == DENSE else _look(model, data, length, place.precision))]


def _look(model: Any, data: "TextData", length: int, precision: str) -> Row:
    """How full tiles are on text that was kept apart: `step_share` and `wanted` (means over layers), and of hashes `skew`."""
    seen: list[Tensor] = []

    def listen(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out if isinstance(module, LSHHasher) else out.keep)

    parts = [part for part in model.modules() if isinstance(part, LSHHasher | RandomDrop)]
    hooks = [part.register_forward_hook(listen) for part in parts]
    try:
        read(model, data, length, precision)
    finally:
        for hook in hooks:
            hook.remove()
    hasher = parts[0] if isinstance(parts[0], LSHHasher) else None
    heads = seen[0].shape[2]
    x = torch.zeros(1, length, heads, 16, device=seen[0].device)
    if hasher is not None:
        found = [ops.occupancy("hash_sparse_attention", x, x, x, ids, ids, num_buckets=hasher.num_buckets) for ids in seen]
    else:
        pairs = zip(seen[::2], seen[1::2], strict=True)
        found = [ops.occupancy("qk_sparse_attention", x, x, x, *pair) for pair in pairs]
    row: Row = {name: sum(getattr(of, name) for of in found) / len(found) for name in ("step_share", "wanted", "density")}
    if hasher is not None:
        row["skew"] = [[round(_skew(ids[0, :, head], hasher.num_buckets), 3) for head in range(heads)] for ids in seen]
        row["tiles"] = _tiles(seen[0][0, :_SHOWN, 0])
    return row


def _skew(ids: Tensor, buckets: int) -> float:
    """The largest bucket over the mean of all: 1 where they are equal, the number of buckets where all is in one."""
    return float(torch.bincount(ids.long(), minlength=buckets).max() * buckets / len(ids))


def _tiles(ids: Tensor) -> list[list[float]]:
    """Share of pairs that are seen in each tile of rows sorted by bucket and place, [_GRID][_GRID] or fewer."""
    order = torch.argsort(ids, stable=True).cpu()
    group = ids.cpu()[order]
    seen = (group[:, None] == group[None]) & (order[None] <= order[:, None])
    size = -(-len(ids) // _GRID)
    count = len(ids) // size
    grid = seen[: count * size, : count * size].view(count, size, count, size).float().mean((1, 3))
    return [[round(value, 2) for value in row] for row in grid.tolist()]


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    arms, lengths = list(_mixers(settings)), sorted(settings.lengths)
    numbers: dict[str, float | None] = {}
    cells = []
    for length in lengths:
        dense = [row for row in rows if (row["arm"], row["length"]) == (DENSE, length)]
        for arm in arms:
            chosen = [row for row in rows if (row["arm"], row["length"]) == (arm, length)]
            speed = _quotient(mean_of(dense, "step_ms"), mean_of(chosen, "step_ms"))
            gap = _difference(mean_of(chosen, "validation_loss"), mean_of(dense, "validation_loss"))
            same = _at_equal_time(dense, chosen)
            if arm != DENSE:
                numbers |= {
                    f"{arm} at {length}: times faster": speed,
                    f"{arm} at {length}: loss gap at equal steps": gap,
                    f"{arm} at {length}: loss gap at equal time": same,
                }
            shares = [mean_of(chosen, name) for name in ("step_share", "wanted")]
            means = [mean_of(chosen, name) for name in ("validation_loss", "step_ms", "peak_mib")]
            cells.append([f"{length:,}", arm, *means, speed, gap, same, *shares])
    headers = [
        "tokens",
        "arm",
        "loss, nats",
        "ms a step",
        "peak MiB",
        "times faster",
        "gap, steps",
        "gap, time",
        "tiles",
        "wanted",
    ]
    note = (
        "Loss on what was kept apart, and how far it is above dense attention's after as many steps, and after as much time "
        "(that of the run that ended first). Tiles: their steps as a share of dense attention's; wanted: pairs in them that "
        "are seen."
    )
    return Conclusion(
        _judge(settings, numbers), _figures(rows, arms, lengths), [table("Dense and sparse", headers, cells, note)]
    )


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _at_equal_time(dense: Sequence[Row], chosen: Sequence[Row]) -> float | None:
    gaps = []
    for row in chosen:
        for base in dense:
            if row["seed"] == base["seed"] and row["step_ms"] and base["step_ms"]:
                seconds = min(one["curve"][-1][0] * one["step_ms"] / 1e3 for one in (row, base))
                gaps.append(_difference(at_time(row, seconds), at_time(base, seconds)))
    known = [gap for gap in gaps if gap is not None]
    return sum(known) / len(known) if known else None


def _figures(rows: Sequence[Row], arms: Sequence[str], lengths: Sequence[int]) -> list[dict[str, Any]]:
    figures = []
    for length in lengths:
        chosen = {arm: [row for row in rows if (row["arm"], row["length"]) == (arm, length)][:1] for arm in arms}
        over = {
            arm: [(step * row["step_ms"] / 1e3, [loss]) for step, loss in row["curve"]]
            for arm, found in chosen.items()
            for row in found
            if row["step_ms"]
        }
        note = "Time of optimizer steps: steps times their median. The first seed."
        figures.append(
            lines(f"Loss over time at {length:,} tokens", "seconds", "validation loss, nats a byte", over, note=note)
        )
    hashed = [row for length in lengths for row in rows if row["length"] == length and "skew" in row][-1:]
    for row in hashed:
        heads, layers = ([str(index) for index in range(count)] for count in (len(row["skew"][0]), len(row["skew"])))
        buckets = float(row["arm"].split()[1])
        figures.append(
            heat(
                f"Largest bucket over the mean, {row['arm']} at {row['length']:,} tokens", "head", "layer", row["skew"],
                quantity="times the mean", columns=heads, rows=layers, bounds=(1.0, buckets), digits=2,
            )
        )  # fmt: skip
        labels = [""] * len(row["tiles"])
        figures.append(
            heat(
                f"Tiles of one head, rows sorted by bucket, {row['arm']}", "keys", "queries", row["tiles"],
                quantity="share seen", columns=labels, rows=labels, digits=2,
                note=f"The first layer and head on at most {_SHOWN:,} tokens.",
            )
        )  # fmt: skip
    return figures


def _judge(settings: Settings, numbers: dict[str, float | None]) -> Verdict:
    """An arm is as good as the paper's where its gap is small and it is as much faster, at every length that the paper has."""
    arms, longest = [arm for arm in _mixers(settings) if arm != DENSE], max(settings.lengths)
    known = {name: value for name, value in numbers.items() if value is not None}
    at_once = f"at {longest}: loss gap at equal time"
    timed = [arm for arm in arms if f"{arm} {at_once}" in known]  # what ends before dense's first validation has none
    if not timed or any(name not in known for name in numbers if not name.endswith("equal time")):
        return Verdict("undecided", "Trainings are missing.", numbers)
    fast = max(arms, key=lambda arm: known[f"{arm} at {longest}: times faster"])
    good = min(timed, key=lambda arm: known[f"{arm} {at_once}"])
    speed, steps = (known[f"{fast} at {longest}: {what}"] for what in ("times faster", "loss gap at equal steps"))
    reason = (
        f"At {longest:,} tokens {fast} is {speed:.2f} times as fast as dense attention and its loss {steps:+.3f} nats apart "
        f"after as many steps; after as much time the best, {good}, is {known[f'{good} {at_once}']:+.3f} nats apart."
    )
    as_paper = [
        arm
        for arm in arms
        if all(
            known[f"{arm} at {length}: times faster"] >= _PAPER.get(length, 1.0)
            and known[f"{arm} at {length}: loss gap at equal steps"] <= _GAP
            for length in settings.lengths
        )
    ]
    if as_paper:
        return Verdict("holds", reason, numbers)
    ahead = [arm for arm in timed if known[f"{arm} {at_once}"] <= 0]
    return Verdict("holds in part" if ahead else "does not hold", reason, numbers)


CLAIM = Claim(
    name="scfa-lm",
    systems=(5,),
    says="training is 2.0 times faster at 8K and 3.3 times at 16K tokens than with FlashAttention, without loss of perplexity",
    source="Pagliardini et al. 2023 (arXiv:2306.01160)",
    protocol=(
        "Byte models of about 31 M parameters (28 M where keys are queries), the same steps and rows, a constant learning "
        "rate, full contexts; hash buckets and dropped rows against dense attention by the fastest kernel here. It holds if an "
        f"arm is as much faster as the paper's and at most {_GAP} nats above dense after as many steps, at every length; in "
        "part if one is ahead of dense after as much time at the longest."
    ),
    minutes=3,
    device="cuda",
    settings=Settings,
    quick={
        "dim": 32, "layers": 2, "heads": 2, "lengths": (128, 64), "step_tokens": 256, "steps": 4, "validations": 2,
        "validation_rows": 1, "buckets": (4,), "drops": (0.5,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
