"""Options, devices, dtypes, progress and printing that verbs share."""

import json
import sys

import click
import pytest
import torch
from click.testing import CliRunner, Result

from attnkit._core.errors import DeviceUnavailable, DTypeError
from attnkit.cli._common import Progress, device_option, emit, parse_lengths, resolve_device, resolve_dtype, verb
from attnkit.cli._progress import duration
from attnkit.report import table


def option(*arguments: str) -> Result:
    @verb("probe", examples=("a", "b"), python="c")
    @click.option("--lengths", callback=parse_lengths)
    @device_option
    def command(lengths: tuple[int, ...] | None, device: str) -> None:
        """Print what was parsed."""
        click.echo(f"{lengths} {device}")

    return CliRunner().invoke(command, list(arguments))


def test_lengths_are_parsed() -> None:
    assert option("--lengths", "512, 4k,64K").output == "(512, 4096, 65536) auto\n"
    assert option().output == "None auto\n"


@pytest.mark.parametrize("text", ["", "4k,", "0", "-1", "1.5k", "k", "4m"])
def test_lengths_that_are_none_are_usage_errors(text: str) -> None:
    result = option("--lengths", text)
    assert result.exit_code == 2
    assert "--lengths" in result.stderr


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_that_exist_somewhere(text: str) -> None:
    assert option("--device", text).exit_code == 0


@pytest.mark.parametrize("text", ["gpu", "mps", "cuda:", "cuda:x", "cpu:0"])
def test_unknown_devices_are_usage_errors(text: str) -> None:
    assert option("--device", text).exit_code == 2


def test_auto_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_absent_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceUnavailable, match=r"--device cuda:1: torch .* is built without CUDA; use --device cpu"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceUnavailable, match="no CUDA device is visible"):
        resolve_device("cuda")


def test_cuda_index_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceUnavailable, match=r"2 CUDA device\(s\) here; choose cuda:0 .. cuda:1"):
        resolve_device("cuda:2")


def test_fp16_on_the_cpu_is_refused_with_the_fix() -> None:
    with pytest.raises(DTypeError, match="use --dtype bf16 or fp32"):
        resolve_dtype("fp16", torch.device("cpu"))


def test_bf16_needs_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(DTypeError, match="Old GPU has no bf16 units; use --dtype fp16 or fp32"):
        resolve_dtype("bf16", torch.device("cuda"))


def test_progress_without_a_terminal_is_one_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", 25) as progress:
        progress.phase("loading")
        for step in range(25):
            progress.advance(note=f"step {step}")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "loading"
    assert [line.split()[1] for line in lines[1:]] == [str(10 * tenth) for tenth in range(1, 11)]
    assert lines[-1].startswith("work: 100 % (25/25), ")
    assert lines[-1].endswith("step 24")


def test_progress_of_few_steps_reports_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", 3) as progress:
        progress.advance()
        progress.finish()
        progress.finish()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["30", "100"]


def test_silent_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", 2, silent=True) as progress:
        progress.phase("loading")
        progress.advance(2)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("work [x]", 2) as progress:
        progress.phase("loading [y]")
        progress.advance(note="first [z]")
        progress.advance()
    written = capsys.readouterr().err
    for text in ("work [x]", "loading [y]", "2/2", "/s"):
        assert text in written


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00:00"), (61, "0:01:01"), (3725, "1:02:05")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_emit_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"rows": [{"x": float("nan"), "y": (1, 2)}]}, True, "not printed")
    assert json.loads(capsys.readouterr().out) == {"rows": [{"x": None, "y": [1, 2]}]}


def test_emit_tables_stay_within_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    emit({}, False, table(("name", "text"), [("a[b]", "word " * 60)]), "a line [red]kept[/red]")
    written = capsys.readouterr().out
    assert max(map(len, written.splitlines())) <= 100
    assert "a[b]" in written
    assert "a line [red]kept[/red]" in written
    assert "\x1b" not in written
