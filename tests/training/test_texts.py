"""From a file to training data: token cache, split by document, hashes, tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_examples import text_data

from attnkit import assets, training
from attnkit._core.errors import InputError, MissingAsset, OptionError
from attnkit._core.settings import settings
from attnkit.training.data import cache, open_store, split_documents


def folders() -> list[Path]:
    root = settings().cache_path() / "tokens"
    return sorted(root.iterdir()) if root.is_dir() else []


def test_bytes_give_the_text_back() -> None:
    tokenizer = training.load_tokenizer("bytes")
    (ids,) = tokenizer.documents(["Zürich\n"])
    assert bytes(ids[1:-1].astype(np.uint8)).decode() == "Zürich\n"
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
    assert ids.max() < tokenizer.vocab_size


@pytest.mark.needs_asset("lm")
def test_smollm2_gives_the_text_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.delenv("ATTNKIT_CACHE_DIR")
    tokenizer = training.load_tokenizer("smollm2")
    assert tokenizer.vocab_size == 49_152
    first, second = tokenizer.documents(["The capital of France is Paris.", "<|im_start|>"])
    assert 7 <= len(first) - 2 <= 9
    assert first[0] == first[-1] == tokenizer.eos
    assert len(second) > 2
    assert tokenizer.sha256 == training.load_tokenizer("smollm2").sha256


def test_unknown_tokenizers_and_texts(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'bytes'"):
        training.load_tokenizer("byte")
    with pytest.raises(OptionError, match="is not a file"):
        text_data(tmp_path / "absent.txt", rows=1)


def test_missing_assets_say_how_to_fetch_them() -> None:
    if Path("/usr/lib/R/site-library/janeaustenr").is_dir():
        pytest.skip("installed system-wide")
    with pytest.raises(MissingAsset, match="attnkit assets fetch novels --run"):
        training.load_text_data(
            "novels", training.load_tokenizer("bytes"), row_tokens=64, max_length=64, rows=1
        )  # the cache folder of this test is empty


def test_tokens_are_kept_and_read_again(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(str(text), training.load_tokenizer("bytes"))
    (folder,) = folders()
    assert not folder.name.startswith(".")
    monkeypatch.setattr(assets, "load_text", lambda source: pytest.fail("the cache was not used"))
    again = open_store(str(text), training.load_tokenizer("bytes"))
    assert np.array_equal(first.tokens, again.tokens)
    assert first.digests == again.digests
    assert isinstance(again.tokens, np.memmap)


@pytest.mark.parametrize("damage", ["tokens.npy", "offsets.npy", "digests.json"])
def test_a_damaged_cache_is_made_again(text: Path, damage: str) -> None:
    before = np.array(open_store(str(text), training.load_tokenizer("bytes")).tokens)
    (folder,) = folders()
    path = folder / damage
    path.write_bytes(path.read_bytes()[:-7])
    assert np.array_equal(open_store(str(text), training.load_tokenizer("bytes")).tokens, before)
    assert folders() == [folder]


def test_a_store_that_another_process_has_written_meanwhile_stays(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = training.load_tokenizer("bytes")
    known, theirs = cache._write, []

    def write(folder: Path, *rest: Any) -> Any:
        if not theirs:
            theirs.append(known(folder, *rest))
            theirs.append((folder / "tokens.npy").stat().st_ino)
        return known(folder, *rest)

    monkeypatch.setattr(cache, "_write", write)
    ours = open_store(str(text), tokenizer)
    (folder,) = folders()
    assert (folder / "tokens.npy").stat().st_ino == theirs[1]
    assert str(ours.tokens.filename) == str(folder / "tokens.npy")


def test_a_store_that_another_process_is_replacing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written is gone for a moment: it is open. A folder that cannot be read is told of."""
    root, known = settings().cache_path() / "tokens", cache._read
    monkeypatch.setattr(cache, "_read", lambda folder: known(folder) if folder.name.startswith(".") else None)
    store = open_store(str(text), training.load_tokenizer("bytes"))
    (folder,) = root.iterdir()
    found = known(folder)
    assert found is not None
    assert np.array_equal(store.tokens, found[0])
    monkeypatch.setattr(cache, "_read", lambda folder: None)
    with pytest.raises(InputError, match="cannot be read after it was written"):
        open_store(str(text), training.load_tokenizer("bytes"))


