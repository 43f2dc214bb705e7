"""System 4: encoders with entmax that find documents by one vector."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import lines, spread, table
from attnkit.lab.claims.pairs import VOCABULARY, PairData, PairRows, Pairs, ndcg, split_pairs
from attnkit.lab.claims.place import Place

__all__ = ["CLAIM", "judge"]

_LEARNT = 0.1  # nDCG@10 below which a model finds too little to be compared
_LINES = 10  # of the log


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Attributes:
        source: text asset; the first paragraph of a text is the query for the rest of it.
        least: bytes of the shortest document.
        judged: pairs kept apart; all their documents are ranked for each of their queries.
        lengths: bytes of a document that are read, each with trainings of its own, in the order of their cells.
        alphas: of the encoders' normalisers; 1 is softmax.
        dim, layers, heads: of the encoder.
        pairs: of an optimizer step; the other documents are what a query must not find.
        masked_steps: as a masked language model, once for an alpha and a seed, at the longest length.
        steps: on pairs, after that.
        learning_rate: of both.
        seeds: of weights and draws.
    """

    source: str = "pubmed"
    least: int = 1024
    judged: int = 1024
    lengths: tuple[int, ...] = (2048, 512)
    alphas: tuple[float, ...] = (1.0, 1.5, 2.0)
    dim: int = 256
    layers: int = 4
    heads: int = 4
    pairs: int = 32
    masked_steps: int = 200
    steps: int = 800
    learning_rate: float = 1e-3
    seeds: tuple[int, ...] = (0,)


def _name(length: int, seed: int, alpha: float) -> str:
    return f"{length} bytes, seed {seed}, alpha {alpha:g}"


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(
            _name(length, seed, alpha),
            length * (settings.steps + settings.masked_steps * (length == settings.lengths[0])),
            partial(_measure, settings, length, seed, alpha),
        )
        for length in settings.lengths
        for seed in settings.seeds
        for alpha in settings.alphas
    ]


def _measure(settings: Settings, length: int, seed: int, alpha: float, place: Place) -> list[Row]:
    from attnkit.lab.claims.retriever import Retriever, RetrieverForMaskedLM
    from attnkit.training.model import quiet_transformers

    place.tell(0.0, f"reading {settings.source}")
    trained, held = split_pairs(settings.source, judged=settings.judged, least=settings.least)
    begun = f"masked, seed {seed}, alpha {alpha:g}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        masked, retriever = (kind(_config(settings, alpha)) for kind in (RetrieverForMaskedLM, Retriever))
    before = _train(settings, place, begun, masked, trained, held, max(settings.lengths), seed, settings.masked_steps)
    with quiet_transformers():
        masked = RetrieverForMaskedLM.from_pretrained(place.run_folder(begun) / "model")
    retriever.model.load_state_dict(masked.model.state_dict())
    name = _name(length, seed, alpha)
    document = _train(settings, place, name, retriever, trained, held, length, seed, settings.steps)
    with quiet_transformers():
        judged: Any = Retriever.from_pretrained(place.run_folder(name) / "model")
    found = judge(
        judged.to(place.device).eval(), PairRows(held, count=settings.pairs, length=length, rows=None), place.precision
    )
    times = [line["step_ms_p50"] for line in document["rows"] if line["step_ms_p50"]]
    return [
        {
            "length": length, "seed": seed, "alpha": alpha, "ndcg": found.mean().item(), "queries": len(found),
            "found_first": (found == 1).double().mean().item(), "masked_loss": before["rows"][-1]["validation_loss"],
            "validation_loss": document["rows"][-1]["validation_loss"],
            "step_ms": statistics.median(times[1:] or times) if times else None, "trained_pairs": len(trained.queries),
            "parameters": document["model"]["parameters"],
        }
    ]  # fmt: skip


def _config(settings: Settings, alpha: float) -> Any:
    from attnkit.models import AttnkitEncoderConfig

    extra: dict[str, Any] = {"entmax_alpha": alpha}
    return AttnkitEncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.dim,
        intermediate_size=-(-8 * settings.dim // 48) * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=max(256, *settings.lengths),  # a query may be longer than what is read of documents
        mixer_types=["attention" if alpha == 1 else "entmax"] * settings.layers,
        **extra,
    )


