"""Validation: mean loss over real targets, and exact scores of tasks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.training.data.packing import IGNORED, PackedRows, Row
from attnkit.training.tasks.base import Score, score
from attnkit.training.tasks.rows import TaskRows

__all__ = ["Validation", "validate"]


@dataclass(frozen=True)
class Validation:
    """What a model does on rows that it was not trained on.

    Attributes:
        loss: mean over all targets, natural logarithm.
        targets: how many there were.
        scores: length -> score, of a task; empty for text.
    """

    loss: float
    targets: int
    scores: dict[int, Score]


@torch.no_grad()
def validate(
    model: Any,
    rows: PackedRows | TaskRows,
    *,
    limit: int | None = None,
    precision: str = "fp32",
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """Loss and scores of a causal model.

    Args:
        model: called with a row's fields, without labels; returns logits [B, T, vocabulary].
        rows: to judge on.
        limit: rows to read at most, spread evenly; None reads all.
        precision: "bf16" runs the matrix products in bf16.
        on_row: told (rows done, rows in all).
    """
    chosen = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = range(0, len(rows) - len(rows) % limit, len(rows) // limit)
    device, nats, targets = model.device, 0.0, 0
    scores: dict[int, Score] = {}
    with _evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for done, index in enumerate(chosen, 1):
            row = rows[index]
            logits = _logits(model, row)
            labels = row["labels"][:, 1:].to(device)
            nats += F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            targets += int((labels != IGNORED).sum())
            if isinstance(rows, TaskRows):
                length = row["labels"].shape[1]
                found = score(_predictions(logits), rows.examples(index))
                scores[length] = scores[length] + found if length in scores else found
            on_row(done, len(chosen))
    return Validation(nats / max(targets, 1), targets, dict(sorted(scores.items())))


def _logits(model: Any, row: Row) -> Tensor:
    fields = {
        name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in row.items() if name != "labels"
    }
    logits: Tensor = model(**fields, use_cache=False).logits
    return logits


def _predictions(logits: Tensor) -> np.ndarray:
    """[B, T]: what was predicted for each position; nothing (-1) for the first."""
    guesses = logits.argmax(-1).cpu().numpy()
    return np.concatenate([np.full((len(guesses), 1), -1), guesses[:, :-1]], 1)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and nothing compiled: graphs for rows of other sizes would cost more than they save."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