def test_another_text_has_another_place(text: Path) -> None:
    open_store(str(text), training.load_tokenizer("bytes"))
    text.write_text(text.read_text("utf-8") + "\n\nOne more.", encoding="utf-8")
    open_store(str(text), training.load_tokenizer("bytes"))
    assert len(folders()) == 2


def test_a_lone_document_is_cut_where_a_paragraph_ends(text: Path) -> None:
    store = open_store(str(text), training.load_tokenizer("bytes"))
    assert len(store) == 2
    parts = [
        bytes(np.array(store.tokens[b + 1 : e - 1], np.uint8)).decode()
        for b, e in zip(store.offsets[:-1], store.offsets[1:], strict=True)
    ]
    assert "\n\n".join(parts) == text.read_text("utf-8")
    assert 0.9 < len(parts[0]) / len(text.read_text("utf-8")) < 0.99


@pytest.mark.parametrize("seed", range(4))
def test_a_file_is_trained_on_up_to_its_last_twentieth(text: Path, seed: int) -> None:
    facts = text_data(text, rows=1, seed=seed).facts
    assert facts["validation"]["bytes"] < 0.1 * facts["train"]["bytes"]
    assert [side.tolist() for side in split_documents([5, 1000], share=0.05, seed=seed)] == [[1], [0]]


def test_split_takes_whole_documents_until_the_share_is_reached() -> None:
    sizes = [10] * 100
    train, validation = split_documents(sizes, share=0.05, seed=0)
    assert (len(train), len(validation)) == (95, 5)
    assert sorted([*train, *validation]) == list(range(100))
    assert validation.tolist() != split_documents(sizes, share=0.05, seed=1)[1].tolist()
    assert [len(side) for side in split_documents([5, 1000], share=0.9, seed=0)] == [1, 1]
    with pytest.raises(InputError, match="needs two"):
        split_documents([7], share=0.05, seed=0)
    with pytest.raises(OptionError, match="between 0 and 1"):
        split_documents(sizes, share=1.0, seed=0)


def test_data_records_what_it_is(text: Path) -> None:
    data = text_data(text, rows=3)
    json.dumps(data.facts)
    assert data.facts["train"]["documents"] == data.facts["validation"]["documents"] == 1
    assert len(data.facts["train"]["sha256"]) == 64
    assert data.facts["train"]["sha256"] != data.facts["validation"]["sha256"]
    total = sum(data.facts[side]["bytes"] for side in ("train", "validation"))
    assert len(text.read_bytes()) - 2 <= total <= len(text.read_bytes())
    seen = torch_ids(data.train) | torch_ids(data.validation)
    assert max(seen) < data.vocab_size


def torch_ids(rows: training.PackedRows) -> set[int]:
    return {token for index in range(len(rows)) for token in rows[index]["input_ids"][0].tolist()}


def test_each_side_is_made_of_its_own_documents(text: Path) -> None:
    data = text_data(text, rows=500)
    for rows, documents in ((data.train, data.train_documents), (data.validation, data.validation_documents)):
        whole = np.sort(np.concatenate(documents))
        stream = np.concatenate([rows[index]["input_ids"][0].numpy() for index in range(len(rows))])
        assert np.array_equal(np.sort(stream[: len(whole)]), whole)  # the first pass; training goes on with the next


@pytest.mark.needs_asset("pubmed")
def test_the_real_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNKIT_CACHE_DIR")
    records = assets.documents("pubmed")
    assert len(records) == 50_734
    assert "<" not in records[0].name
    assert sum(len(record.text) for record in records) > 40_000_000


def test_the_standard_library_is_a_text() -> None:
    modules = {document.name: document.text for document in assets.documents("stdlib")}
    assert "def dumps(" in modules["json/__init__.py"]
    assert not any("site-packages" in name or name.startswith("test/") for name in modules)
