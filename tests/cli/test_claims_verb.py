"""`attnkit claims`: what it lists and shows, and the quick form of every claim from end to end."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from attnkit.cli import main
from attnkit.lab.claims import CLAIMS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))


def claims(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["claims", *(str(argument) for argument in arguments)])


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_and_show() -> None:
    shown = claims("list")
    assert shown.exit_code == 0
    assert "entmax-recall" in shown.stdout
    assert [entry["name"] for entry in loaded(claims("list", "--json"))["claims"]] == list(CLAIMS)
    for name in CLAIMS:
        text = " ".join(claims("show", name).stdout.split())
        assert CLAIMS[name].source in text
        assert "seeds" in text
    found = loaded(claims("show", "entmax-recall", "--json"))
    assert found["settings"]["lengths"] == [64, 128, 256, 512, 1024, 2048]
    assert found["quick"]["seeds"] == [0]


def test_refusals(tmp_path: Path) -> None:
    for arguments, message in (
        (("show", "entmax-recal"), "did you mean 'entmax-recall'"),
        (("run", "entmax-recall", "--set", "steps=3"), "has no setting 'steps'"),
        (("run", "entmax-recall", "--set", "steps"), "write NAME=VALUE"),
        (("run", "entmax-recall", "--seeds", "a"), "write numbers"),
        (("run", "entmax-recall", "--set", "positions=first,last"), "positions"),
    ):
        result = claims(*arguments, *(("--out", tmp_path, "--device", "cpu") if arguments[0] == "run" else ()))
        assert result.exit_code == 4, result.output
        assert message in result.stderr


# what makes the quick forms quicker still, and what must be in the rows
RUNS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "entmax-recall": ((), {"accuracy", "length", "norm"}),
    "entmax-iterations": (("lengths=64",), {"worst", "method"}),
    "entmax-anneal": (("base_steps=2", "steps=3"), {"validation_loss", "arm"}),
    "entmax-lm": (("lengths=64", "layers=1"), {"validation_loss", "step_ms", "norm"}),
    "scfa-lm": (("lengths=64", "layers=1"), {"validation_loss", "step_ms", "arm", "curve"}),
    "entmax-encoder": (("lengths=16", "alphas=1,1.5"), {"accuracy", "alpha"}),
    "entmax-retrieval": (("lengths=32", "alphas=1.5"), {"ndcg", "alpha"}),
    "mlstm-transfer": ((), {"before", "after", "gate"}),
    "mlstm-lm": (("layers=1",), {"validation_loss", "step_ms", "arm", "curve"}),
    "kv-recall": ((), {"method", "phase", "ratio"}),
    "kv-needles": (("length=128", "needles=1"), {"method", "phase", "ratio"}),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_the_quick_form(name: str, tmp_path: Path) -> None:
    changes, fields = RUNS[name]
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(f"{i} times {i % 7} makes {i * (i % 7)} and not {i * i}" for i in range(400)), encoding="utf-8")
    if hasattr(CLAIMS[name].settings(), "text"):
        changes = (*changes, f"text={text}")
    line = [
        "run",
        name,
        "--quick",
        "--device",
        "cpu",
        "--out",
        out,
        *(part for change in changes for part in ("--set", change)),
    ]
    document = loaded(claims(*line, "--json"))
    schema = resources.files("attnkit.report").joinpath("schemas", "attnkit.claim-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(schema))
    assert document["complete"]
    assert document["rows"]
    assert all(fields <= set(row) for row in document["rows"])
    assert document["verdict"]["outcome"] == "undecided"
    assert document["verdict"]["reason"].startswith("The quick form is too small")
    assert document["figures"]
    assert (out / f"{name}.png").is_file()
    assert not list(out.rglob("checkpoint-*"))
    if name == "scfa-lm":
        sparse = [row for row in document["rows"] if row["arm"] != "dense"]
        assert all(row["density"] < 0.6 for row in sparse)
        assert len(document["rows"]) == 3
    if name == "mlstm-lm":
        assert [line["name"] for line in document["figures"][0]["lines"]] == [
            "softmax",
            "mlstm exp",
            "mlstm sigmoid",
            "lightning",
            "simple gla",
        ]
    if name == "entmax-lm":
        (row,) = (row for row in document["rows"] if row["norm"] == "entmax")
        assert [len(row["element"]), len(row["element"][0])] == [1, 2]
    again = claims(*line, "--resume")
    assert again.exit_code == 0, again.output
    assert "Verdict: undecided" in again.stdout
    assert "100 %" not in again.stderr, "nothing was left to do"
    assert max(map(len, again.stdout.splitlines())) <= 100
