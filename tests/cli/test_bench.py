"""`attnkit bench kernels`: what it prints, writes and returns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from attnkit import __version__
from attnkit._core.events import Event
from attnkit.cli import main
from attnkit.lab import bench
from report_examples import race_envelope, skipped_entries

EMPTY: dict[str, Any] = {"skipped": [], "finished": ["a"], "copy_gb_s": 1.0}
BRIEF = ["--device", "cpu", "--lengths", "64", "--dims", "16", "--heads", "4/2", "--rounds", "3", "--passes", "fwd"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "kernels", *(str(argument) for argument in arguments)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which a race was asked for; it is not run."""
    seen: list[dict[str, Any]] = []

    def run(op: str, **arguments: Any) -> dict[str, Any]:
        seen.append({"op": op, **arguments})
        return race_envelope() | EMPTY

    monkeypatch.setattr(bench, "run", run)
    return seen


def test_options_reach_the_race(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ["--peers", "flex,cudnn", "--lengths", "4k,512", "--dims", "64", "--passes", "fwd,decode", "--heads", "32/8"]
    more = ["--batch", 2, "--backend", "torch", "--rounds", 5, "--dtype", "bf16", "--device", "cpu", "--seed", 7]
    result = invoke("attention", *options, *more, "--out", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    (call,) = calls
    for name in ("on_event", "command"):
        call.pop(name)
    assert call == {
        "op": "attention",
        "peers": ("flex", "cudnn"),
        "lengths": (4096, 512),
        "dims": (64,),
        "passes": ("fwd", "decode"),
        "heads": (32, 8),
        "batch": 2,
        "backend": "torch",
        "rounds": 5,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "seed": 7,
        "out": tmp_path,
        "resume": True,
    }


def test_defaults_are_those_of_the_race(calls: list[dict[str, Any]]) -> None:
    assert invoke("attention", "--heads", "8").exit_code == 0
    (call,) = calls
    assert call["heads"] == (8, 8)
    assert {call[name] for name in ("peers", "lengths", "dims", "passes")} == {None}
    assert str(call["out"]) == "attnkit-bench"


def test_the_result_is_a_table_in_a_hundred_columns_and_a_line_a_peer(calls: list[dict[str, Any]]) -> None:
    result = invoke("attention", "--quiet")
    assert result.exit_code == 0
    for text in ("peer / ours", "1.71 ▲", "Against flex_attention ours pays at every length.", "attnkit-bench/attention.json"):
        assert text in result.stdout
    assert "first call s" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""


def test_json_is_one_object_and_nothing_else(calls: list[dict[str, Any]]) -> None:
    result = invoke("attention", "--json")
    assert json.loads(result.stdout) == race_envelope() | EMPTY
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("skipped", "options", "code"),
    [
        (skipped_entries()[:1], [], 0),  # what is not here by default is listed and no failure
        (skipped_entries()[:1], ["--peers", "fa4"], 1),
        (skipped_entries(), [], 6),
    ],
)
def test_what_was_not_raced_is_listed_and_decides_the_exit_code(
    skipped: list[dict[str, Any]], options: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = race_envelope() | EMPTY | {"skipped": skipped}
    monkeypatch.setattr(bench, "run", lambda op, **arguments: document)
    result = invoke("attention", *options)
    assert result.exit_code == code
    assert "flash_attn is not installed" in result.stdout
    assert (result.stderr == "error: attention failed on 1 of 1 shapes: out of memory\n") == (code == 6)


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("attentoin", [], 4, "error: unknown race 'attentoin'; did you mean 'attention'?"),
        ("attention", ["--peers", "sdpb"], 4, "error: unknown peer 'sdpb'; did you mean 'sdpa'?"),
        ("attention", ["--dims", "12"], 4, "error: head width D=12 is outside 16..256; pad narrower heads with zeros"),
        ("attention", ["--backend", "none"], 4, "error: attention has no backend 'none'"),
        ("attention", ["--heads", "4/2/1"], 2, "'4/2/1' is not a number of heads"),
        ("attention", ["--heads", "0"], 2, "'0' is not a number of heads"),
        ("attention", ["--rounds", "2"], 2, "--rounds"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_an_exit_code(name: str, options: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = invoke(name, *BRIEF, *options, "--out", tmp_path)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_real_race_and_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("attention", *BRIEF, "--peers", "sdpa", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "racing: 100 % (1/1)" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"attention.json", "attention.html"}

    def run(op: str, **arguments: Any) -> dict[str, Any]:
        arguments["on_event"](Event("step", "a", 3, 4))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    result = invoke("attention", "--out", "some/place")
    assert result.exit_code == 130
    assert "3 of 4 steps are kept in some/place; the same command with --resume goes on" in result.stderr


def test_the_command_line_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "attnkit", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"attnkit {__version__}\n"
