"""Judging a trained model: exact scores of tasks, bits a byte of texts beside an n-gram."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnkit._core.errors import InputError
from attnkit.training.baselines import KneserNey
from attnkit.training.data.text import load_text_data
from attnkit.training.evaluate import validate
from attnkit.training.model import load_model
from attnkit.training.tasks.base import Task
from attnkit.training.tasks.rows import TaskRows
from attnkit.training.tokenizers import load_tokenizer

__all__ = ["judge_task", "judge_text"]

NGRAM = 5
_ROW_TOKENS = 8192
_JUDGED = 1_000_003  # seeds of judging stay apart from those of training, which users count from 0


def judge_task(
    folder: Path,
    task: Task,
    lengths: Sequence[int],
    *,
    examples: int,
    seed: int,
    device: str,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Exact scores on fresh examples, one row a length: right, answers, accuracy, solved, examples, chance.

    Args:
        folder: of a model that `attnkit train` has written.
        task: to ask; its vocabulary must fit the model's.
        lengths: tokens of an example.
        examples: of each length, at least; whole batches are made.
        seed: of the examples.
        device: "cpu" or "cuda".
        on_row: told (batches done, batches in all).
    Raises:
        InputError: the model was made for another vocabulary or for shorter sequences.
        OptionError: a length that the task cannot fill.
    """
    model, _ = load_model(folder)
    _fits(model, task.vocab_size, max(lengths), f"task {task.name}")
    model.to(device)
    rows = []
    for place, length in enumerate(lengths):
        batch = min(examples, max(1, _ROW_TOKENS // length))
        count = -(-examples // batch)
        data = TaskRows(task, [length], row_tokens=batch * length, rows=count, seed=_JUDGED + seed, validation=True)

        def tell(done: int, total: int, before: int = place) -> None:
            on_row(before * total + done, len(lengths) * total)

        found = validate(model, data, on_row=tell)
        score = found.scores[length]
        rows.append(
            {
                "task": task.name, "length": length, "accuracy": score.accuracy, "right": score.right,
                "answers": score.answers, "solved": score.solved, "examples": score.examples,
                "chance": task.chance, "loss": found.loss,
            }
        )  # fmt: skip
    return rows


def judge_text(
    folder: Path,
    text: str | None,
    *,
    device: str,
    on_row: Callable[[int, int], None] = lambda done, total: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> list[dict[str, Any]]:
    """Loss and bits a byte of the model and of a 5-gram (interpolated Kneser-Ney) on the documents kept back, one row each.

    Both are judged on whole validation documents. The n-gram always sees its context; the model sees none at the first
    tokens of a row, which are left out, and little after them, which counts against it.

    Args:
        folder: of a model that `attnkit train lm` has written.
        text: a text asset or a file; None means the one it was trained on.
        device: "cpu" or "cuda".
        on_row: told (rows done, rows in all).
        on_phase: told what takes a while.
    Raises:
        InputError: the model was trained on no text, or the tokenizer has changed since.
    """
    model, facts = load_model(folder)
    data_facts = facts["data"]
    if "tokenizer" not in data_facts:
        raise InputError(f"the model in {folder} was trained on the task {data_facts.get('task')}, not on a text")
    tokenizer = load_tokenizer(data_facts["tokenizer"])
    if tokenizer.sha256 != data_facts["tokenizer_sha256"]:
        raise InputError(
            f"the model in {folder} was trained with another {tokenizer.name} tokenizer "
            f"({data_facts['tokenizer_sha256'][:8]}.., here {tokenizer.sha256[:8]}..); train it again"
        )
    sizes = {"row_tokens": data_facts["row_tokens"], "max_length": data_facts["max_length"]}
    source = text or data_facts["text"]
    data = load_text_data(source, tokenizer, rows=None, seed=data_facts["split_seed"], on_phase=on_phase, **sizes)
    _fits(model, data.vocab_size, data.max_length, f"text {source}")
    model.to(device)
    found = validate(model, data.validation, on_row=on_row)
    losses = {type(model).__name__: found.loss}
    on_phase(f"counting {NGRAM}-grams")
    # as many tokens as fit into 64 bits
    order = min(NGRAM, int(64 / math.log2(data.vocab_size + 1)))
    ngram = KneserNey(data.train_documents, order=order, vocab_size=data.vocab_size)
    losses[f"{order}-gram, Kneser-Ney"] = ngram.loss(data.validation_documents)
    return [
        {
            "text": source, "model": name, "loss": loss, "bits_per_byte": loss / math.log(2) / data.bytes_per_token,
            "bytes": data.facts["validation"]["bytes"], "sha256": data.facts["validation"]["sha256"],
        }
        for name, loss in losses.items()
    ]  # fmt: skip


def _fits(model: Any, vocab_size: int, length: int, what: str) -> None:
    if vocab_size > model.config.vocab_size:
        raise InputError(f"{what} has {vocab_size} tokens, and the model a vocabulary of {model.config.vocab_size}")
    if length > model.config.max_position_embeddings:
        raise InputError(f"{what}: {length} tokens are more than the model's {model.config.max_position_embeddings} positions")
