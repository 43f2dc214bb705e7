"""What retrieval is trained and judged on: first paragraphs as queries, the texts that they belong to, and nDCG."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnkit._core.errors import InputError, OptionError
from attnkit.assets import documents

__all__ = ["MASK", "VOCABULARY", "PairData", "PairRows", "Pairs", "ndcg", "split_pairs"]

MASK = 256  # the token behind the bytes, where one is hidden
VOCABULARY = MASK + 1
_HIDDEN = 0.15  # share of the bytes
_QUERY = 256  # bytes of a query at most


@dataclass(frozen=True)
class Pairs:
    """Queries and, at the same place, the document that each is answered by; bytes, uint8.

    Attributes:
        queries: the first paragraph of a text, a title in PubMed.
        documents: the rest of it.
    """

    queries: tuple[np.ndarray, ...]
    documents: tuple[np.ndarray, ...]


def split_pairs(source: str, *, judged: int, least: int) -> tuple[Pairs, Pairs]:
    """Pairs to train on, and as many as `judged` kept apart; no query and no document occurs twice, on either side.

    Which side a pair is on follows from its query alone, so that it is the same for every seed.

    Args:
        source: a text asset.
        judged: pairs that are kept apart.
        least: bytes of the shortest document.
    Raises:
        OptionError, MissingAsset: see `attnkit.assets.documents`.
        InputError: the source has no pairs left to train on.
    """
    found: dict[str, tuple[str, bytes]] = {}
    known = set()
    for text in sorted(documents(source), key=lambda document: document.name):
        query, _, rest = text.text.partition("\n\n")
        document, name = rest.encode(), " ".join(query.casefold().split())
        content = hashlib.sha256(document).digest()
        if len(document) >= least and len(query) > 1 and name not in found and content not in known:
            known.add(content)
            found[name] = (query, document)
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(order) <= judged:
        raise InputError(f"text {source!r} has {len(order)} pairs of a query and {least} bytes, and {judged} are to be judged")

    def side(names: list[str]) -> Pairs:
        queries = (np.frombuffer(found[name][0].encode()[:_QUERY], np.uint8) for name in names)
        return Pairs(tuple(queries), tuple(np.frombuffer(found[name][1], np.uint8) for name in names))

    return side(order[judged:]), side(order[:judged])


class PairRows(Dataset[Any]):
    """Batches as packed rows: the queries of some pairs, then their documents in the same order.

    The label of a query's last byte is the number of its document in the row; with `masked`, some bytes are hidden instead and
    are their own labels.

    Args:
        pairs: to draw from.
        count: pairs of a row, different ones.
        length: bytes of a document that are read.
        rows: how many there are; None means one pass in order, where the last row may hold fewer.
        seed: of the draws.
        masked: whether this is for a masked language model.
    Raises:
        OptionError: `count` is below 2, since there is nothing to choose from, or more than there are pairs.
    """

    def __init__(self, pairs: Pairs, *, count: int, length: int, rows: int | None, seed: int = 0, masked: bool = False) -> None:
        if not 2 <= count <= len(pairs.queries):
            raise OptionError(f"count={count} is not allowed; choose 2 to {len(pairs.queries)}, the pairs that there are")
        self._pairs, self._count, self._length = pairs, count, length
        self._rows, self._seed, self._masked = rows, seed, masked

    def __len__(self) -> int:
        return -(-len(self._pairs.queries) // self._count) if self._rows is None else self._rows

    def __getitem__(self, index: int) -> Any:
        from attnkit.training import pack
        from attnkit.training.data.packing import IGNORED

        chosen = self._chosen(index)
        queries = [self._pairs.queries[number] for number in chosen]
        row = pack([*queries, *(self._pairs.documents[number][: self._length] for number in chosen)])
        ids, starts = row["input_ids"][0], row["cu_seq_lens_q"]
        labels = torch.full_like(ids, IGNORED)
        if self._masked:
            hidden = torch.from_numpy(np.random.default_rng([self._seed, index, 1]).random(len(ids)) < _HIDDEN)
            hidden[0] = False  # no token before it, at which `validate` would look for the prediction
            labels[hidden], ids[hidden] = ids[hidden], MASK
        else:
            labels[starts[1 : len(chosen) + 1].long() - 1] = torch.arange(len(chosen))
        return {**row, "labels": labels[None]}

    def work(self, index: int) -> Any:
        """What row `index` asks of a model; of hidden bytes their expected number."""
        from attnkit.training import Work

        chosen = self._chosen(index)
        lengths = [len(self._pairs.queries[number]) for number in chosen]
        lengths += [min(self._length, len(self._pairs.documents[number])) for number in chosen]
        targets = round(_HIDDEN * sum(lengths)) if self._masked else len(chosen)
        return Work(sum(lengths), targets, sum(length * length for length in lengths))

    def _chosen(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._rows is None:
            return np.arange(index * self._count, min((index + 1) * self._count, len(self._pairs.queries)))
        return np.random.default_rng([self._seed, index]).choice(len(self._pairs.queries), self._count, replace=False)


@dataclass(frozen=True)
class PairData:
    """Rows of pairs as `attnkit.training.train` wants them.

    Attributes:
        train, validation: rows.
        max_length: bytes of the longest sequence.
        facts: for result files.
        vocab_size: bytes and the mask.
    """

    train: PairRows
    validation: PairRows
    max_length: int
    facts: dict[str, Any]
    vocab_size: int = VOCABULARY


def ndcg(scores: Tensor, relevance: Tensor, at: int = 10) -> Tensor:
    """Normalised discounted cumulative gain of each query [Q] (Jarvelin and Kekalainen 2002), with linear gains.

    Args:
        scores: [Q, D], of documents; equal ones keep the documents' order.
        relevance: [Q, D], 0 and more; a query without a relevant document has 0.
        at: ranks that count.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :at]
    best = relevance.sort(dim=1, descending=True).values[:, :at]
    discounts = torch.arange(2, order.shape[1] + 2, device=scores.device).double().log2()
    gained, ideal = (of.double().div(discounts).sum(1) for of in (relevance.gather(1, order), best))
    return torch.where(ideal > 0, gained / ideal, 0.0)
