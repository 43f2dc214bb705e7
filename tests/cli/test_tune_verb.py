"""`attnkit tune`: what it asks for, prints and returns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from attnkit import report
from attnkit._core.events import Event
from attnkit._core.triton.configs import Config
from attnkit.cli import main
from attnkit.lab import tune
from attnkit.lab.tune.search import Dropped, Row

pytest.importorskip("triton")

GPU = torch.device("cuda", 0)
OLD, NEW = Config(64, 128, 4, 3), Config(128, 128, 8, 3)
LOST = (Dropped(NEW, "OutOfResources: out of resource: shared memory"),)
WON = Row("fwd", "bfloat16", 16, 128, OLD, 1.234, NEW, 1.0, 0.234, 0.01, 31, LOST, ("x: plain calls",))
SAME = dataclasses.replace(WON, kernel="decode", best=OLD, best_ms=1.234, gain=0.0, spread=None, dropped=(), notes=())
NONE = dataclasses.replace(WON, present_ms=None, best=OLD, best_ms=None, gain=None, spread=None, notes=())


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


def envelope(*rows: Row, wrote: bool) -> dict[str, Any]:
    extra = {"op": "attention", "path": "some/place/attention-GPU-X.json", "wrote": wrote}
    return report.envelope("attnkit.tune/1", rows, command="", seed=None, device="GPU X", dtype="x", wall_s=1.0, extra=extra)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which tuning was asked for on a machine that seems to have a GPU; it is not run."""
    seen: list[dict[str, Any]] = []

    def run(op: str, **arguments: Any) -> dict[str, Any]:
        seen.append({"op": op, **arguments})
        return envelope(WON, SAME, wrote=arguments["store"])

    monkeypatch.setattr("attnkit.cli.tune.resolve_device", lambda name: GPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(tune, "run", run)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [[], ["--device", "cpu"], ["--device", "cuda"]], ids=" ".join)
def test_without_a_gpu_there_is_nothing_to_measure(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "run", lambda *args, **options: pytest.fail("ran"))
    result = invoke(*options)
    assert result.exit_code == 5
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --device {options[-1] if options else 'auto'}: ")


def test_options_reach_the_measurement(calls: list[dict[str, Any]]) -> None:
    assert invoke("--kernels", "fwd,decode", "--dims", "64,128", "--dtype", "fp16", "--dry-run").exit_code == 0
    assert invoke().exit_code == 0
    assert invoke("mlstm").exit_code == 0
    for call in calls:
        assert callable(call.pop("on_event"))
        assert call.pop("command").startswith("attnkit")
    first = {"dtypes": [torch.float16], "dims": (64, 128), "kernels": ("fwd", "decode"), "device": GPU, "store": False}
    second = {"dtypes": [torch.bfloat16], "dims": None, "kernels": None, "device": GPU, "store": True}
    assert calls == [{"op": "attention", **first}, {"op": "attention", **second}, {"op": "mlstm", **second}]
    assert "did you mean 'mlstm'" in invoke("mlstn").stderr


def test_the_result_is_a_table_in_a_hundred_columns_and_how_to_undo_it(calls: list[dict[str, Any]]) -> None:
    result = invoke("--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = [" ".join(line.replace("│", " ").split()) for line in result.stdout.splitlines()]
    assert "fwd bfloat16 128 64x128, 4, 3 1.23 128x128, 8, 3 1 +23% 31 1" in lines
    assert "decode bfloat16 128 64x128, 4, 3 1.23 same 1.23 - 31 0" in lines
    assert lines[-3:] == ["x: plain calls", "kept in: some/place/attention-GPU-X.json", "to undo: delete that file"]
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json_is_one_object_and_nothing_else(calls: list[dict[str, Any]]) -> None:
    result = invoke("--json")
    document = json.loads(result.stdout)
    assert document["rows"][0]["dropped"] == [{"config": dataclasses.asdict(NEW), "reason": LOST[0].reason}]
    assert document["path"] == "some/place/attention-GPU-X.json"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("rows", "options", "code", "last"),
    [
        ([WON], ["--dry-run"], 0, "Nothing was kept."),
        ([SAME], [], 0, "Nothing was faster by more than the spread of its times; nothing was written."),
        ([SAME, NONE], [], 1, "Nothing was faster by more than the spread of its times; nothing was written."),
    ],
)
def test_what_was_kept_and_what_is_missing(
    rows: list[Row], options: list[str], code: int, last: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run", lambda op, **arguments: envelope(*rows, wrote=False))
    result = invoke(*options)
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1] == last
    assert ("fwd, width 128: nothing runs; OutOfResources: out of resource: shared memory" in result.stdout) == (code == 1)


def test_progress_and_an_interruption(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))

    def run(op: str, **arguments: Any) -> dict[str, Any]:
        for event in (Event("plan", "", 0, 2), Event("phase", "fwd: 31 configurations", 0, 2), Event("step", "fwd", 1, 2)):
            arguments["on_event"](event)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", run)
    result = invoke()
    assert result.exit_code == 130
    phase, step, kept, last = result.stderr.splitlines()
    assert phase == "fwd: 31 configurations"
    assert step.startswith("tuning: 50 % (1/2), ")
    path = tmp_path / "tuned" / "attention-GPU-X.json"
    assert kept == f"warning: 1 of 2 steps are kept in {path}; name the rest with --kernels and --dims"
    assert last == "error: interrupted; finished parts are kept"


def test_unknown_kernels_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.cli.tune.resolve_device", lambda name: GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    result = invoke("--kernels", "bwd", "--dtype", "fp16")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "kernel 'bwd' is not tuned; choose from fwd, decode, bwd_dq, bwd_dkdv" in result.stderr
    assert invoke("--dims", "x").exit_code == 2
