"""`attnkit numerics weights` and `weights-study`: what they print, write and return, on planted deviations and real runs."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from attnkit.cli import main

STUDY = (
    "--steps", 4, "--every", 2, "--dim", 32, "--layers", 1, "--heads", 2, "--context", 32, "--batch", 2, "--lr", 2e-3,
    "--seed", 3, "--device", "cpu",
)  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["numerics", *(str(argument) for argument in arguments)])


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def validated(document: Any) -> Any:
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.weights-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    return document


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[str, float], Path]:
    """A run whose weights are `size` away from those of size 0, at two steps."""

    def make(name: str, size: float) -> Path:
        for step in (10, 20):
            generator = torch.Generator().manual_seed(step)
            folder = tmp_path / name / f"snapshot-{step}"
            folder.mkdir(parents=True)
            state = {f"w{i}": torch.randn(64, generator=generator) + size for i in range(6)}
            save_file(state, folder / "model.safetensors")
        return tmp_path / name

    return make


@pytest.mark.parametrize(("size", "outcome"), [(0.1, "accept"), (1.0, "inconclusive"), (10.0, "reject")])
def test_planted_deviations(plant: Callable[[str, float], Path], tmp_path: Path, size: float, outcome: str) -> None:
    a, b, r1, r2, r0 = (
        plant(name, by) for name, by in (("a", 0), ("b", 2.0**-4 * size), ("r1", 0.5), ("r2", 2.0**-4), ("r0", 0))
    )
    out = tmp_path / "out"
    arguments = (a, b, "--bands", r1, r2, "--repeat", r0, "--margin", 1.0, "--device", "cpu")
    document = validated(loaded(run("weights", *arguments, "--out", out, "--json")))
    assert document["verdict"]["outcome"] == outcome
    assert document["verdict"]["margin"] == 1.0
    assert document["significance"][-1]["max_abs"]["value"] == pytest.approx(size, rel=1e-3)
    assert document["runs"] == {"run_a": "a", "run_b": "b", "random_init": "r1", "precision": "r2", "repeat": "r0"}
    assert {path.name for path in out.iterdir()} == {f"weights.{kind}" for kind in ("json", "html", "svg", "png")}
    assert json.loads((out / "weights.json").read_text()) == document
    shown = run("weights", *arguments)
    assert shown.exit_code == 0
    assert f"Verdict: {outcome} (" in shown.stdout.replace("\n", " ")
    assert "no proof that either is stable" in shown.stdout.replace("\n", " ")
    assert "comparing: 100 % (8/8)" in shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_two_runs_alone(plant: Callable[[str, float], Path]) -> None:
    document = validated(loaded(run("weights", plant("a", 0), plant("b", 0.25), "--device", "cpu", "--json")))
    assert (document["verdict"], document["significance"]) == (None, [])
    assert [(row["pair"], row["step"]) for row in document["rows"]] == [("runs", 10), ("runs", 20)]
    assert document["rows"][0]["max_abs"] == pytest.approx(0.25, rel=1e-5)


def test_bands_and_margin_belong_together(plant: Callable[[str, float], Path]) -> None:
    a, b = plant("a", 0), plant("b", 1)
    for half in (("--bands", a, b), ("--margin", 1.0)):
        result = run("weights", a, b, *half)
        assert result.exit_code == 4
        assert "--bands and --margin belong together" in result.stderr


def test_bad_runs(plant: Callable[[str, float], Path], tmp_path: Path) -> None:
    result = run("weights", plant("a", 0), tmp_path / "nothing", "--device", "cpu")
    assert result.exit_code == 4
    assert "nothing holds no weights; give the --out of attnkit train" in result.stderr


def test_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))
    text, out = tmp_path / "text.txt", tmp_path / "study"
    text.write_text("\n\n".join(f"{i} times {i % 7} makes {i * (i % 7)} and not {i * i}" for i in range(120)), encoding="utf-8")
    document = validated(loaded(run("weights-study", *STUDY, "--text", text, "--out", out, "--json")))
    assert document["study"] == {
        "steps": 4, "every": 2, "text": str(text), "dim": 32, "layers": 1, "heads": 2, "context": 32, "batch": 2,
        "learning_rate": 2e-3, "seed": 3,
    }  # fmt: skip
    assert document["command"].split()[0] == "attnkit"
    again = run("weights-study", *STUDY, "--text", text, "--out", out)
    assert again.exit_code == 4
    assert "holds a study; go on with resume" in again.stderr
    shown = run("weights-study", *STUDY, "--text", text, "--out", out, "--resume")
    assert shown.exit_code == 0, shown.output
    assert "The same run done again is identical." in shown.stdout
    assert f"page: {out / 'weights.html'}" in shown.stdout.replace("\n", "")
    bands = ("--bands", out / "other-init", out / "fp32", "--repeat", out / "repeat", "--margin", 100)
    judged = loaded(run("weights", out / "baseline", out / "flash", *bands, "--device", "cpu", "--json"))
    assert judged["rows"] == document["rows"]
    assert judged["significance"] == document["significance"]
    assert judged["verdict"]["outcome"] == "accept"
