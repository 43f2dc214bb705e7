"""Tokens of a text, kept on disk: a folder that appears whole or not at all."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnkit import assets
from attnkit._core.errors import InputError
from attnkit._core.files import new_folder
from attnkit._core.settings import settings
from attnkit.training.tokenizers import TextTokenizer

__all__ = ["TokenStore", "open_store"]

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]

_FORMAT = 1  # raise when what stands in the folder, or how texts are cut, changes
_CHUNK = 256  # documents that are tokenised in one call
_TAIL = 0.05  # share of a lone document that becomes a second one, so that there is something to validate on


@dataclass(frozen=True)
class TokenStore:
    """Every document of a text as tokens.

    Attributes:
        text: the source, as the user gave it.
        tokenizer: its name.
        vocab_size: of the tokenizer.
        tokenizer_sha256: of its vocabulary.
        tokens: ids of all documents behind each other, memory-mapped.
        offsets: [documents + 1], where each begins.
        text_bytes: [documents], UTF-8 bytes of each text.
        digests: [documents], SHA-256 of each text in hexadecimal.
    """

    text: str
    tokenizer: str
    vocab_size: int
    tokenizer_sha256: str
    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: np.ndarray
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.digests)


def open_store(source: str, tokenizer: TextTokenizer, *, on_phase: Callable[[str], None] = lambda text: None) -> TokenStore:
    """Read a text's tokens from the cache, or make them.

    Args:
        source: a text asset ("novels", "wiki", "pubmed", "stdlib") or the path of a UTF-8 file. A text of one document is
            cut into two where a paragraph ends near 95 % of it.
        tokenizer: what makes the tokens.
        on_phase: told what takes a while.
    Raises:
        OptionError, InputError, MissingAsset: see `attnkit.assets.load_text`.
    """
    identity = f"{_FORMAT} {assets.text_identity(source)} {tokenizer.sha256}"
    folder = settings().cache_path() / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    arrays = _read(folder)
    if arrays is None:
        on_phase(f"tokenising {source} ({tokenizer.name})")
        arrays = _write(folder, [document.text for document in assets.load_text(source)], tokenizer)
    tokens, offsets, text_bytes, digests = arrays
    return TokenStore(source, tokenizer.name, tokenizer.vocab_size, tokenizer.sha256, tokens, offsets, text_bytes, digests)


def _write(folder: Path, texts: Sequence[str], tokenizer: TextTokenizer) -> _Arrays:
    """Tokenise and keep; what another process has put there meanwhile, of the same tokens, stays and may be in use."""
    if len(texts) == 1:
        texts = _halves(texts[0])
    parts = [ids for chunk in _chunks(texts) for ids in tokenizer.documents(chunk)]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    written = None
    try:
        with new_folder(folder, unless=lambda: _read(folder) is not None) as temporary:
            np.save(temporary / "tokens.npy", np.concatenate(parts).astype(dtype))
            np.save(temporary / "offsets.npy", np.cumsum([0, *(len(ids) for ids in parts)], dtype=np.int64))
            np.save(temporary / "bytes.npy", np.array([len(text.encode()) for text in texts], np.int64))
            (temporary / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
            written = _read(temporary)
    except OSError:
        if _read(folder) is None:  # otherwise another process was quicker
            raise
    arrays = _read(folder) or written  # ours, if another process that also found the folder damaged is replacing it now
    if arrays is None:
        raise InputError(f"{folder} cannot be read after it was written; delete it, and see whether the disk is full")
    return arrays


def _read(folder: Path) -> _Arrays | None:
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        offsets, text_bytes = np.load(folder / "offsets.npy"), np.load(folder / "bytes.npy")
        digests = tuple(json.loads((folder / "digests.json").read_text("utf-8")))
    except (OSError, ValueError, EOFError):
        return None
    whole = len(offsets) == len(text_bytes) + 1 == len(digests) + 1 and offsets[-1] == len(tokens)
    return (tokens, offsets, text_bytes, digests) if whole else None


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in itertools.count(0, _CHUNK):
        if start >= len(texts):
            return
        yield texts[start : start + _CHUNK]


def _halves(text: str) -> list[str]:
    """A lone document as two: cut at the end of a paragraph, a line or a word, whichever the last twentieth has."""
    aim = round(len(text) * (1 - _TAIL))
    for border in ("\n\n", "\n", " "):
        cut = text.find(border, aim)
        if cut != -1 and text[cut:].strip():
            return [text[:cut], text[cut:].lstrip()]
    return [text[:aim], text[aim:]]
