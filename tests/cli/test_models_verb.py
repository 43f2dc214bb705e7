"""`attnkit models`: what it prints, its JSON, its exit codes."""

import importlib
import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnkit.cli import main
from attnkit.models import MIXERS, MLPS, PRESETS, AttnkitDecoderForCausalLM, AttnkitEncoderForMaskedLM, AttnkitXLSTMForCausalLM


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_names_every_preset_mixer_and_mlp() -> None:
    text = run("list").stdout
    assert [name for name in (*PRESETS, *MIXERS, *MLPS) if name not in text] == []
    result = loaded(run("list", "--json"))
    assert [preset["preset"] for preset in result["presets"]] == list(PRESETS)
    assert (result["mixers"], result["mlps"]) == (list(MIXERS), list(MLPS))


@pytest.mark.parametrize(
    ("name", "model", "cache"),
    [
        ("decoder-tiny", AttnkitDecoderForCausalLM, "full_attention"),
        ("encoder-tiny", AttnkitEncoderForMaskedLM, None),
        ("xlstm-tiny", AttnkitXLSTMForCausalLM, "linear_attention"),
    ],
)
def test_show_counts_what_the_model_has(name: str, model: Any, cache: str | None) -> None:
    result = loaded(run("show", name, "--json"))
    built = model(PRESETS[name]())
    assert result["parameters"] == sum(weight.numel() for weight in built.parameters())
    assert [layer["parameters"] for layer in result["layers"]] == [
        sum(weight.numel() for weight in layer.parameters()) for layer in built.model.layers
    ]
    assert {layer["cache"] for layer in result["layers"]} == {cache}
    assert result["embedding_parameters"] == 2 * 64 * 64
    assert f"{result['parameters']:,} parameters" in run("show", name).stdout


def test_show_counts_tied_weights_once() -> None:
    result = loaded(run("show", "decoder-50m", "--json"))
    assert result["embedding_parameters"] == 49_152 * 512
    assert 45e6 < result["parameters"] < 55e6


def test_unknown_preset() -> None:
    result = run("show", "decoder-tny")
    assert result.exit_code == 4
    assert "did you mean 'decoder-tiny'?" in result.stderr


def test_parity() -> None:
    result = loaded(run("parity", "--seed", "3", "--device", "cpu", "--json"))
    assert result["ok"]
    assert 0 < result["max_difference"] <= result["allowed"] < 1e-3
    assert "pass" in run("parity", "--device", "cpu").stdout


def test_parity_that_fails_exits_with_6(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("attnkit.models.decoder.parity")  # the function of that name hides it
    original = module.from_llama

    def broken(llama: Any) -> Any:
        ours = original(llama)
        ours.model.rotary.theta *= 1.01
        return ours

    monkeypatch.setattr(module, "from_llama", broken)
    result = run("parity", "--device", "cpu")
    assert result.exit_code == 6
    assert "FAIL" in result.stdout
    assert "logits differ by" in result.stderr


def test_parity_with_something_else_than_a_llama(tmp_path: Any) -> None:
    result = run("parity", "--model", str(tmp_path / "nothing"))
    assert result.exit_code == 4
    assert "neither a folder nor a .gguf file" in result.stderr


def test_parity_of_xlstm() -> None:
    result = loaded(run("parity", "--model", "random-xlstm", "--device", "cpu", "--json"))
    assert result["ok"]
    assert 0 < result["max_difference"] <= result["allowed"] < 1e-3
