"""The text that a comparison reads: token windows of equal ends, and haystacks for pass-keys."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnkit import assets
from attnkit._core.errors import InputError

__all__ = ["Text", "read", "tail_length", "tokenize", "window_ends"]

MAX_TAIL = 256


@dataclass(frozen=True)
class Text:
    """Documents of one source, longest first.

    Attributes:
        name: as the user gave it.
        documents: their texts.
        sha256: over all of them.
    """

    name: str
    documents: Sequence[str]
    sha256: str


def read(source: str) -> Text:
    """Read a text asset ("wiki", "novels") or a UTF-8 file.

    Raises:
        OptionError, InputError, MissingAsset: see `attnkit.assets.load_text`.
    """
    documents = [document.text for document in assets.load_text(source)]
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return Text(source, documents, digest)


def tail_length(lengths: Sequence[int]) -> int:
    """Tokens at the end of a text window that are scored: an eighth of the shortest window, at most 256."""
    return min(MAX_TAIL, min(lengths) // 8)


def tokenize(text: Text, tokenizer: Any, *, lengths: Sequence[int], trials: int) -> list[int]:
    """Token ids of as many documents as `trials` windows of the longest length need.

    Raises:
        InputError: the text is shorter than that and scored tails would overlap.
    """
    longest, ids = max(lengths), list[int]()
    for document in text.documents:
        ids += tokenizer(document + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= trials * longest:
            break
    needed = longest + (trials - 1) * tail_length(lengths)
    if len(ids) < needed:
        raise InputError(
            f"text {text.name!r} has {len(ids):,} tokens, and length {longest} with {trials} trial(s) needs {needed:,}; give a "
            f"longer text, a shorter length or fewer trials"
        )
    return ids


def window_ends(tokens: int, longest: int, trials: int) -> list[int]:
    """Where text windows end: apart by the longest length where the text allows it, else as far apart as it does."""
    step = min(longest, (tokens - longest) // max(trials - 1, 1))
    return [longest + trial * step for trial in range(trials)]
