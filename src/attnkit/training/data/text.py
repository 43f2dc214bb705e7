"""A text as training data: split by document, packed, with the hashes that say which text it was."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit._core.errors import InputError, OptionError
from attnkit.training.data.cache import TokenStore, open_store
from attnkit.training.data.packing import PackedRows
from attnkit.training.tokenizers import TextTokenizer

__all__ = ["TextData", "load_text_data", "split_documents"]

VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class TextData:
    """Packed rows of a text.

    Attributes:
        train: rows to train on.
        validation: one pass over the documents that are kept back.
        vocab_size: token ids are smaller than this.
        max_length: tokens of the longest sequence.
        facts: what a result file says about the data: source, tokenizer, split, hashes.
        train_documents, validation_documents: token ids of each document.
        bytes_per_token: of the validation documents, end tokens included.
    """

    train: PackedRows
    validation: PackedRows
    vocab_size: int
    max_length: int
    facts: Mapping[str, Any]
    train_documents: Sequence[np.ndarray]
    validation_documents: Sequence[np.ndarray]
    bytes_per_token: float


def split_documents(sizes: Sequence[int], *, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose whole documents at random for validation until they hold `share` of the tokens; one at least stays on each side.

    Of two documents the smaller one is chosen: a file is cut into 95 % and the rest.

    Args:
        sizes: tokens of each document.
        share: of the tokens, between 0 and 1.
        seed: of the choice.
    Returns:
        numbers of the training and of the validation documents, both rising.
    Raises:
        InputError: fewer than two documents.
        OptionError: `share` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise OptionError(f"share={share} is not allowed; choose a number between 0 and 1, for example {VALIDATION_SHARE}")
    if len(sizes) < 2:
        raise InputError(f"the text has {len(sizes)} document(s); a split by document needs two")
    order = np.random.default_rng(seed).permutation(len(sizes)) if len(sizes) > 2 else np.argsort(sizes)
    reached = np.cumsum(np.asarray(sizes)[order])
    taken = int(np.searchsorted(reached, share * reached[-1])) + 1
    taken = min(taken, len(sizes) - 1)
    return np.sort(order[taken:]), np.sort(order[:taken])


def load_text_data(
    source: str,
    tokenizer: TextTokenizer,
    *,
    row_tokens: int,
    max_length: int,
    rows: int | None,
    seed: int = 0,
    on_phase: Callable[[str], None] = lambda text: None,
) -> TextData:
    """Read a text through the token cache, split it by document and pack both parts.

    Args:
        source: a text asset ("novels", "wiki", "pubmed", "stdlib") or the path of a UTF-8 file.
        tokenizer: see `load_tokenizer`.
        row_tokens: tokens of a row, what one forward pass sees.
        max_length: tokens of the longest sequence in a row.
        rows: training rows; epochs follow each other as needed. None means one pass.
        seed: of the split and of the order.
        on_phase: told what takes a while.
    Raises:
        OptionError, InputError, MissingAsset: see `attnkit.assets.load_text`, `split_documents` and `PackedRows`.
    """
    store = open_store(source, tokenizer, on_phase=on_phase)
    sizes = np.diff(store.offsets)
    train, validation = split_documents(sizes.tolist(), share=VALIDATION_SHARE, seed=seed)
    spans = np.stack([store.offsets[:-1], store.offsets[1:]], 1)
    sizes_of = {"row_tokens": row_tokens, "max_length": max_length}
    facts = {
        "text": source,
        "tokenizer": store.tokenizer,
        "tokenizer_sha256": store.tokenizer_sha256,
        "split_seed": seed,
        "train": _side(store, train, sizes),
        "validation": _side(store, validation, sizes),
        **sizes_of,
    }
    return TextData(
        train=PackedRows(store.tokens, spans[train], rows=rows, seed=seed, **sizes_of),
        validation=PackedRows(store.tokens, spans[validation], rows=None, seed=None, **sizes_of),
        vocab_size=store.vocab_size,
        max_length=max_length,
        facts=facts,
        train_documents=[store.tokens[begin:end] for begin, end in spans[train]],
        validation_documents=[store.tokens[begin:end] for begin, end in spans[validation]],
        bytes_per_token=float(store.text_bytes[validation].sum() / (sizes[validation] - 1).sum()),
    )


def _side(store: TokenStore, numbers: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """What identifies one side of the split."""
    digest = hashlib.sha256("".join(sorted(store.digests[number] for number in numbers)).encode()).hexdigest()
    return {
        "documents": len(numbers),
        "tokens": int(sizes[numbers].sum()),
        "bytes": int(store.text_bytes[numbers].sum()),
        "sha256": digest,
    }
