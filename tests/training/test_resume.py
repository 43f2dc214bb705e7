"""A run that is killed and resumed has the losses of one that was not; checkpoints are whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_examples import text_data, tiny

from attnkit import training
from attnkit._core.errors import InputError
from attnkit._core.events import Event
from attnkit.training.checkpoints import MANIFEST, last_complete, seal
from attnkit.training.journal import Journal

HERE = Path(__file__).parent
PATIENCE = 200  # seconds; a run that compiles takes a minute
LOSSES = ("step", "tokens", "loss", "learning_rate", "grad_norm", "validation_loss")


def start(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, str(HERE / "trained_run.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*arguments: object) -> None:
    with start(*arguments) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


def losses(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [{name: line[name] for name in LOSSES if name in line} for line in lines]


GPU = ("--device", "cuda", "--precision", "bf16")
PLACES = [
    pytest.param((), id="cpu"),
    pytest.param(GPU, id="gpu", marks=pytest.mark.gpu),
    pytest.param((*GPU, "--compile"), id="gpu-compiled", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed_equals_never_interrupted(
    text: Path, tmp_path: Path, place: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(text, whole, 24, *place)
    with start(text, broken, 24, "--stop-at", 14, *place) as process:
        deadline = time.monotonic() + PATIENCE
        while not (broken / "waiting").is_file():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert last_complete(broken) == broken / "checkpoint-12"
    assert losses(broken) == losses(whole)[:7]
    finish(text, broken, 24, "--resume", *place)
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 12
    first, second = (training.load_model(out)[0].state_dict() for out in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    record_property("equal_bit_by_bit", f"losses of 24 steps and {len(first)} tensors")


def pair(launcher: tuple[str, ...], *arguments: object) -> None:
    """A run in two processes; the launcher ends in its option for a port."""
    port = str(29_000 + os.getpid() % 900)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, port, str(HERE / "trained_run.py"), *map(str, arguments)]
    ended = subprocess.run(
        [*command, "--world", "2"], env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert ended.returncode == 0, ended.stderr


SHARDED = (
    "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true",
    "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "HybridBlock",
    "--main_process_port",
)  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")
TWO_GPUS = (pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))
PAIRS = [
    pytest.param((), TORCHRUN, id="cpu"),
    pytest.param(("--device", "cuda"), TORCHRUN, id="gpus", marks=TWO_GPUS),
    pytest.param(("--device", "cuda"), SHARDED, id="gpus-sharded", marks=TWO_GPUS),
]


@pytest.mark.parametrize(("place", "launcher"), PAIRS)
def test_two_processes_equal_one_that_accumulates(
    text: Path,
    tmp_path: Path,
    place: tuple[str, ...],
    launcher: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """Rows are dealt in order, and the loss is a mean over the targets of both."""
    finish(text, tmp_path / "one", 6, "--accumulate", 2, *place)
    pair(launcher, text, tmp_path / "two", 6, *place)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    differences = [abs(second["loss"] / first["loss"] - 1) for first, second in zip(one, two, strict=True)]
    record_property("loss_relative_difference", max(differences))
    assert all(difference <= 2e-5 for difference in differences)
    first, second = (training.load_model(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    record_property("weights_absolute_difference", max((first[name] - second[name]).abs().max().item() for name in first))
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


def recipe(**changes: Any) -> training.Recipe:
    return training.Recipe(**{"steps": 8, "log_every": 2, "save_every": 4} | changes)


def run(text: Path, out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    chosen = recipe(**changes)
    return training.train(tiny(), text_data(text, rows=chosen.steps), chosen, out, resume=resume, device="cpu")


def test_a_folder_belongs_to_one_run(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        run(text, tmp_path / "run")
    with pytest.raises(InputError, match=r"other settings \(recipe.learning_rate: 0.001, now 0.1\)"):
        run(text, tmp_path / "run", resume=True, learning_rate=0.1)
    text.write_text(text.read_text("utf-8") + "\n\nmore", encoding="utf-8")
    with pytest.raises(InputError, match=r"other settings \(.*data.*sha256"):
        run(text, tmp_path / "run", resume=True)


def test_resuming_what_has_ended_changes_nothing(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    before = losses(tmp_path / "run")
    run(text, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == before


def test_half_written_checkpoints_are_passed_over(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8" / MANIFEST).unlink()
    assert last_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    before = losses(tmp_path / "run")
    run(text, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == before
    assert last_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-8"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_broken_checkpoints_are_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights of a model")
    seal(folder)
    assert last_complete(tmp_path) == folder
    if damage == "truncate":
        weights.write_bytes(b"weights")
    elif damage == "flip":
        weights.write_bytes(b"Weights of a model")
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / MANIFEST).write_text("{")
    reason = {"remove": "lacks model.safetensors", "manifest": "cannot be read"}.get(damage, "is not what was saved")
    with pytest.raises(InputError, match=f"checkpoint checkpoint-3.*{reason}.*delete .* to go on from an older one"):
        last_complete(tmp_path)


def test_ctrl_c_keeps_a_checkpoint(text: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.text.startswith("step 2,"):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    chosen = recipe(save_every=0)
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny(), text_data(text, rows=8), chosen, tmp_path / "run", device="cpu", on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    run(text, tmp_path / "run", resume=True, save_every=0)
    run(text, tmp_path / "whole", save_every=0)
    resumed, whole = ({line["step"]: line for line in losses(tmp_path / name)} for name in ("run", "whole"))
    assert resumed[8] == whole[8]
    assert (resumed[3]["loss"] + resumed[4]["loss"]) / 2 == pytest.approx(whole[4]["loss"], rel=1e-6)


def test_the_journal_drops_what_will_be_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl")
    journal.begin(0)
    for step in (2, 4, 6):
        journal.write({"step": step, "loss": float("nan") if step == 4 else 1.0})
    with journal.path.open("a") as stream:
        stream.write('{"step": 8, "lo')  # the machine went off here
    again = Journal(journal.path)
    again.begin(4)
    assert [line["step"] for line in again.lines] == [2, 4]
    assert again.lines[1]["loss"] is None
    assert len(journal.path.read_text().splitlines()) == 2
    journal.path.write_text("no json\n")
    with pytest.raises(InputError, match="line 1 is not a line of a log"):
        again.begin(4)
