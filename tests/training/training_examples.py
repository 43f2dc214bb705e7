"""What several training tests need: a tiny text, a tiny model, a recipe."""

from pathlib import Path
from typing import Any

from attnkit import training

_SENTENCE = "the quick brown fox jumps over a lazy dog and then it sleeps in the warm sun until evening comes"
WORDS = tuple(_SENTENCE.split(" "))


def write_text(path: Path, *, paragraphs: int = 120) -> Path:
    """A text of short paragraphs that differ; its last twentieth becomes the validation document."""
    lines = [" ".join(WORDS[(3 * i + j * (i % 5 + 1)) % len(WORDS)] for j in range(9)) for i in range(paragraphs)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def text_data(path: Path, *, rows: int, row_tokens: int = 128, max_length: int = 32, seed: int = 0) -> training.TextData:
    """The text as packed bytes."""
    return training.load_text_data(
        str(path), training.load_tokenizer("bytes"), row_tokens=row_tokens, max_length=max_length, rows=rows, seed=seed
    )


def tiny(vocab_size: int = 260, positions: int = 64, seed: int = 0) -> Any:
    """A model of one layer."""
    return training.new_model(vocab_size=vocab_size, dim=32, layers=1, heads=2, positions=positions, seed=seed)
