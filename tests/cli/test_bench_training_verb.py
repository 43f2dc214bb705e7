"""`attnkit bench training`: options, tables, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnkit._core.events import Event
from attnkit.cli import main
from attnkit.lab import bench

BRIEF = ["--device", "cpu", "--context", "16", "--batch", "2", "--steps", "4"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "training", *(str(argument) for argument in arguments)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which a race was asked for; it is not run."""
    seen: list[dict[str, Any]] = []

    def run(config: Any, **arguments: Any) -> dict[str, Any]:
        seen.append({"config": config, **arguments})
        return {"schema": "attnkit.race/1", "rows": [], "skipped": [], "finished": []}

    monkeypatch.setattr(bench, "run_training", run)
    return seen


def test_options_reach_the_race(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    sizes = ["--preset", "decoder-50m", "--dim", 1024, "--layers", 4, "--heads", "16/2", "--context", 4096, "--batch", 3]
    options = ["--forms", "packed", "--text", "wiki", "--steps", 9, "--rounds", 5, "--compile", "--dtype", "bf16", "--seed", 7]
    result = invoke(*sizes, *options, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (call,) = calls
    config = call.pop("config")
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1024, 2816, 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 2, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49_152, 4096)
    for name in ("on_event", "command"):
        call.pop(name)
    assert str(call.pop("device")) == "cpu"
    assert call == {
        "context": 4096, "batch": 3, "forms": ("packed",), "text": "wiki", "steps": 9, "rounds": 5, "compiled": True,
        "precision": "bf16", "seed": 7, "out": tmp_path,
    }  # fmt: skip


def test_a_cpu_gets_a_tiny_model_whose_vocabulary_holds_a_text(calls: list[dict[str, Any]]) -> None:
    for options in ([], ["--text", "novels"]):
        assert invoke("--device", "cpu", *options).exit_code == 0
    plain, text = calls
    assert (plain["config"].hidden_size, plain["config"].vocab_size, plain["context"], plain["batch"]) == (64, 64, 128, 4)
    assert (plain["precision"], plain["forms"], plain["text"], plain["compiled"]) == ("fp32", ("rows", "packed"), None, False)
    assert text["config"].vocab_size == 260


def test_the_result_is_a_table_in_a_hundred_columns_and_a_sentence_a_form(tmp_path: Path) -> None:
    result = invoke(*BRIEF, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in ("peer / ours", "losses apart", "rows: ", "packed: ", "tokens a second", "training.json"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "racing: 100 % (2/2)" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"training.json", "training.html"}
    report = CliRunner().invoke(main, ["report", str(tmp_path / "training.json"), "-o", str(tmp_path / "page.html")])
    assert report.exit_code == 0, report.output


def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    result = invoke(*BRIEF, "--forms", "rows", "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert result.stderr == ""


@pytest.mark.parametrize(("side", "code"), [("transformers-llama", 1), ("attnkit", 6)])
def test_what_was_not_raced_decides_the_exit_code(side: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"peer": side, "shape": {"form": "packed", "T": 8}, "dtype": "float32", "pass": "step", "reason": "out of memory"}
    document = {"schema": "attnkit.race/1", "rows": [], "skipped": [entry], "finished": ["packed"]}
    monkeypatch.setattr(bench, "run_training", lambda config, **arguments: document)
    result = invoke("--device", "cpu")
    assert result.exit_code == code
    assert "out of memory" in result.stdout
    assert (result.stderr == "error: packed: out of memory\n") == (code == 6)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--preset", "decoder-50"], 4, "unknown model preset 'decoder-50'; did you mean 'decoder-50m'?"),
        (["--preset", "encoder-tiny"], 4, "--preset encoder-tiny is no decoder"),
        (["--forms", "row"], 4, "forms='row' is not allowed"),
        (["--dim", "66"], 4, "hidden_size=66 is no multiple of num_attention_heads=4"),
        (["--heads", "4/3"], 4, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        (["--heads", "many"], 2, "'many' is not a number of heads"),
        (["--text", "absent.txt"], 4, "text 'absent.txt' is not a file"),
        (["--rounds", "2"], 2, "--rounds"),
        (["--dtype", "fp16"], 4, "--dtype fp16 on the CPU"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_an_exit_code(options: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = invoke(*BRIEF, *options, "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_the_finished_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, **arguments: Any) -> dict[str, Any]:
        arguments["on_event"](Event("plan", "", 0, 2))
        arguments["on_event"](Event("step", "rows", 1, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_training", run)
    result = invoke("--device", "cpu", "--out", "some/place")
    assert result.exit_code == 130
    assert "1 of 2 forms are kept in some/place; race the other with --forms" in result.stderr
