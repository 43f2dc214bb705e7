"""`attnkit train` and `attnkit eval run`: files, tables, refusals, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnkit.cli import main

SMALL = ["--dim", "32", "--heads", "2", "--layers", "1", "--device", "cpu"]
LOREM = "\n\n".join(f"Paragraph {number} is about the number {number * 7 % 31} and its neighbours." for number in range(120))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(LOREM, encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_language_model_from_text_to_judgement(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = ["train", "lm", "--text", book, "--context", "32", "--batch", "4", *SMALL, "--out", out]
    result = invoke(*line, "--tokens", "4k", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "attnkit.train/1"
    assert document["recipe"]["steps"] == round(4000 / 128)
    assert document["data"]["tokenizer"] == "bytes"
    again = invoke(*line, "--tokens", "4k")
    assert again.exit_code == 4
    assert "holds a run already; add --resume" in again.stderr
    resumed = invoke(*line, "--tokens", "4k", "--resume", "--quiet")
    assert resumed.exit_code == 0, resumed.output
    assert "Speed" in resumed.stdout

    judged = invoke("eval", "run", "text", "--model", out, "--out", tmp_path / "eval", "--device", "cpu", "--json")
    assert judged.exit_code == 0, judged.output
    rows: list[dict[str, Any]] = json.loads(judged.stdout)["rows"]
    assert [row["model"] for row in rows] == ["AttnkitDecoderForCausalLM", "5-gram, Kneser-Ney"]
    assert rows[0]["loss"] == pytest.approx(document["rows"][-1]["validation_loss"], rel=1e-5)
    assert rows[1]["bits_per_byte"] < 2.5, "five bytes of this text say much about the sixth"
    stored = json.loads((tmp_path / "eval" / "eval-text.json").read_text("utf-8"))
    assert stored["rows"] == rows
    wrong = invoke("eval", "run", "mqar", "--model", out, "--lengths", "64", "--device", "cpu")
    assert wrong.exit_code == 4
    assert "task mqar: 64 tokens are more than the model's 32 positions" in wrong.stderr


def test_a_task_from_training_to_scores(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(
        "train", "task", "copy", "--set", "alphabet=5", "--lengths", "7,9", "--batch-tokens", "128", "--tokens", "3k", *SMALL,
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "At 9 tokens" in result.stdout
    assert "training, tokens: 100 %" in result.stderr
    assert "accuracy" in result.stderr
    judged = invoke(
        "eval", "run", "copy", "--model", out, "--set", "alphabet=5", "--examples", "50", "--device", "cpu", "--json"
    )
    assert judged.exit_code == 0, judged.output
    rows = json.loads(judged.stdout)["rows"]
    assert [(row["length"], row["examples"], row["answers"]) for row in rows] == [(7, 50, 150), (9, 50, 200)]
    assert all(row["right"] == round(row["accuracy"] * row["answers"]) for row in rows)
    bigger = invoke("eval", "run", "copy", "--model", out, "--device", "cpu")
    assert bigger.exit_code == 4
    assert "task copy has 65 tokens, and the model a vocabulary of 6" in bigger.stderr
    text = invoke("eval", "run", "text", "--model", out, "--device", "cpu")
    assert text.exit_code == 4
    assert "was trained on the task copy, not on a text" in text.stderr


def test_the_tokenizer_must_be_the_one_of_training(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(
        "train", "lm", "--text", book, "--context", 32, "--batch", 4, "--tokens", 256, *SMALL, "--out", out
    ).exit_code == 0  # fmt: skip
    path = out / "model" / "training_data.json"
    path.write_text(path.read_text("utf-8").replace('"tokenizer_sha256": "', '"tokenizer_sha256": "00'), encoding="utf-8")
    result = invoke("eval", "run", "text", "--model", out, "--device", "cpu")
    assert result.exit_code == 4
    assert "was trained with another bytes tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["lm", "--text", "absent.txt"], 4, "text 'absent.txt' is not a file; choose wiki, novels, pubmed, stdlib"),
        (["lm", "--text", "novels", "--tokens", "many"], 2, "'many' is no number of tokens; write 500k, 20M or 1.5B"),
        (["lm", "--text", "stdlib", "--tokenizer", "byte"], 4, "did you mean 'bytes'"),
        (["task", "recall"], 4, "unknown task 'recall'"),
        (["task", "mqar", "--lengths", "30"], 4, "length=30 is not possible for mqar"),
        (["task", "mqar", "--set", "alphabet=no"], 4, "--set alphabet=no: write FIELD=N; mqar has alphabet"),
        (["task", "mqar", "--dim", "30", "--heads", "4"], 4, "dim=30 is no multiple of heads=4"),
        (["task", "mqar", "--mixer", "atention"], 4, "unknown mixer 'atention'"),
    ],
)
def test_what_is_refused(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *arguments, "--device", "cpu", "--out", tmp_path / "run")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_missing_text_says_how_to_fetch_it(tmp_path: Path) -> None:
    if Path("/usr/lib/R/site-library/janeaustenr").is_dir():
        pytest.skip("installed system-wide")
    result = invoke("train", "lm", "--text", "novels", "--device", "cpu", "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert "run: attnkit assets fetch novels --run" in result.stderr


def test_a_model_that_is_none(tmp_path: Path) -> None:
    result = invoke("eval", "run", "mqar", "--model", tmp_path, "--device", "cpu")
    assert result.exit_code == 4
    assert "holds no finished model of attnkit train" in result.stderr
