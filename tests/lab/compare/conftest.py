from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from attnkit.lab.compare import LoadedModel
from attnkit.testing import tiny_model
from compare_examples import SENTENCES, byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def loaded(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    model = tiny_model("llama", vocab_size=258, max_position_embeddings=1024)
    return LoadedModel("tiny", model, tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "harbour.txt"
    path.write_text("".join(SENTENCES[(i * i + i // 3) % 4] for i in range(60)))
    return str(path)
