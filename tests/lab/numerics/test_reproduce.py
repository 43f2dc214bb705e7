"""The scaled-down reproduction: its identities, its trainings, going on, and the commands."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from watched_models import tiny

from attnkit import report
from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit.cli import main
from attnkit.lab.numerics import Reproduction
from attnkit.lab.numerics.identities import bias_table, gradient_identities
from attnkit.lab.numerics.reproduce import TRAINING_ARMS
from attnkit.lab.numerics.simulate import Arm, Training, majority_batches, text_batches, train

BRIEF: dict[str, Any] = {"seeds": (0,), "steps": 3, "bias_rows": 200}
SMALL: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 2, "context": 16, "batch": 2}


def validate(document: dict[str, Any]) -> None:
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.reproduce-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))


def test_identities_hold_to_ten_digits() -> None:
    for seed in range(3):
        rows = list(gradient_identities(seed))
        assert len(rows) == 4
        assert all(row["error"] < 1e-10 for row in rows)


def test_the_table_of_biased_rounding() -> None:
    rows = list(bias_table(8000, 0))
    first = {row["name"]: row["bias_ulp"] for row in rows[:10]}
    assert -0.25 < first["running output in bf16"] < -0.15
    assert abs(first["rounded once"]) < 0.03
    assert abs(first["running output in bf16, dynamic maximum, beta 7"]) < 0.03
    assert first["rounded once, maximum 0.3 behind"] < -0.15
    assert abs(first["rounded once, 0.3 behind, consistent sum"]) < 0.03
    assert len({(row["name"], row["ones"], tuple(row["depth"]), row["value_mean"]) for row in rows}) == len(rows) == 80


def test_the_dose_is_seen_and_exact_delta_has_none() -> None:
    sizes = {}
    for arm in (arm for arm in TRAINING_ARMS if arm.name in ("running output, 8 bits", "running output, 4 bits")):
        from attnkit.training import new_model

        model = new_model(vocab_size=8, dim=64, layers=1, heads=2, positions=48, mixer="attention_nope")
        (row,) = train(model, majority_batches(0, batch=2, length=48, alphabet=8), arm, Training(12, 3e-3))
        sizes[arm.bits] = row["eps_size"]
        assert row["series"]["step"] == list(range(12))
        assert row["series"]["loss"][-1] < row["series"]["loss"][0]
    assert sizes[4] > 1.5 * sizes[8]
    model = new_model(vocab_size=8, dim=64, layers=1, heads=2, positions=48, mixer="attention_nope")
    exact = Arm("exact", bits=4, stable="exact_delta")
    (row,) = train(model, majority_batches(0, batch=2, length=48, alphabet=8), exact, Training(4, 3e-3))
    assert row["eps_size"] == 0


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    plan = Reproduction(parts=("algebra", "text"), text=str(_text(tmp_path)), **BRIEF, **SMALL)
    document = plan.run(tmp_path / "out")
    validate(document)
    assert len(document["rows"]) == 4 + 6 * 2
    path = tmp_path / "out" / "reproduce.json"
    stored = report.read_envelope(path)
    stored |= {"rows": stored["rows"][:6], "finished": stored["finished"][:2], "complete": False}
    stored["rows"][0]["error"] = 123.0
    report.write_json(path, stored)
    with pytest.raises(OptionError, match="unfinished reproduction"):
        plan.run(tmp_path / "out")
    again = plan.run(tmp_path / "out", resume=True)
    assert again["rows"][0]["error"] == 123.0
    assert again["rows"][1:] == document["rows"][1:]
    with pytest.raises(OptionError, match="steps"):
        Reproduction(parts=("algebra", "text"), seeds=(0,), steps=4, bias_rows=200, text=plan.text, **SMALL).run(
            tmp_path / "out", resume=True
        )
    assert "Trainings on bytes of a text" in (tmp_path / "out" / "reproduce.html").read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="parts='loss'"):
        Reproduction(parts=("loss",))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="empty"):
        Reproduction(seeds=())
    with pytest.raises(OptionError, match="at least 1"):
        Reproduction(steps=0)
    with pytest.raises(InputError, match="need a longer one"):
        next(text_batches(b"short", 0, batch=1, length=5, device=torch.device("cpu")))
    model = tiny()
    model.model.layers[0].mixer.window = 4
    torch.compile(lambda x: x, backend="eager")  # loads what is switched off while somebody watches, and not for longer
    with pytest.raises(UnsupportedError, match="dense or causal"):
        train(model, majority_batches(0, batch=1, length=8, alphabet=8), Arm("off"), Training(1, 1e-3))
    assert torch._dynamo.eval_frame._stance.stance == "default"


# --- commands


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"the {i} brown foxes jump over {i * i} lazy dogs" for i in range(200)), encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["numerics", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from attnkit import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run")
        data = training.load_text_data(
            str(_text(folder)), training.load_tokenizer("bytes"), row_tokens=64, max_length=32, rows=2
        )
        model = training.new_model(vocab_size=260, dim=32, layers=1, heads=2, positions=32)
        training.train(model, data, training.Recipe(steps=2), folder / "run", device="cpu", validation_rows=1)
        yield folder / "run"


def test_probe_verb(trained: Path, tmp_path: Path) -> None:
    line = ("probe", "--model", trained, "--batches", 3, "--batch", 2, "--rows", 8, "--device", "cpu", "--out", tmp_path)
    shown = run(*line)
    assert shown.exit_code == 0, shown.output
    assert "model.layers.0.mixer, head" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    document = json.loads(run(*line, "--json").stdout)
    assert document["rows"][0]["samples"] == 3
    assert document["command"].split()[0] == "attnkit"
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "probe.html"}
    lone = run("probe", "--model", tmp_path, "--device", "cpu")
    assert (lone.exit_code, "holds no finished model" in lone.stderr) == (4, True)


def test_shadow_verb(trained: Path, tmp_path: Path) -> None:
    line = ("shadow", "--model", trained, "--batches", 2, "--batch", 2, "--rows", 8, "--device", "cpu", "--out", tmp_path)
    shown = run(*line)
    assert shown.exit_code == 0, shown.output
    assert "deviates most" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    document = json.loads(run(*line, "--json", "--against", "reference").stdout)
    assert (document["against"], len(document["rows"])) == ("attention(backend='reference')", 2 * 2)
    assert {path.name for path in tmp_path.iterdir()} == {"shadow.json", "shadow.html"}
    unknown = run(*line, "--against", "torch2")
    assert (unknown.exit_code, "torch2" in unknown.stderr) == (4, True)


def test_localise_verb(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("localise", "--model", trained, "--batches", 8, "--rows", 8, "--device", "cpu", "--out", tmp_path)
    calm = run(*line)
    assert calm.exit_code == 0, calm.output
    assert "No head leans one way" in calm.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"localise.json", "localise.html"}
    monkeypatch.setattr("attnkit.lab.numerics.localiser._FOUND_Z", 1e-6)
    found = run(*line, "--json")
    assert (found.exit_code, json.loads(found.stdout)["found"]["layer"]) == (6, "model.layers.0.mixer")
    assert "eps leans one way" in found.stderr


def test_reproduce_verb(tmp_path: Path) -> None:
    result = run("reproduce", "--parts", "algebra", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "The identities hold to" in result.stdout
    assert "reproducing: 100 % (1/1)" in result.stderr
    validate(json.loads((tmp_path / "reproduce.json").read_text()))
    bad = run("reproduce", "--parts", "loss")
    assert (bad.exit_code, "parts='loss' is not allowed" in bad.stderr) == (4, True)
