"""What claims about language models share: a byte model of a given mixer, trained, timed and looked at."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnkit.lab.claims.claim import Row
from attnkit.lab.claims.place import Place

if TYPE_CHECKING:
    from attnkit.training import TextData

__all__ = ["LanguageSettings", "at_time", "mean_of", "read", "train_arm"]

_LINES = 20  # of the log


@dataclass(frozen=True)
class LanguageSettings:
    """How language models are trained; claims choose their own defaults.

    Attributes:
        text: what is read, byte by byte; its documents are joined, so that contexts are full.
        dim, layers, heads: of the model.
        lengths: contexts, in the order of their cells.
        step_tokens: tokens of an optimizer step, a multiple of each length.
        steps: of each training.
        learning_rate: constant after a warm-up, so that losses on the way can be compared.
        validations: how often the loss on what is kept apart is taken.
        validation_rows: steps' worth of tokens that it reads.
        compile: whether blocks are compiled.
        seeds: of weights and order.
    """

    text: str = "stdlib"
    dim: int = 512
    layers: int = 8
    heads: int = 8
    lengths: tuple[int, ...] = (2048, 8192, 4096)
    step_tokens: int = 65536
    steps: int = 150
    learning_rate: float = 1e-3
    validations: int = 5
    validation_rows: int = 4
    compile: bool = False
    seeds: tuple[int, ...] = (0,)


def train_arm(
    settings: LanguageSettings, place: Place, name: str, mixer: str, length: int, seed: int
) -> tuple[Row, Any, "TextData"]:
    """Train one model and say what it cost and learnt.

    Args:
        settings: see there.
        place: where.
        name: of the run.
        mixer: as of `attnkit.training.new_model`.
        length: context.
        seed: of weights and order.
    Returns:
        `parameters`, `validation_loss`, `step_ms` (median over the log after its first line, which has compiling in it),
        `peak_mib` (of a GPU; that of a process tells nothing of one run), `curve` ([step, validation loss] pairs); the model
        in evaluation mode; the data.
    """
    from attnkit import training

    data = place.text(
        settings.text, row_tokens=settings.step_tokens, length=length, rows=settings.steps, seed=seed, joined=True
    )
    model = training.new_model(
        vocab_size=data.vocab_size, dim=settings.dim, layers=settings.layers, heads=settings.heads, positions=length,
        mixer=mixer, seed=seed,
    )  # fmt: skip
    every = max(1, settings.steps // _LINES)
    validate = max(1, round(settings.steps / settings.validations / every)) * every
    recipe = training.Recipe(
        steps=settings.steps, learning_rate=settings.learning_rate, decay=0.0, warmup=0.1, seed=seed, precision=place.precision,
        compile=settings.compile, log_every=every, validate_every=validate,
    )  # fmt: skip
    document = place.train(name, model, data, recipe, validation_rows=settings.validation_rows)
    lines = document["rows"]
    times = [line["step_ms_p50"] for line in lines if line["step_ms_p50"]]
    row = {
        "length": length,
        "seed": seed,
        "parameters": document["model"]["parameters"],
        "validation_loss": lines[-1]["validation_loss"],
        "step_ms": statistics.median(times[1:] or times) if times else None,
        "peak_mib": document["speed"]["peak_mib"] if place.device.type == "cuda" else None,
        "curve": [[line["step"], round(line["validation_loss"], 4)] for line in lines if "validation_loss" in line],
    }
    return row, place.load(name), data


@torch.no_grad()
def read(model: Any, data: "TextData", length: int, precision: str) -> Tensor:
    """Run a model over the first `length` tokens that were kept apart, for whoever listens inside; returns them [1, T]."""
    tokens = np.concatenate([np.asarray(document) for document in data.validation_documents])[:length].astype(np.int64)
    ids = torch.from_numpy(tokens)[None].to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
        model(input_ids=ids, use_cache=False)
    return ids


def at_time(row: Row, seconds: float) -> float | None:
    """The validation loss of a run after so many seconds of training, in a straight line between its validations.

    Args:
        row: of `train_arm`.
        seconds: of optimizer steps alone.
    Returns:
        None before the first validation; the last one's loss where the run had ended before.
    """
    curve, step = row["curve"], 1e3 * seconds / row["step_ms"]
    if step < curve[0][0]:
        return None
    return float(np.interp(step, [point[0] for point in curve], [point[1] for point in curve]))


def mean_of(rows: Sequence[Row], field: str) -> float | None:
    """Mean of a field; None where there is none."""
    values = [row[field] for row in rows if row.get(field) is not None]
    return sum(values) / len(values) if values else None
