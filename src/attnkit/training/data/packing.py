"""Rows of a fixed number of tokens, cut from shuffled documents, with exact borders.

Row i is a function of (documents, seed, i) alone: nothing has to be replayed to go on after an interruption, and every
process of a distributed run can make its own rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from attnkit._core.errors import InputError, OptionError

__all__ = ["IGNORED", "PackedRows", "Row", "Work", "pack"]

IGNORED = -100  # labels that no loss and no score counts
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What one row asks of a model.

    Attributes:
        tokens: in the row.
        targets: tokens that the loss counts.
        squares: sum of squared sequence lengths, what attention costs.
    """

    tokens: int
    targets: int
    squares: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.targets + other.targets, self.squares + other.squares)


def pack(sequences: Sequence[np.ndarray]) -> Row:
    """Lay sequences behind each other as one row that a packed model reads.

    Args:
        sequences: token ids of each, at least one token long.
    Returns:
        `input_ids`, `labels`, `position_ids` [1, T] int64; `cu_seq_lens_q`, `cu_seq_lens_k` [sequences + 1] int32;
        `max_length_q`, `max_length_k` Python ints. Positions restart in every sequence, and its first token is no target:
        nothing before it is its context.
    Raises:
        InputError: no sequence, or an empty one.
    """
    lengths = np.array([len(ids) for ids in sequences])
    if not lengths.size or not lengths.all():
        raise InputError(f"sequences have {lengths.tolist()} tokens; give at least one, and none that is empty")
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    borders = np.cumsum([0, *lengths])
    labels = ids.clone()
    labels[torch.from_numpy(borders[:-1])] = IGNORED
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    cu_seq_lens, longest = torch.from_numpy(borders.astype(np.int32)), int(lengths.max())
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class PackedRows(Dataset[Row]):
    """Documents as an endless stream, cut every `row_tokens`; epochs are shuffled anew and follow without a seam.

    Documents longer than `max_length` are cut into pieces of that length, and whatever crosses the end of a row goes on in the
    next one as a sequence of its own.

    Args:
        tokens: ids of all documents behind each other.
        spans: [documents, 2], where each of ours begins and ends in `tokens`.
        row_tokens: tokens of a row.
        max_length: tokens of the longest sequence.
        rows: how many rows there are; None means one pass, whose last row may be shorter.
        seed: of the order; None keeps the documents' own.
    Raises:
        OptionError: a size below 2, or a row shorter than a sequence.
        InputError: no tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        *,
        row_tokens: int,
        max_length: int,
        rows: int | None,
        seed: int | None,
    ) -> None:
        if max_length < 2 or row_tokens < max_length:
            raise OptionError(f"max_length={max_length}, row_tokens={row_tokens}; both >= 2, and a row holds a sequence")
        self.row_tokens, self.max_length, self.seed = row_tokens, max_length, seed
        self._tokens = tokens
        starts = [np.arange(begin, end, max_length) for begin, end in spans]
        ends = [np.minimum(first + max_length, end) for first, (_, end) in zip(starts, spans, strict=True)]
        self._pieces = np.stack([np.concatenate(starts), np.concatenate(ends)], 1) if starts else np.empty((0, 2), np.int64)
        self.epoch_tokens = int((self._pieces[:, 1] - self._pieces[:, 0]).sum())
        if not self.epoch_tokens:
            raise InputError("spans hold no tokens; give documents with text")
        self._rows, self._layouts = rows, dict[int, tuple[np.ndarray, np.ndarray]]()

    def __len__(self) -> int:
        return -(-self.epoch_tokens // self.row_tokens) if self._rows is None else self._rows

    def __getitem__(self, index: int) -> Row:
        return pack([self._tokens[begin:end] for begin, end in self._sequences(index)])

    def work(self, index: int) -> Work:
        """What row `index` asks of a model, without reading its tokens."""
        lengths = [end - begin for begin, end in self._sequences(index)]
        return Work(sum(lengths), sum(lengths) - len(lengths), sum(length * length for length in lengths))

    def facts(self) -> Mapping[str, Any]:
        """Sizes for result files."""
        return {"row_tokens": self.row_tokens, "max_length": self.max_length, "epoch_tokens": self.epoch_tokens}

    def _sequences(self, index: int) -> list[tuple[int, int]]:
        """Where in `tokens` the sequences of a row begin and end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place, stop = index * self.row_tokens, (index + 1) * self.row_tokens
        if self._rows is None:
            stop = min(stop, self.epoch_tokens)
        found = []
        while place < stop:
            epoch, inside = divmod(place, self.epoch_tokens)
            pieces, borders = self._layout(epoch)
            which = int(np.searchsorted(borders, inside, side="right")) - 1
            begin = int(pieces[which, 0]) + inside - int(borders[which])
            length = min(int(pieces[which, 1]) - begin, stop - place)
            found.append((begin, begin + length))
            place += length
        return found

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces in the order of an epoch, and where each begins in its stream."""
        if epoch not in self._layouts:
            pieces = self._pieces
            if self.seed is not None:
                pieces = pieces[np.random.default_rng([self.seed, epoch]).permutation(len(pieces))]
            borders = np.concatenate([[0], np.cumsum(pieces[:, 1] - pieces[:, 0])])
            for old in [known for known in self._layouts if known < epoch - 1]:
                del self._layouts[old]
            self._layouts[epoch] = (pieces, borders)
        return self._layouts[epoch]
