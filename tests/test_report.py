"""Result files, tables, and the HTML page."""

import json
import math
import re
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from attnkit import report
from attnkit._core.errors import InputError, MissingExtra, OptionError
from attnkit.report import compare, files, page
from attnkit.report.tables import cell, interval, markdown_table, number
from report_examples import compare_envelope, race_envelope

pytest.importorskip("matplotlib")


@dataclass
class Row:
    name: str
    value: float


def envelope(rows: list[Any], **extra: Any) -> dict[str, Any]:
    return report.envelope(
        "attnkit.test/1", rows, command="attnkit test", seed=0, device="cpu", dtype="float32", wall_s=1.23456, extra=extra
    )


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references, external addresses and text."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if name == "aria-label" and tag == "svg":
                self.labels.append(value or "")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


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


# --- the page


def test_page_of_everything_is_self_contained_and_well_formed() -> None:
    other = {"schema": "other/1", "rows": [{"a": 1, "text": "<script>x</script>", "deep": [1]}, {"a": None, "b": "\u00e9"}]}
    html = report.render_html([compare_envelope(), race_envelope(), other])
    parsed = Page(html)
    assert all(link.startswith("#") for link in parsed.links)
    assert "script" not in parsed.tags
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(parsed.ids) == len(set(parsed.ids))
    referenced = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([\w-]+)\)", html))
    assert referenced <= set(parsed.ids)
    assert "<script>x</script>" in parsed.text
    assert "deep" not in parsed.text
    assert len(html.encode()) < 400_000


def test_page_follows_the_reader_light_dark_and_paper() -> None:
    html = report.render_html([compare_envelope()])
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that does not follow the page"
    assert "DejaVu" not in drawings


def test_page_describes_its_pictures_in_words() -> None:
    labels = Page(report.render_html([compare_envelope()])).labels
    assert len(labels) == 4
    assert "streaming at 4096: 2.846" in labels[0]
    assert "trials missed in all" in labels[1]
    assert "window at 4096: 2/10" in labels[2]
    assert "snapkv: loss 2.619" in labels[3]


def test_page_says_first_what_came_out() -> None:
    text = Page(report.render_html([compare_envelope()])).text
    assert "dense at 4,096 tokens: loss 2.598, 10 of 10 pass-keys found." in text
    assert "yarn: lowest loss besides dense; loss +0.013, 8 of 10 pass-keys found." in text
    assert (
        "streaming: shortest prefill (0.78\u00d7), fastest decoding (1.46\u00d7), smallest KV cache (0.26\u00d7); loss +0.248"
        in text
    )


def quality(document: dict[str, Any]) -> page.Table:
    section = compare.SPEC.draw(document)
    return next(block for block in section.blocks if isinstance(block, page.Table) and block.title == "Quality")


def test_baseline_comes_first_and_the_best_is_marked() -> None:
    document = compare_envelope(lengths=(1024, 2048), methods=("window", "dense"))
    document["rows"][2]["loss"] = 2.0  # window at 2,048: better than dense
    rows = quality(document).rows
    assert [row[:2] for row in rows] == [
        ["1,024", "dense"],
        ["1,024", "window"],
        ["2,048", "dense"],
        ["2,048", "window"],
    ]
    assert ["\u2605" in row[2] for row in rows] == [True, False, False, True]
    assert rows[0][3] == "10/10 (82 to 100 %)"  # both found all: nobody is best


def test_missing_values_leave_gaps_and_no_errors() -> None:
    document = compare_envelope(lengths=(1024,))
    for row in document["rows"]:
        row |= {"loss": None, "loss_low": None, "decode_tok_s": None, "kv_mib": None, "passkey_trials": 0, "trials": []}
    parsed = Page(report.render_html([document]))
    assert parsed.text.count("Pass-keys by") == 0
    document["rows"] = []
    assert "No method was run." in report.render_html([document])
    assert "No race was run." in report.render_html([{**race_envelope(), "rows": []}])


def test_shared_prefills_are_marked() -> None:
    section = compare.SPEC.draw(compare_envelope(lengths=(1024,)))
    cost = next(block for block in section.blocks if isinstance(block, page.Table) and block.title == "Cost")
    assert [row[1] for row in cost.rows if "\u2020" in row[2]] == ["dense", "snapkv"]
    assert "\u2020" in cost.note


def test_one_length_has_no_picture_over_length() -> None:
    titles = [block.title for block in compare.SPEC.draw(compare_envelope(lengths=(1024,))).blocks]
    assert "Pass-keys by length" not in titles
    assert "Pass-keys by depth" in titles


def test_races_name_winners_and_move_what_is_common_into_the_head() -> None:
    section = report.SECTIONS["attnkit.race/1"].draw(race_envelope())
    assert section.lead[0] == "Against flash-attn-4: faster in 0 of 4 races, 0.97\u00d7 in the geometric mean."
    assert ("dtype", "bf16") in list(section.facts)
    every = next(block for block in section.blocks if isinstance(block, page.Table))
    assert "dtype" not in every.headers
    assert [row[list(every.headers).index("peer / ours")] for row in every.rows[:2]] == ["0.97 \u25bc", "1.12 \u25b2"]


def test_a_race_of_one_row_still_draws() -> None:
    document = race_envelope()
    document["rows"] = document["rows"][:1]
    assert len(Page(report.render_html([document])).labels) == 1


def test_rows_that_lack_fields_are_named() -> None:
    document = compare_envelope()
    del document["rows"][3]["loss"]
    with pytest.raises(InputError, match=r"row 3 of a attnkit.compare/1 result lacks loss"):
        report.render_html([document])


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="documents is empty"):
        report.render_html([])


def test_without_matplotlib_there_are_tables_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str, *, extra: str) -> Any:
        if module == "matplotlib":
            raise MissingExtra("no")
        return pytest.importorskip(module)

    monkeypatch.setattr(page, "require", require)
    parsed = Page(report.render_html([compare_envelope()]))
    assert "svg" not in parsed.tags
    assert "matplotlib is not installed" in parsed.text
    assert "Quality" in parsed.text


def test_two_hundred_rows_stay_small_and_quick() -> None:
    document, rows = compare_envelope(), compare_envelope()["rows"]
    places = [(method, length) for length in range(15) for method in range(14)]
    document["rows"] = [
        {**rows[sum(place) % len(rows)], "method": f"method-{place[0]}", "length": 512 * (place[1] + 1)} for place in places
    ]
    report.render_html([compare_envelope()])  # fonts and templates load once
    started = time.process_time()
    html = report.render_html([document])
    assert time.process_time() - started < 4  # below 1 s on an idle machine
    assert len(document["rows"]) == 210
    assert len(html.encode()) < 400_000


def test_pages_are_reproducible() -> None:
    assert report.render_html([compare_envelope()]) == report.render_html([compare_envelope()])


def test_versions_of_absent_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PACKAGES", ("surely-not-installed",))
    assert files.versions()["surely-not-installed"] is None
