"""From text to token ids: bytes, or SmolLM2's byte-level BPE."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit import assets
from attnkit._core.errors import InputError
from attnkit._core.lazy import require
from attnkit._core.registry import Registry

__all__ = ["TOKENIZERS", "TextTokenizer", "load_tokenizer"]

BYTES_BOS, BYTES_EOS = 256, 257
BYTES_VOCABULARY = 260  # 256 bytes, begin, end, padding, mask


@dataclass(frozen=True)
class TextTokenizer:
    """How documents become tokens: begin token, text, end token.

    Attributes:
        name: as registered.
        vocab_size: number of ids.
        bos, eos: ids around every document.
        sha256: of the vocabulary and its rules; equal hashes give equal tokens.
        encode: texts -> ids of each, without bos and eos.
    """

    name: str
    vocab_size: int
    bos: int
    eos: int
    sha256: str
    encode: Callable[[Sequence[str]], list[np.ndarray]]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text as a document of its own, bos and eos included."""
        return [np.concatenate([[self.bos], ids, [self.eos]]) for ids in self.encode(texts)]


TOKENIZERS: Registry[Callable[[], TextTokenizer]] = Registry("tokenizer")


def load_tokenizer(name: str) -> TextTokenizer:
    """Build a registered tokenizer.

    Args:
        name: "bytes" (vocabulary 260) or "smollm2" (49,152 pieces).
    Raises:
        OptionError: an unknown name.
        MissingAsset, MissingExtra: smollm2 needs the asset `lm` and the extra `gguf`; the message is the install line.
    """
    return TOKENIZERS[name]()


def _bytes() -> TextTokenizer:
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    digest = hashlib.sha256(f"utf-8 bytes, bos {BYTES_BOS}, eos {BYTES_EOS}".encode()).hexdigest()
    return TextTokenizer("bytes", BYTES_VOCABULARY, BYTES_BOS, BYTES_EOS, digest, encode)


def _smollm2() -> TextTokenizer:
    path = assets.lm_path()
    for package in ("transformers", "gguf"):
        require(package, extra="gguf")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    ends = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if ends is None:
        raise InputError(f"the tokenizer inside {path.name} has no <|endoftext|>; fetch the pinned version")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    digest = hashlib.sha256(json.dumps(rules["model"], sort_keys=True).encode()).hexdigest()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        batch = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(item.ids, np.int64) for item in batch]

    return TextTokenizer("smollm2", len(tokenizer), ends, ends, digest, encode)


TOKENIZERS.register("bytes", _bytes)
TOKENIZERS.register("smollm2", _smollm2)
