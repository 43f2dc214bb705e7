"""Result files, their schemas, and tables."""

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from attnkit import report
from attnkit._core.errors import InputError, OptionError
from attnkit.report import files
from attnkit.report.tables import cell, interval, markdown_table, number
from report_examples import compare_envelope, race_envelope


@dataclass
class Row:
    name: str
    value: float


def envelope(rows: list[Any], **extra: Any) -> dict[str, Any]:
    return report.envelope(
        "attnkit.test/1", rows, command="attnkit test", seed=0, device="cpu", dtype="float32", wall_s=1.23456, extra=extra
    )


# --- result files


def test_plain_converts_what_results_hold() -> None:
    value = {
        "row": Row("a", math.inf),
        1: (np.float32(0.5), np.int64(3), torch.tensor(2.0), Path("x/y")),
        "nan": [math.nan, -math.inf],
        "flag": True,
        "none": None,
    }
    assert report.plain(value) == {
        "row": {"name": "a", "value": None},
        "1": [0.5, 3, 2.0, "x/y"],
        "nan": [None, None],
        "flag": True,
        "none": None,
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", Row])
def test_plain_refuses_what_has_no_json_form(value: object) -> None:
    with pytest.raises(OptionError, match="which has no JSON form"):
        report.plain([value])


def test_envelope_holds_what_is_needed_to_repeat_a_result() -> None:
    document = envelope([Row("a", 1.0)], model="m")
    assert document["rows"] == [{"name": "a", "value": 1.0}]
    assert list(document)[:2] == ["schema", "command"]
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["versions"]) == {"python", "attnkit", "torch", "triton", "transformers", "numpy"}
    assert (document["wall_s"], document["model"]) == (1.235, "m")


def test_extra_entries_do_not_replace_standard_ones() -> None:
    with pytest.raises(OptionError, match="extra=rows, seed would replace a standard entry"):
        report.envelope(
            "a/1", [], command="", seed=0, device="cpu", dtype="", wall_s=0.0, extra={"rows": [], "seed": 1, "model": "m"}
        )


def test_written_envelopes_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    document = envelope([{"x": "Gr\u00fc\u00dfe"}])
    report.write_json(path, document)
    assert report.read_envelope(path) == document
    assert "Gr\u00fc\u00dfe" in path.read_text(encoding="utf-8")
    assert [item.name for item in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    report.write_text(path, "old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not a text file"),
        (b"{\n1", r"is not JSON \(line 2"),
        (b"[]", 'names no "schema"'),
        (b'{"schema": 1}', 'names no "schema"'),
        (b'{"schema": "a/1"}', r'\(a/1\) has no list of "rows"'),
        (b'{"schema": "a/1", "rows": [1]}', r'\(a/1\) has no list of "rows"'),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        report.read_envelope(path)


# --- schemas


def schema(name: str) -> dict[str, Any]:
    text = resources.files("attnkit.report").joinpath("schemas", f"{name}.json").read_text("utf-8")
    loaded = json.loads(text)
    assert isinstance(loaded, dict)
    jsonschema.Draft202012Validator.check_schema(loaded)
    return loaded


@pytest.mark.parametrize(
    ("name", "document"),
    [("attnkit.compare-1", compare_envelope()), ("attnkit.race-1", race_envelope())],
    ids=["compare", "race"],
)
def test_examples_follow_their_schema(name: str, document: dict[str, Any]) -> None:
    jsonschema.validate(document, schema(name))
    broken = {**document, "rows": [{**document["rows"][0], "op": 1, "loss": "high"}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema(name))


def test_schemas_require_what_the_page_requires() -> None:
    for name, spec in ((name, report.SECTIONS[name]) for name in report.SECTIONS):
        row = schema(name.replace("/", "-"))["properties"]["rows"]["items"]
        assert set(spec.required) <= set(row["required"])


def test_conformance_results_follow_their_schema() -> None:
    from attnkit.lab.numerics import conformance

    rows = conformance.run(["merge_partials"], dtypes=(torch.float32,))[:4]
    document = report.envelope(
        "attnkit.conformance/1",
        rows,
        command="x",
        seed=None,
        device="cpu",
        dtype="float32",
        wall_s=0.1,
        extra={"level": "fast"},
    )
    jsonschema.validate(document, schema("attnkit.conformance-1"))


# --- tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (22.44, "22.4"),
        (0.0131, "0.0131"),
        (0.00012, "1.20e-04"),
        (-3.14159, "-3.14"),
        (2e9, "2.00e+09"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_intervals_and_cells() -> None:
    assert interval(2.7131, 2.6, 2.8, 3) == "2.713 (2.600 to 2.800)"
    assert interval(2.7131, None, 2.8, 2) == "2.71"
    assert interval(None, 1, 2, 2) == "-"
    assert [cell(value) for value in (None, True, False, 3, "x")] == ["-", "yes", "no", "3", "x"]


def test_markdown_table() -> None:
    assert markdown_table(("a|b", "n"), [("x|y\nz", 1.5), (None, None)]).splitlines() == [
        "| a\\|b | n |",
        "| --- | ---: |",
        "| x\\|y z | 1.50 |",
        "| - | - |",
    ]


def test_terminal_table_aligns_numbers_to_the_right() -> None:
    drawn = report.table(("name", "ms"), [("a", 1.0), ("b", "2.50 \u2605"), ("c", None)], title="T")
    assert [column.justify for column in drawn.columns] == ["left", "right"]
    assert drawn.title == "T"


def test_versions_of_absent_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PACKAGES", ("surely-not-installed",))
    assert files.versions()["surely-not-installed"] is None
