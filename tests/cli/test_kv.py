"""`attnkit kv`: what it lists, asks for, prints and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from attnkit import kv
from attnkit.cli import main
from attnkit.lab import compare
from attnkit.testing import tiny_model
from compare_examples import SENTENCES, byte_tokenizer

TASKS = {"all": ("all",), "needle": ("needle",), "text,vt": ("text", "vt")}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("kv")
    tiny_model("llama", vocab_size=258, max_position_embeddings=1024).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("".join(SENTENCES[(i * i + i // 3) % 4] for i in range(60)))
    return folder


def given(place: Path) -> tuple[object, ...]:
    return "--model", place / "model", "--text", place / "text.txt", "--device", "cpu", "--length", 448


def test_list_names_every_method_and_wrapper_in_a_hundred_columns() -> None:
    result = invoke("kv", "list")
    assert result.exit_code == 0, result.output
    assert all(f" {name} " in result.stdout for name in kv.methods())
    assert all(f" {each.name} " in result.stdout for each in kv.catalogue.wrappers())
    assert "arXiv:2510.00636" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    listed = json.loads(invoke("kv", "list", "--json").stdout)
    assert [method["name"] for method in listed["methods"]] == list(kv.methods())
    assert next(m for m in listed["methods"] if m["name"] == "snapkv")["options"] == {"window": 64, "kernel": 5}


@pytest.mark.parametrize("task", TASKS)
def test_options_reach_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str) -> None:
    calls: list[dict[str, Any]] = []

    def sweep(**arguments: Any) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "sweep", sweep)
    common = ["--codec", "int4", "--model", "m.gguf", "--text", "novels", "--task", task, "--trials", 3, "--query-aware"]
    common += ["--device", "cpu", "--dtype", "bf16", "--seed", 7, "--out", tmp_path, "--resume", "--quiet"]
    assert (
        invoke("kv", "sweep", "--press", "snapkv,adakv:knorm", "--ratio", "0,.5", "--length", "1k,2k", *common).exit_code == 130
    )
    assert invoke("kv", "run", "--press", "snapkv", "--ratio", 0.25, "--length", "1k", *common).exit_code == 130
    for call in calls:
        for name in ("on_event", "command"):
            call.pop(name)
    same = {
        "codec": "int4", "model": "m.gguf", "text": "novels", "tasks": TASKS[task], "trials": 3, "query_aware": True,
        "device": torch.device("cpu"), "dtype": torch.bfloat16, "seed": 7, "out": tmp_path, "resume": True,
    }  # fmt: skip
    assert calls == [
        {"presses": ("snapkv", "adakv:knorm"), "ratios": (0.0, 0.5), "lengths": (1024, 2048), **same},
        {"presses": ("snapkv",), "ratios": (0.25,), "lengths": (1024,), **same},
    ]


def test_a_run_prints_memory_scores_and_answers(place: Path, tmp_path: Path) -> None:
    result = invoke(
        "kv", "run", "--press", "adakv:knorm", "--ratio", 0.75, "--task", "needle", *given(place), "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "adakv:knorm" in result.stdout
    assert "0.75" in result.stdout
    assert "of dense" in result.stdout
    assert result.stdout.count("missed: ") == 6  # a random model finds no key: three of dense, three of the press
    assert max(map(len, result.stdout.splitlines()[:8])) <= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png", "index.html", "results.csv", "results.json", "state.json",
    ]  # fmt: skip
    page = (tmp_path / "index.html").read_text()
    for title in ("Compressed caches", "What each head keeps", "Where kept tokens lie"):
        assert title in page


def test_other_questions_have_columns_and_answers_of_their_own(place: Path, tmp_path: Path) -> None:
    source = [*given(place)[:-1], 1280]
    result = invoke("kv", "run", "--press", "adakv:knorm", "--task", "needle,assoc,vt", *source, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"press +ratio +pass-keys \(95 %\) +vt +assoc +loss", result.stdout)
    for words in ("key", "vt", "assoc"):
        assert len(re.findall(rf"^adakv:knorm@0.5, {words} \d{{5}} at \d+ %, missed: ", result.stdout, re.M)) == 3
    assert max(map(len, result.stdout.splitlines()[:8])) <= 100


def test_memory_is_one_table_or_one_object(place: Path, tmp_path: Path) -> None:
    command = ["kv", "memory", "--press", "knorm", "--ratio", "0,.5", "--codec", "int8", *given(place), "--out", tmp_path]
    result = invoke(*command, "--quiet")
    assert result.exit_code == 0, result.output
    for word in ("dense:codec=int8", "knorm:codec=int8@0.5", "promised", "held MiB"):
        assert word in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "memory.png", "results.json"]
    assert "Bytes of the cache" in (tmp_path / "index.html").read_text()
    document = json.loads(invoke(*command, "--json").stdout)
    assert [row["method"] for row in document["rows"]] == ["dense", "dense:codec=int8", "knorm:codec=int8@0.5"]


def test_what_is_calibrated_can_be_used(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    source = given(place)[:-2]
    result = invoke("kv", "calibrate", *source, "--rows", 3, "--length", 128, "--out", path, "--quiet")
    assert result.exit_code == 0, result.output
    assert "q_filters: 2 x 2 x 16" in result.stdout
    assert "3 pieces read" in result.stdout
    assert set(load_file(path)) == {"query_mean", "query_cov", "q_filters", "duo"}
    presses = f"qfilter:filters={path},expected_attention_stats:stats={path},duo_attention:pattern={path}"
    used = invoke("kv", "memory", "--press", presses, *given(place), "--json", "--out", tmp_path / "memory")
    assert used.exit_code == 0, used.output
    assert len(json.loads(used.stdout)["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sweep", "--press", "knrm"], 4, "unknown cache method 'knrm'; did you mean 'knorm'"),
        (["sweep", "--press", "knorm@0.5"], 4, "press 'knorm@0.5' has a ratio of its own"),
        (["sweep", "--press", "knorm", "--ratio", "half"], 2, "'half' has an item that is no number"),
        (["run", "--press", "knorm", "--ratio", "1"], 2, "--ratio"),
        (["run", "--press", "knorm", "--length", "1k,2k"], 2, "'1k,2k' is several lengths; give one"),
        (["run", "--press", "knorm", "--task", "vtt"], 4, "tasks=vtt is not allowed; give some of text, needle, vt, cwe"),
        (["memory", "--press", "qfilter"], 4, "qfilter"),
        (["memory", "--press", "knorm", "--model", "no-such"], 4, "model 'no-such' is neither a folder"),
        (["calibrate", "--what", "duos", "--out", "x.safetensors"], 4, "what=('duos',) is not allowed"),
        (["calibrate"], 2, "--out"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_an_exit_code(
    place: Path, tmp_path: Path, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [] if "--model" in arguments else ["--model", place / "model"]
    result = invoke("kv", *arguments, *own, "--text", place / "text.txt", "--device", "cpu", "--quiet")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
