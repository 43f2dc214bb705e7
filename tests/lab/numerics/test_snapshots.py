"""Weights of runs on disk: which are found, how they are read, and how two runs are compared."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attnkit._core.errors import InputError
from attnkit._core.events import Event
from attnkit.lab.numerics import WeightDivergence, weight_deviation
from attnkit.lab.numerics.snapshots import SavedWeights, snapshots

START = {"a": torch.zeros(3, 2), "b": torch.ones(4)}


def moved(by: float) -> dict[str, Tensor]:
    return {name: weight + by for name, weight in START.items()}


def save(folder: Path, state: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / name)
    return folder


def run(folder: Path, speed: float, steps: tuple[int, ...] = (0, 10, 20)) -> Path:
    for step in steps:
        save(folder / f"snapshot-{step}", moved(step * speed))
    return folder


def test_what_a_run_has_left_is_found_by_step(tmp_path: Path) -> None:
    save(tmp_path / "snapshot-0", START)
    (save(tmp_path / "checkpoint-40", START) / "manifest.json").write_text("{}")
    save(tmp_path / "checkpoint-50", START)  # was being written when the run ended
    (tmp_path / "snapshot-7").mkdir()
    save(tmp_path / "model", START)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"steps": 60}}))
    assert {step: folder.name for step, folder in snapshots(tmp_path).items()} == {
        0: "snapshot-0", 40: "checkpoint-40", 60: "model",
    }  # fmt: skip
    assert list(snapshots(run(tmp_path / "other", 1, steps=(100, 20)))) == [20, 100]


def test_a_model_alone_is_one_snapshot(tmp_path: Path) -> None:
    assert snapshots(save(tmp_path, START)) == {0: tmp_path}


def test_weights_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path, {"a": START["a"]}, "model-00001-of-00002.safetensors")
    save(tmp_path, {"b": START["b"]}, "model-00002-of-00002.safetensors")
    save(tmp_path, {"c": START["b"]}, "optimizer.safetensors")
    weights = SavedWeights(tmp_path)
    assert set(weights) == {"a", "b"}
    assert len(weights) == 2
    assert all(torch.equal(weights[name], START[name]) for name in START)
    assert weights["a"] is not weights["a"]  # nothing is kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights; give the --out of attnkit train"),
        ({"pytorch_model.bin": b"x"}, "holds no weights"),
        ({"model.safetensors": b"no such file"}, r"model\.safetensors cannot be read as safetensors"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        WeightDivergence(tmp_path, tmp_path).compare()
    with pytest.raises(InputError, match="holds no weights"):
        snapshots(tmp_path / "nothing")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pickled weights are not read"):
        SavedWeights(tmp_path)


def test_two_runs_are_compared_at_the_steps_that_all_have(tmp_path: Path) -> None:
    runs = WeightDivergence(
        run(tmp_path / "a", 1.0), run(tmp_path / "b", 1.5), random_init=run(tmp_path / "c", 3.0, (0, 20)),
        precision=run(tmp_path / "d", 0.0), repeat=run(tmp_path / "e", 1.0),
    )  # fmt: skip
    events: list[Event] = []
    found = runs.compare(on_event=events.append)
    assert list(found.curves) == ["runs", "random_init", "precision", "repeat"]
    assert all(list(curve) == [0, 20] for curve in found.curves.values())
    assert found.last == 20
    assert [found.curves[name][20].total("max_abs") for name in found.curves] == [10, 40, 20, 0]
    assert found.curves["runs"][20].total("max_abs_update") == 10 / 20
    assert found.curves["runs"][20] == weight_deviation(moved(20), moved(30), START)
    assert [event.kind for event in events] == ["plan"] + ["step"] * 8
    assert [event.done for event in events] == list(range(9))
    assert {event.total for event in events} == {8}
    significance = found.significance()
    assert list(significance) == [20]  # at the start a change of precision has changed nothing
    assert significance[20]["w1"].value == pytest.approx(0.5)
    assert found.verdict(1.0).outcome == "accept"
    assert found.verdict(0.5).outcome == "inconclusive"
    assert found.verdict(0.1).outcome == "reject"


def test_without_a_start_there_are_no_updates(tmp_path: Path) -> None:
    found = WeightDivergence(run(tmp_path / "a", 1.0, (10, 20)), run(tmp_path / "b", 2.0, (10, 20))).compare()
    assert found.curves["runs"][20].total("w1_update") is None
    assert found.curves["runs"][20].total("w1") == 20
    assert found.significance() == {}
    with pytest.raises(InputError, match="random_init and precision was not given"):
        found.verdict(1.0)


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no step in common \(a: 0, 10; b: 5\)"):
        WeightDivergence(run(tmp_path / "a", 1, (0, 10)), run(tmp_path / "b", 1, (5,))).compare()


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the files is asked for once a comparison, in turn over the runs."""
    asked: list[tuple[str, str]] = []
    read = SavedWeights.__getitem__

    def watched(self: SavedWeights, name: str) -> Tensor:
        asked.append((name, self._folder.parent.name))
        return read(self, name)

    monkeypatch.setattr(SavedWeights, "__getitem__", watched)
    WeightDivergence(run(tmp_path / "x", 1.0, (0, 10)), run(tmp_path / "y", 2.0, (10,))).compare()
    assert asked == [("a", "x"), ("a", "y"), ("a", "x"), ("b", "x"), ("b", "y"), ("b", "x")]
