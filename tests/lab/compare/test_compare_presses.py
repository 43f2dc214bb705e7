"""Presses of the cache as methods of a comparison."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from matplotlib.figure import Figure as Picture

import attnkit.report as package
from attnkit import kv, report
from attnkit._core.errors import OptionError
from attnkit.inference import Policy
from attnkit.lab import compare
from attnkit.lab.compare import METHODS, LoadedModel
from attnkit.lab.compare.methods import describe, named, select
from attnkit.report import cache_memory

LENGTH = 448
SCHEMAS = Path(package.__file__).parent / "schemas"


@pytest.fixture
def given(loaded: LoadedModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a small comparison; its page has no figures."""
    monkeypatch.setattr(report.page, "_has_matplotlib", lambda: False)
    return {"model": loaded, "text": text, "lengths": [LENGTH], "out": tmp_path / "out"}


@pytest.fixture
def rows(given: dict[str, Any]) -> Callable[..., dict[str, dict[str, Any]]]:
    def call(*methods: str, **options: Any) -> dict[str, dict[str, Any]]:
        document = compare.run(**{**given, **options}, methods=methods)
        jsonschema.validate(document, json.loads((SCHEMAS / "attnkit.compare-1.json").read_text()))
        return {row["method"]: row for row in document["rows"]}

    return call


def test_presses_have_one_name() -> None:
    assert [method.name for method in select(["snapkv", "snapkv@0.5", "yarn"])] == ["dense", "snapkv@0.5", "yarn"]
    method = named("adakv:knorm:codec=int8@0.25")
    assert (method.name, method.press, method.ratio, method.codec) == (
        "adakv:knorm:codec=int8@0.25", "adakv:knorm", 0.25, "int8",
    )  # fmt: skip
    assert method.policy(99) == Policy(cache=kv.press("adakv:knorm", ratio=0.25))
    assert describe(method.policy(99)) == "adakv:knorm@0.25"
    assert not method.default
    assert named("dense:codec=fp8").codec == "fp8"
    assert named("window") is METHODS["window"]


def test_all_are_the_registered_methods_and_every_press_that_needs_no_file() -> None:
    names = [method.name for method in select(("all",))]
    assert names == [*METHODS, *(f"{name}@0.5" for name in kv.methods(ready=True))]
    assert len(names) == len(set(names))
    assert {"snapkv@0.5", "expected_attention@0.5", "kvzip@0.5"} <= set(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapkw", "unknown method 'snapkw'; did you mean 'snapkv'"),
        ("snapkw@0.5", "unknown cache method 'snapkw'; did you mean 'snapkv'"),
        ("snapkv:codec=int3@0.5", "unknown codec 'int3'; did you mean 'int"),
        ("qfilter", "qfilter"),
        ("window:codec=int8", "unknown cache method 'window'"),
    ],
)
def test_unknown_names_say_what_is_near(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        select([name])


def test_rows_of_presses_say_what_is_kept_and_what_it_weighs(rows: Callable[..., Any]) -> None:
    found = rows("adakv:knorm@0.75", "streaming_llm@0.75", "streaming_llm:codec=int4@0.75", "dense:codec=int8")
    dense, adaptive, recent = found["dense"], found["adakv:knorm@0.75"], found["streaming_llm@0.75"]
    assert (dense["press"], dense["ratio"], dense["codec"], dense["kept"]) == (None, None, None, None)
    assert (adaptive["press"], adaptive["ratio"]) == ("adakv:knorm", 0.75)
    assert dense["kv_mib"] > found["dense:codec=int8"]["kv_mib"] > found["streaming_llm:codec=int4@0.75"]["kv_mib"]
    assert dense["kv_mib"] > recent["kv_mib"] > found["streaming_llm:codec=int4@0.75"]["kv_mib"]
    for layer in adaptive["kept"]["heads"]:
        assert sum(layer) / len(layer) == pytest.approx(0.25, abs=0.01)
        assert len(set(layer)) > 1  # heads share a budget and take different parts of it
    for places in recent["kept"]["places"]:
        assert len(places) == 64
        assert places[0] > 0  # sinks
        assert places[1:40] == [0.0] * 39
        assert places[-1] == 1.0
        assert sum(places) / len(places) == pytest.approx(0.25, abs=0.02)


def test_a_ratio_of_nearly_nothing_is_dense(rows: Callable[..., Any]) -> None:
    found = rows("streaming_llm@0.001")  # which drops one of the oldest tokens; of equal norms the newest would go
    assert found["streaming_llm@0.001"]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-3)
    assert found["streaming_llm@0.001"]["agreement"] > 0.9


def test_one_task_alone(rows: Callable[..., Any]) -> None:
    needle = rows("knorm@0.5", tasks=["needle"], out=None)["knorm@0.5"]
    assert (needle["loss"], needle["kl"], needle["agreement"]) == (None, None, None)
    assert needle["passkey_trials"] == 3
    assert needle["kv_mib"] > 0
    text = rows("knorm@0.5", tasks=["text"], out=None)["knorm@0.5"]
    assert text["loss"] > 0
    assert (text["passkey_trials"], text["passkey_low"]) == (0, None)
    with pytest.raises(OptionError, match="tasks=needles is not allowed; give some of text, needle, vt, cwe, fwe, assoc"):
        rows("knorm@0.5", tasks=["needles"])


