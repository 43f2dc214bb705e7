"""What both sides train on: whole batches made beforehand, so that nobody pays for making them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from attnkit.training import PackedRows, Work, load_tokenizer
from attnkit.training.data import Row, open_store

__all__ = ["FORMS", "Batches", "RaceData", "Tokens", "load_tokens", "make_data", "random_tokens"]

FORMS = ("rows", "packed")
_SHORTEST = 16  # tokens of a random document


@dataclass(frozen=True)
class Tokens:
    """Documents behind each other.

    Attributes:
        ids: of all tokens.
        spans: [documents, 2], where each begins and ends.
        vocab_size: ids are smaller than this.
        facts: what they are, for the result file.
    """

    ids: np.ndarray
    spans: np.ndarray
    vocab_size: int
    facts: Mapping[str, Any]


def random_tokens(total: int, vocab_size: int, longest: int, seed: int) -> Tokens:
    """Tokens drawn one by one with Zipf's frequencies, in documents whose lengths are spread evenly on a log scale.

    Args:
        total: tokens, at least.
        vocab_size: ids are smaller than this.
        longest: tokens of a document at most.
        seed: of everything random.
    """
    generator = np.random.default_rng(seed)
    low = min(_SHORTEST, longest)
    sizes = np.exp(generator.uniform(np.log(low), np.log(longest + 1), -(-total // low))).astype(np.int64)
    ends = np.cumsum(sizes)
    ends = ends[: int(np.searchsorted(ends, total)) + 1]
    ids = (generator.zipf(1.2, int(ends[-1])) - 1) % vocab_size
    return Tokens(ids, np.stack([ends - sizes[: len(ends)], ends], 1), vocab_size, {"text": "random tokens", "data_seed": seed})


def load_tokens(text: str, *, on_phase: Callable[[str], None]) -> Tokens:
    """The bytes of a text, as `attnkit train lm --text` reads it.

    Args:
        text: an asset ("novels", "wiki", "pubmed", "stdlib") or the path of a UTF-8 file.
        on_phase: told what takes a while.
    Raises:
        OptionError, InputError, MissingAsset: see `attnkit.assets.load_text`.
    """
    store = open_store(text, load_tokenizer("bytes"), on_phase=on_phase)
    facts = {"text": text, "tokenizer": store.tokenizer, "documents": len(store), "tokens": len(store.tokens)}
    return Tokens(store.tokens, np.stack([store.offsets[:-1], store.offsets[1:]], 1), store.vocab_size, facts)


class Batches(Dataset[Row]):
    """Batches in memory, with the work that each of them is.

    Args:
        rows: fields of each batch.
        works: one a batch.
    """

    def __init__(self, rows: Sequence[Row], works: Sequence[Work]) -> None:
        self._rows, self._works = rows, works

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def work(self, index: int) -> Work:
        """What batch `index` asks of a model."""
        return self._works[index]

    def only(self, *names: str) -> "Batches":
        """The same batches without their other fields."""
        return Batches([{name: row[name] for name in names if name in row} for row in self._rows], self._works)


@dataclass(frozen=True)
class RaceData:
    """Batches as `make_trainer` takes them.

    Attributes:
        train: one batch a step.
        validation: none.
        vocab_size: ids are smaller than this.
        max_length: tokens of the longest sequence.
        facts: for the result file.
    """

    train: Batches
    validation: Batches
    vocab_size: int
    max_length: int
    facts: Mapping[str, Any]


def make_data(tokens: Tokens, form: str, *, batch: int, context: int, steps: int, seed: int) -> RaceData:
    """Cut tokens into one batch a step; a text that is too short begins again.

    Args:
        tokens: what to cut.
        form: "rows" lays documents behind each other and cuts [batch, context] without looking at their borders;
            "packed" fills one row of batch x context tokens with whole sequences, of at most `context` tokens each, that
            do not see each other.
        batch, context, steps: sizes.
        seed: of the order of packed documents.
    Raises:
        OptionError, InputError: see `PackedRows`.
    """
    if form == "packed":
        packed = PackedRows(tokens.ids, tokens.spans, row_tokens=batch * context, max_length=context, rows=steps, seed=seed)
        rows, works = [packed[step] for step in range(steps)], [packed.work(step) for step in range(steps)]
    else:
        cut = np.resize(tokens.ids, (steps, batch, context)).astype(np.int64)
        blocks = [torch.from_numpy(block) for block in cut]
        rows = [{"input_ids": block, "labels": block} for block in blocks]
        works = [Work(batch * context, batch * (context - 1), batch * context**2)] * steps
    return RaceData(Batches(rows, works), Batches([], []), tokens.vocab_size, context, tokens.facts)