def _train(
    settings: Settings, place: Place, name: str, model: Any, trained: Pairs, held: Pairs, length: int, seed: int, steps: int
) -> dict[str, Any]:
    """As a masked language model or on pairs, as the model is; what was done before is found done."""
    from attnkit.lab.claims.retriever import RetrieverForMaskedLM
    from attnkit.training import Recipe

    sizes: dict[str, Any] = {"count": settings.pairs, "length": length, "masked": isinstance(model, RetrieverForMaskedLM)}
    data = PairData(
        train=PairRows(trained, rows=steps, seed=seed, **sizes),
        validation=PairRows(held, rows=None, **sizes),
        max_length=model.config.max_position_embeddings,
        facts={"source": settings.source, "least": settings.least, "judged": settings.judged, **sizes},
    )
    recipe = Recipe(
        steps=steps, learning_rate=settings.learning_rate, warmup=0.1, seed=seed, precision=place.precision,
        log_every=max(1, steps // _LINES),
    )  # fmt: skip
    return place.train(name, model, data, recipe, validation_rows=4)


@torch.no_grad()
def judge(model: Any, rows: PairRows, precision: str) -> torch.Tensor:
    """nDCG@10 of each query [Q], every document of all rows ranked by its cosine with the query's vector.

    Args:
        model: `embed` makes vectors of a row; see `attnkit.lab.claims.retriever.Retriever`.
        rows: one pass over the pairs.
        precision: "bf16" runs the matrix products of the encoder in bf16.
    """
    halves = []
    for index in range(len(rows)):
        fields = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in rows[index].items()
            if name != "labels"
        }
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            halves.append(model.embed(**fields).float().cpu().chunk(2))
    queries, found = (torch.cat(half) for half in zip(*halves, strict=True))
    return ndcg(queries @ found.T, torch.eye(len(queries)))


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    lengths = sorted(settings.lengths)

    def found(alpha: float, length: int, field: str) -> list[float]:
        return [row[field] for row in rows if (row["alpha"], row["length"]) == (alpha, length) and row[field] is not None]

    over = {
        "softmax" if alpha == 1 else f"alpha {alpha:g}": [(length, found(alpha, length, "ndcg")) for length in lengths]
        for alpha in settings.alphas
    }
    figure = lines("Documents found by their titles", "bytes", "nDCG@10", over, log_x=True)
    cells = []
    for length in lengths:
        for alpha in settings.alphas:
            gains, first, times = (found(alpha, length, field) for field in ("ndcg", "found_first", "step_ms"))
            of = spread(gains) if gains else None
            written = None if of is None else f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"
            means = [spread(values)["mean"] if values else None for values in (first, times)]
            cells.append([f"{length:,}", f"{alpha:g}", written, *means])
    note = (
        "Mean of the seeds (least to most); each query has one relevant document, which is at rank 1 as often as `first` says."
    )
    headers = ["bytes", "alpha", "nDCG@10", "first", "ms a step"]
    return Conclusion(_judge(settings, rows), [figure], [table("Retrieval by length", headers, cells, note)])


def _judge(settings: Settings, rows: Sequence[Row]) -> Verdict:
    known = {(row["alpha"], row["length"], row["seed"]): row["ndcg"] for row in rows}
    pairs = {
        length: [
            (known[1.5, length, seed], known[1.0, length, seed])
            for seed in settings.seeds
            if {(1.5, length, seed), (1.0, length, seed)} <= set(known)
        ]
        for length in sorted(settings.lengths)
    }
    gains = {length: [a - b for a, b in of] for length, of in pairs.items()}
    numbers: dict[str, float | None] = {f"gain at {length}": sum(of) / len(of) if of else None for length, of in gains.items()}
    if any(len(of) < len(settings.seeds) for of in gains.values()):
        return Verdict("undecided", "Trainings with alpha 1 or 1.5 are missing.", numbers)
    told = "; ".join(f"{name} {value:+.3f}" for name, value in numbers.items() if value is not None)
    reason = f"nDCG@10 with alpha 1.5 less that with softmax, mean of the seeds: {told}."
    least = min(max(pair) for of in pairs.values() for pair in of)
    if least < _LEARNT:
        return Verdict("undecided", f"A length has a seed with which neither norm reaches {_LEARNT:g}. {reason}", numbers)
    ahead = [length for length, of in gains.items() if min(of) > 0]
    if len(ahead) == len(gains):
        return Verdict("holds", reason, numbers)
    if ahead:
        return Verdict("holds in part", reason, numbers)
    return Verdict("does not hold" if all(max(of) <= 0 for of in gains.values()) else "undecided", reason, numbers)


CLAIM = Claim(
    name="entmax-retrieval",
    systems=(4,),
    says="encoders with entmax retrieve by one vector better than with softmax (nDCG@10 0.7 to 7.6 points higher on four sets)",
    source="Goncalves et al. 2025 (arXiv:2502.12082), table 1",
    protocol=(
        "Encoders from random weights are masked language models for a while, then learn to tell the abstract that belongs to "
        "a title from the others of the batch; abstracts and titles that are judged are never trained on. Alpha stays the same "
        "throughout, where the paper goes on from softmax. It holds if alpha 1.5 has a higher nDCG@10 than softmax at every "
        "length with every seed, in part if at one of them; it does not if it is at none with any. Where neither reaches "
        f"{_LEARNT:g} nothing is decided."
    ),
    minutes=2.5,
    device="cuda",
    settings=Settings,
    quick={
        "source": "wiki", "judged": 12, "lengths": (64, 32), "dim": 32, "layers": 1, "heads": 2, "pairs": 4,
        "masked_steps": 2, "steps": 3, "seeds": (0,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