def test_questions_that_are_read_with_the_context_are_pressed_with_it(rows: Callable[..., Any]) -> None:
    apart, joined = (rows("streaming_llm@0.9", tasks=["needle"], out=None, query_aware=aware) for aware in (False, True))
    for name in ("dense", "streaming_llm@0.9"):
        assert [trial["key"] for trial in apart[name]["trials"]] == [trial["key"] for trial in joined[name]["trials"]]
    assert [t["answer"] for t in apart["dense"]["trials"]] == [t["answer"] for t in joined["dense"]["trials"]]
    assert joined["streaming_llm@0.9"]["kv_mib"] < apart["streaming_llm@0.9"]["kv_mib"]  # the question was pressed, too


def test_a_grid_names_every_press_at_every_ratio() -> None:
    assert compare.grid(["knorm", "snapkv:window=8"], [0, 0.25]) == ("dense", "knorm@0.25", "snapkv:window=8@0.25")
    assert compare.grid(["knorm"], [0.5], "int8") == ("knorm:codec=int8@0.5",)
    with pytest.raises(OptionError, match=r"press 'knorm@0\.5' has a ratio of its own"):
        compare.grid(["knorm@0.5"], [0.25])


def test_a_sweep_writes_a_table_a_picture_and_resumes(given: dict[str, Any]) -> None:
    steps: list[str] = []

    def stop(event: compare.Event) -> None:
        steps.extend([event.text] if event.kind == "step" else [])
        if len(steps) == 5:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"presses": ["knorm", "random"], "ratios": [0, 0.5, 0.75], **given}
    with pytest.raises(KeyboardInterrupt):
        compare.sweep(**options, on_event=stop)
    assert not (given["out"] / "results.csv").exists()
    document = compare.sweep(**options, resume=True)
    names = ["dense", "knorm@0.5", "knorm@0.75", "random@0.5", "random@0.75"]
    with (given["out"] / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in document["rows"]] == names
    assert [row["ratio"] for row in table] == ["", "0.5", "0.75", "0.5", "0.75"]
    assert float(table[1]["kv_mib"]) == document["rows"][1]["kv_mib"]
    assert (given["out"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Compressed caches" in (given["out"] / "index.html").read_text()


def test_memory_stands_next_to_the_ratio_and_to_dense(given: dict[str, Any]) -> None:
    methods = ["knorm@0.75", "think@0.75", "knorm:codec=int4@0.75"]
    document = compare.memory(model=given["model"], text=given["text"], length=LENGTH, methods=methods)
    jsonschema.validate(document, json.loads((SCHEMAS / "attnkit.kv.memory-1.json").read_text()))
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["dense", *methods]
    assert rows["dense"]["of_dense"] == 1.0
    assert rows["knorm@0.75"]["tokens"] == pytest.approx(0.25, abs=0.01)
    assert rows["think@0.75"]["tokens"] == 1.0  # channels go, tokens stay: no memory is saved
    assert rows["think@0.75"]["of_dense"] >= 1.0
    assert rows["knorm:codec=int4@0.75"]["kv_mib"] < rows["knorm@0.75"]["kv_mib"] < rows["dense"]["kv_mib"]
    section = report.SECTIONS["attnkit.kv.memory/1"].draw(document)
    table, figure = section.blocks
    assert isinstance(table, report.Table)
    assert [row[1] for row in table.rows] == ["-", "0.250", "0.250", "0.250"]
    assert isinstance(figure, report.Figure)
    drawn = figure.draw("x-")
    promised = f"{report.number(rows['dense']['kv_mib'] / 4, 4)} promised"
    assert drawn.count(promised) == 3
    for name, row in rows.items():
        assert f"{name}: {report.number(row['kv_mib'], 4)} MiB" in drawn


def test_bars_are_as_long_as_the_bytes() -> None:
    axes = Picture().subplots()
    named = {"dense": (None, 8.0), "dense:codec=int8": (None, 3.0), f"qfilter:filters={'x' * 200}@0.75": (0.75, 2.5)}
    rows = [{"method": name, "ratio": ratio, "kv_mib": weight} for name, (ratio, weight) in named.items()]
    cache_memory._bars(axes, rows, "red", "grey", "black")
    held, promised = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (held, promised) == ([8.0, 3.0, 2.5], [2.0])
    assert list(axes.lines[0].get_xdata()) == [8.0, 8.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "held in tensors", "promised"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*list(named)[:2], "qfilter:filters=xx…xxxxxxxxxxxxx@0.75"]


def test_memory_writes_a_page_and_a_picture(given: dict[str, Any]) -> None:
    document = compare.memory(model=given["model"], text=given["text"], length=LENGTH, methods=["knorm@0.5"], out=given["out"])
    assert json.loads((given["out"] / "results.json").read_text()) == document
    assert (given["out"] / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "Memory of the cache" in (given["out"] / "index.html").read_text()
