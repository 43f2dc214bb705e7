"""`attnkit compare` and `attnkit demo`: what they print, write and return."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnkit.cli import main
from attnkit.lab import compare
from attnkit.report import envelope

METHODS = ["dense", "window", "yarn"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(methods: Sequence[str] = METHODS) -> dict[str, Any]:
    rows = [
        {
            "method": method,
            "length": 2048,
            "policy": "Window(window=512, sink=4, rerotate=True)",
            "loss": 2.75 + place,
            "loss_low": 2.5 + place,
            "loss_high": 3.0 + place,
            "passkey_hits": 3 - place,
            "passkey_trials": 3,
            "passkey_low": 0.1,
            "passkey_high": 0.9,
            "agreement": 1.0 - place / 10,
            "kl": place / 10,
            "prefill_s": 3.1,
            "decode_tok_s": 20.0,
            "peak_mib": 200.0,
            "kv_mib": 45.0,
            "trials": [],
        }
        for place, method in enumerate(methods)
    ]
    extra = {"model": "tiny", "text": "wiki", "tail": 256, "shared_prefill": []}
    return envelope(
        "attnkit.compare/1", rows, command="attnkit compare", seed=0, device="cpu", dtype="float32", wall_s=1.0, extra=extra
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which a comparison was asked for; it is not done."""
    seen: list[dict[str, Any]] = []

    def run(**arguments: Any) -> dict[str, Any]:
        seen.append(arguments)
        return document()

    monkeypatch.setattr(compare, "run", run)
    return seen


def test_options_reach_the_comparison(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ["--model", "m.gguf", "--text", "novels", "--lengths", "2k,512", "--methods", "window,yarn", "--trials", 3]
    result = invoke("compare", *options, "--dtype", "bf16", "--device", "cpu", "--seed", 7, "--out", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    import torch

    (call,) = calls
    for name in ("on_event", "command"):
        call.pop(name)
    assert call == {
        "model": "m.gguf",
        "text": "novels",
        "lengths": (2048, 512),
        "methods": ("window", "yarn"),
        "trials": 3,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "seed": 7,
        "out": tmp_path,
        "resume": True,
    }


def test_tables_name_methods_best_values_and_files_in_a_hundred_columns(calls: list[dict[str, Any]]) -> None:
    result = invoke("compare", "--quiet")
    assert result.exit_code == 0, result.output
    for text in (
        *METHODS,
        "2.750 (2.500 to 3.000) ★",
        "KV MiB",
        "attnkit-compare/index.html",
        "attnkit-compare/results.json",
    ):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""


def test_json_is_one_object_and_nothing_else(calls: list[dict[str, Any]]) -> None:
    result = invoke("compare", "--json")
    assert json.loads(result.stdout) == document()
    assert result.stderr == ""


def test_the_demo_is_the_default_comparison_on_the_packaged_model(calls: list[dict[str, Any]]) -> None:
    assert invoke("demo", "--quiet").exit_code == 0
    (call,) = calls
    given = (call["model"], call["text"], call["lengths"], call["methods"], call["device"].type, str(call["out"]))
    assert given == ("smollm2", "wiki", (2048,), None, "cpu", "report")


def test_progress_is_on_stderr_and_tells_phases_warnings_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**arguments: Any) -> dict[str, Any]:
        for event in (
            compare.Event("phase", "loading tiny", 0, 4),
            compare.Event("warning", "length 9 is beyond", 0, 4),
            compare.Event("plan", "1 method, 4 inputs", 1, 4),
            *(compare.Event("step", f"step {done}", done, 4) for done in (2, 3, 4)),
        ):
            arguments["on_event"](event)
        return document()

    monkeypatch.setattr(compare, "run", run)
    result = invoke("compare")
    assert "loading tiny" in result.stderr
    assert "warning: length 9 is beyond" in result.stderr
    assert "comparing (1 done before): 30 % (1/3)" in result.stderr
    assert "comparing (1 done before): 100 % (3/3)" in result.stderr
    assert "step 4" in result.stderr
    assert "loading" not in result.stdout
    silent = invoke("compare", "--quiet")
    assert silent.stderr == "warning: length 9 is beyond\n"


def test_an_interruption_says_what_is_kept_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**arguments: Any) -> dict[str, Any]:
        arguments["on_event"](compare.Event("plan", "", 0, 4))
        arguments["on_event"](compare.Event("step", "a", 1, 4))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", run)
    result = invoke("compare", "--quiet", "--out", "some/place")
    assert result.exit_code == 130
    assert "1 of 4 steps are kept in some/place; the same command with --resume goes on" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--methods", "windw"], 4, "error: unknown method 'windw'; did you mean 'window'?"),
        (["--text", "no-such.txt"], 4, "error: text 'no-such.txt' is not a file"),
        (["--model", "no-such"], 4, "error: model 'no-such' is neither a folder nor a .gguf file"),
        (["--dtype", "fp16", "--device", "cpu"], 4, "error: --dtype fp16 on the CPU"),
        (["--lengths", "2048,x"], 2, "'x' is not a length"),
        (["--trials", "0"], 2, "--trials"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A line.\n")
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tiny / name).touch()
    result = invoke("compare", "--model", tiny, "--text", text, "--out", tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    if code != 2:
        assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.needs_asset("lm", "wiki")
@pytest.mark.timeout(900)
def test_the_demo_on_the_real_model(tmp_path: Path) -> None:
    result = invoke("demo", "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads(result.stdout)["rows"]}
    assert set(rows) == {method.name for method in compare.METHODS.values() if method.default}
    dense = rows["dense"]
    assert dense["passkey_hits"] == dense["passkey_trials"]
    assert rows["window"]["passkey_hits"] < dense["passkey_hits"]
    assert dense["loss"] < min(row["loss"] for name, row in rows.items() if name != "dense")
    assert rows["window"]["kv_mib"] < dense["kv_mib"] / 2
    assert (tmp_path / "index.html").exists()
