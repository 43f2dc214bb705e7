"""`attnkit numerics`: what it prints, writes and returns."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from attnkit.cli import main
from attnkit.lab.numerics import conformance
from attnkit.report import write_json

BRIEF = ("--formats", "bf16", "--lengths", "64", "--blocks", "8", "--seeds", "2", "--dim", "16", "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["numerics", *(str(argument) for argument in arguments)])


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_sweep(tmp_path: Path) -> None:
    result = run("sweep", *BRIEF, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "fa2 paper" in result.stdout
    assert "bf16, normal, 64 tokens, tiles of 8: fa2 paper deviates" in result.stdout
    assert "measuring: 100 % (2/2)" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.html"}
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_sweep_passes_every_option_on(tmp_path: Path) -> None:
    document = loaded(
        run(
            "sweep", "--formats", "fp16", "--lengths", "32", "--blocks", "4,8", "--algorithms", "fa1", "--policies", "kernel",
            "--distributions", "value-mean", "--normalizers", "consistent", "--seeds", 1, "--seed", 7, "--dim", 8, "--causal",
            "--device", "cpu", "--out", tmp_path, "--json",
        )
    )  # fmt: skip
    assert (document["width"], document["causal"], document["command"].split()[0]) == (8, True, "attnkit")
    rows = document["rows"][1:]
    keys = ("format", "distribution", "length", "seed", "algorithm", "policy", "normalizer")
    assert {tuple(row[key] for key in keys) for row in rows} == {("fp16", "value-mean", 32, 7, "fa1", "kernel", "consistent")}
    assert [row["block"] for row in rows] == [4, 8]


def test_sweep_measures_kernels_beside(tmp_path: Path) -> None:
    names = ("attnkit:torch:out_dtype=float32", "attnkit:reference", "sdpa")
    document = loaded(run("sweep", *BRIEF, "--formats", "bf16", "--kernels", ",".join(names), "--out", tmp_path, "--json"))
    rms = {name: [row["rms"] for row in document["rows"] if row["algorithm"] == name] for name in ("baseline", *names)}
    assert document["kernels"] == list(names)
    assert all(row["policy"] == "device" for row in document["rows"] if row["algorithm"] in names)
    wide, stored, fused = (max(rms[name]) for name in names)
    assert wide < 1e-6 < min(stored, fused)
    assert max(stored, fused) < max(rms["baseline"])


def test_sweep_keeps_what_is_done(tmp_path: Path) -> None:
    first = loaded(run("sweep", *BRIEF, "--out", tmp_path, "--json"))
    first["rows"][0]["rms"] = 123.0
    write_json(tmp_path / "sweep.json", first)
    assert loaded(run("sweep", *BRIEF, "--out", tmp_path, "--json", "--resume"))["rows"] == first["rows"]
    assert loaded(run("sweep", *BRIEF, "--out", tmp_path, "--json"))["rows"] != first["rows"]


@pytest.mark.parametrize("mode", ["one_in", "one_out"])
def test_sites(mode: str, tmp_path: Path) -> None:
    from importlib import resources

    document = loaded(
        run("sites", "--length", 64, "--block", 8, "--dim", 16, "--mode", mode, "--out", tmp_path, "--device", "cpu", "--json")
    )
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.sites-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    assert document["mode"] == mode
    last = next(row for row in document["rows"] if row["site"] == "O_out")
    assert (last["ulp_max"] <= 0.5) == (mode == "one_in")
    assert {path.name for path in tmp_path.iterdir()} == {"sites.json", "sites.html"}
    assert json.loads((tmp_path / "sites.json").read_text()) == document
    shown = run("sites", "--length", 64, "--block", 8, "--dim", 16, "--mode", mode, "--device", "cpu")
    assert "what is rounded" in shown.stdout
    assert "all sites make" in shown.stdout
    assert "running sum of probabilities" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "--formats", "bf17"), "unknown number format 'bf17'; did you mean 'bf16'"),
        (("sweep", "--algorithms", "fa9"), "algorithms='fa9' is not allowed"),
        (("sweep", "--kernels", "flash"), "unknown peer 'flash'"),
        (("sweep", "--kernels", "sdpa-flash"), "--kernels sdpa-flash: runs on cuda only"),
        (("sweep", "--formats", "p12", "--kernels", "sdpa"), "kernels run on bf16, fp16, fp32"),
        (("sites", "--policy", "none"), "name='none' is not allowed; choose one of 'paper'"),
        (("sites", "--algorithm", "fa9"), "algorithm='fa9' is not allowed"),
        (("sites", "--distribution", "x"), "unknown input distribution 'x'"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 4
    assert message in result.stderr


def test_conformance_is_ops_check(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(conformance, "run", lambda names, **options: asked.append((names, options)) or [])
    arguments = ("--dtype", "bf16", "--device", "cpu", "--level", "full", "--quiet")
    assert run("conformance", "--op", "attention", "--op", "merge_partials", *arguments).exit_code == 0
    assert CliRunner().invoke(main, ["ops", "check", "attention", "merge_partials", *arguments]).exit_code == 0
    (names, ours), (expected_names, expected) = asked
    assert names == expected_names == ["attention", "merge_partials"]
    assert {name: ours[name] for name in ("dtypes", "device", "level")} == {
        name: expected[name] for name in ("dtypes", "device", "level")
    }


def test_conformance_reports_what_it_judged() -> None:
    document = loaded(run("conformance", "--op", "merge_partials", "--dtype", "fp32", "--device", "cpu", "--json"))
    assert document["schema"] == "attnkit.conformance/1"
    assert {row["op"] for row in document["rows"]} == {"merge_partials"}
    assert run("conformance", "--op", "attentions").exit_code == 4
