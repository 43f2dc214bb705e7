"""A trained model, and batches for it to read again and again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnkit._core.errors import InputError

__all__ = ["read_batches"]

_LENGTH = 256


def read_batches(
    folder: Path, text: str | None, *, batches: int, batch: int, length: int | None, seed: int, device: torch.device
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Load a model of `attnkit train lm` in training mode, and cut batches out of what it was not trained on.

    Args:
        folder: of the run.
        text: an asset or a file; None means the text it was trained on.
        batches, batch, length: how many, sequences of each, tokens of a sequence (None: 256, or what the model has).
        seed: of the places.
        device: where the model goes.
    Returns:
        the model, and fields for it: `input_ids`, `labels`, `use_cache`.
    Raises:
        InputError: no such model, one that was not trained on text, or too little text.
        MissingAsset: the text is not there.
    """
    from attnkit.training.data import load_text_data
    from attnkit.training.model import load_model
    from attnkit.training.tokenizers import load_tokenizer

    model, facts = load_model(folder)
    source = text or facts["data"].get("text")
    if source is None or "tokenizer" not in facts["data"]:
        raise InputError(f"the model in {folder} was trained on a task; give one of attnkit train lm")
    length = min(length or _LENGTH, model.config.max_position_embeddings)
    data = load_text_data(
        source, load_tokenizer(facts["data"]["tokenizer"]), row_tokens=length, max_length=length, rows=None, seed=seed
    )
    tokens = np.concatenate([np.asarray(document) for document in data.validation_documents]).astype(np.int64)
    if len(tokens) <= length:
        raise InputError(f"{source} leaves {len(tokens)} tokens to read; give a longer text or a shorter --length")
    places = np.random.default_rng(seed).integers(0, len(tokens) - length, (batches, batch))

    def cut() -> Iterator[dict[str, Any]]:
        for starts in places:
            ids = torch.from_numpy(tokens[starts[:, None] + np.arange(length)]).to(device)
            yield {"input_ids": ids, "labels": ids, "use_cache": False}

    return model.to(device).train(), cut()
