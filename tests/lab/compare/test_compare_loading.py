import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit._core.errors import AttnkitError, InputError, MissingExtra, OptionError
from attnkit.lab.compare import LoadedModel
from attnkit.lab.compare.loading import load, locate

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, loaded: LoadedModel) -> Path:
    path = tmp_path / "tiny-model"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


def refusal(action: Any, kind: type[AttnkitError]) -> str:
    """The message of an error that must be one line."""
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_the_model_that_was_saved(folder: Path, loaded: LoadedModel) -> None:
    source = locate(folder)
    again = load(source, CPU, torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert again.name == source.name == "tiny-model"
    assert not again.model.training
    assert again.tokenizer("A bay.")["input_ids"] == loaded.tokenizer("A bay.")["input_ids"]


def test_a_model_is_loaded_in_the_dtype_asked_for(folder: Path) -> None:
    assert load(locate(folder), CPU, torch.bfloat16).model.dtype == torch.bfloat16


def test_loading_is_silent_and_leaves_the_notices_of_transformers_as_they_were(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    load(locate(folder), CPU, torch.float32)
    assert logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_what_is_no_model_is_named_with_the_choices(tmp_path: Path) -> None:
    for name in ("no-such-folder", "missing.gguf", str(tmp_path / "text.txt")):
        message = refusal(lambda name=name: locate(name), OptionError)
        assert repr(name) in message
        assert "give smollm2, a folder with config.json and *.safetensors, or a .gguf file" in message


def test_a_folder_without_configuration_or_safetensors_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(lambda: locate(folder), InputError)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(lambda: locate(folder), InputError)


def test_pickled_weights_beside_other_safetensors_are_not_read(folder: Path, loaded: LoadedModel) -> None:
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save(loaded.model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal(lambda: load(locate(folder), CPU, torch.float32), InputError)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_one_line(folder: Path, file: str) -> None:
    (folder / file).write_text("{]")
    message = refusal(lambda: load(locate(folder), CPU, torch.float32), InputError)
    assert message.startswith("model 'tiny-model' cannot be read: ")


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own",'
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"torch_dtype": null').replace("{", own, 1))
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    assert "cannot be read" in refusal(lambda: load(locate(folder), CPU, torch.float32), InputError)


def test_a_damaged_gguf_file_is_one_line(tmp_path: Path) -> None:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    message = refusal(lambda: load(locate(tmp_path / "broken.gguf"), CPU, torch.float32), InputError)
    assert message.startswith("model 'broken.gguf' cannot be read: ")


@pytest.mark.parametrize(("package", "extra"), [("gguf", "gguf"), ("accelerate", "gguf"), ("transformers", "hf")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    if package == "accelerate":
        pytest.importorskip("gguf")  # the first that is missing is named
    (tmp_path / "some.gguf").touch()
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(lambda: load(locate(tmp_path / "some.gguf"), CPU, torch.float32), MissingExtra)
    assert message == f'{package} is not installed; run: pip install "attnkit[{extra}]"'
