"""Sweeps: rows, refusals, files, going on, the page."""

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from attnkit import report
from attnkit._core.errors import InputError, OptionError
from attnkit._core.events import Event
from attnkit.lab.numerics import (
    DISTRIBUTIONS,
    DeviationSweep,
    SitePolicy,
    attribute_sites,
    deviation,
    emulated_attention,
    golden_attention,
    parse_format,
    round_to,
)

SMALL = DeviationSweep(formats=("bf16", "p5"), lengths=(32, 64), blocks=(8, 16), seeds=(0, 1), width=16)


def schema(name: str) -> Any:
    return json.loads(resources.files("attnkit.report").joinpath("schemas", f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return SMALL.run()


def test_every_combination_has_its_row(document: dict[str, Any]) -> None:
    jsonschema.validate(document, schema("attnkit.deviation-1"))
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 2 * (1 + 2 * 2)
    keys = ("format", "length", "seed", "algorithm", "policy", "block")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    assert {(row["format"], row["p"]) for row in rows} == {("bf16", 8), ("p5", 5)}
    for row in rows:
        if row["algorithm"] == "baseline":
            assert (row["ratio_rms"], row["ratio_max"], row["block"]) == (1, 1, None)


def test_a_row_is_what_its_parts_say(document: dict[str, Any]) -> None:
    wanted = {"format": "p5", "length": 64, "seed": 1, "algorithm": "fa2", "policy": "paper", "block": 8}
    row = next(row for row in document["rows"] if wanted.items() <= row.items())
    fmt = parse_format("p5")
    drawn = DISTRIBUTIONS["normal"].draw(torch.Generator().manual_seed(1), 64, 1, 16)
    q, k, v = (round_to(t.double(), fmt) for t in drawn)
    golden, policy = golden_attention(q, k, v), SitePolicy.preset("paper", fmt)
    out = emulated_attention(q, k, v, policy=policy, algorithm="fa2", block_k=8)
    found = deviation(out, golden, fmt, golden_attention(q, k, v.abs()))
    assert {name: row[name] for name in dataclasses.asdict(found)} == pytest.approx(dataclasses.asdict(found))
    base = deviation(emulated_attention(q, k, v, policy=policy), golden, fmt)
    assert row["ratio_rms"] == pytest.approx(found.rms / base.rms)
    assert row["ratio_max"] == pytest.approx(found.max_abs / base.max_abs)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_are_drawn_as_named_and_anew_for_each_seed(distribution: str) -> None:
    first, again, other = (
        DISTRIBUTIONS[distribution].draw(torch.Generator().manual_seed(seed), 4096, 2, 32) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert {tuple(t.shape) for t in first} == {(1, 4096, 2, 32)}
    q, _, v = first
    assert abs(float(v.mean()) - (distribution == "value-mean")) < 0.05
    assert (float(q.std()) > 2) == (distribution == "peaked")
    assert (float(q.abs().max()) > 20) == (distribution == "outliers")


def test_causal_and_the_normaliser_are_passed_on() -> None:
    one = dataclasses.replace(SMALL, formats=("bf16",), lengths=(64,), seeds=(0,), policies=("kernel",), blocks=(16,))
    plain = one.run()["rows"]
    causal = dataclasses.replace(one, causal=True).run()["rows"]
    assert [row["rms"] for row in plain] != [row["rms"] for row in causal]
    assert all(row["rel_fro"] < 0.01 for row in causal)
    both = dataclasses.replace(one, normalizers=("exact", "consistent")).run()["rows"]
    assert len({row["rms"] for row in both}) == 3


# --- files


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, document: dict[str, Any]) -> None:
    def stop(event: Event) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SMALL.run(tmp_path, on_event=stop)
    assert len(report.read_envelope(tmp_path / "sweep.json")["finished"]) == 3
    assert not (tmp_path / "sweep.html").exists()
    with pytest.raises(OptionError, match=r"sweep.json is an unfinished sweep; continue it with resume"):
        SMALL.run(tmp_path)
    with pytest.raises(OptionError, match=r"it was started with width=16, this call has 8"):
        dataclasses.replace(SMALL, width=8).run(tmp_path, resume=True)
    events: list[Event] = []
    resumed = SMALL.run(tmp_path, resume=True, on_event=events.append)
    assert resumed["rows"] == document["rows"]
    assert [(event.kind, event.done, event.total) for event in events] == [
        ("plan", 3, 8),
        *(("step", done, 8) for done in range(4, 9)),
    ]
    assert report.read_envelope(tmp_path / "sweep.json") == resumed
    assert resumed["complete"]
    assert "Deviation from float64" in (tmp_path / "sweep.html").read_text(encoding="utf-8")


def test_resuming_needs_a_folder() -> None:
    with pytest.raises(OptionError, match="resume=True needs out"):
        SMALL.run(resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ()}, "formats is empty; give at least one"),
        ({"formats": ("bf17",)}, "unknown number format 'bf17'"),
        ({"distributions": ("peak",)}, "did you mean 'peaked'"),
        ({"algorithms": ("baseline",)}, "algorithms='baseline' is not allowed; choose one of 'fa1'"),
        ({"policies": ("papers",)}, "policies='papers'"),
        ({"normalizers": ("none",)}, "normalizers='none'"),
        ({"blocks": (0,)}, "must be at least 1"),
        ({"width": 0}, "must be at least 1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dataclasses.replace(SMALL, **change)


# --- the page


def test_the_page_shows_medians_and_pictures(document: dict[str, Any]) -> None:
    section = report.SECTIONS["attnkit.deviation/1"].draw(document)
    figures = [block.title for block in section.blocks if isinstance(block, report.Figure)]
    assert figures == ["Over length", "Over tiles"]
    table = section.blocks[-1]
    assert isinstance(table, report.Table)
    assert len(table.rows) == 2 * 2 * 5
    row = next(row for row in table.rows if list(row[:5]) == ["bf16", "normal", "64", "fa2 paper", "8"])
    values = [
        entry["ratio_rms"]
        for entry in document["rows"]
        if (entry["format"], entry["length"], entry["policy"], entry["block"]) == ("bf16", 64, "paper", 8)
    ]
    median = report.number(sum(values) / 2)
    assert row[5].endswith(f"({median}\u00d7)")
    assert section.lead[0].startswith(f"bf16, normal, 64 tokens, tiles of 8: fa2 paper deviates {median}\u00d7")
    pages = report.render_html([document])
    assert pages.count("<svg") == 2
    assert len(re.findall("rms, \u00d7 baseline over ", pages)) == 2


def test_bits_are_drawn_where_they_vary() -> None:
    document = dataclasses.replace(SMALL, formats=("p4", "p6", "p8"), lengths=(32,), blocks=(8,), seeds=(0,)).run()
    section = report.SECTIONS["attnkit.deviation/1"].draw(document)
    assert [block.title for block in section.blocks if isinstance(block, report.Figure)] == ["Over significant bits"]
    page = report.render_html([document])
    found = re.search(r"normal, fa2 paper: ([\d.e-]+) at 4, ([\d.e-]+) at 6, ([\d.e-]+) at 8", page)
    assert found is not None
    errors = [float(value) for value in found.groups()]
    assert errors == sorted(errors, reverse=True)


def test_a_result_without_rows_and_one_with_a_missing_field(document: dict[str, Any]) -> None:
    section = report.SECTIONS["attnkit.deviation/1"].draw(document | {"rows": []})
    assert section.lead == ["Nothing was measured."]
    row = {name: value for name, value in document["rows"][0].items() if name != "rms"}
    with pytest.raises(InputError, match=r"row 0 of a attnkit\.deviation/1 result lacks rms"):
        report.render_html([document | {"rows": [row]}])


@pytest.mark.parametrize(("mode", "words"), [("one_in", "alone makes"), ("one_out", "left out leaves")])
def test_sites_are_drawn(mode: Any, words: str) -> None:
    fmt = parse_format("bf16")
    q, k, v = (round_to(t.double(), fmt) for t in DISTRIBUTIONS["normal"].draw(torch.Generator().manual_seed(0), 64, 1, 16))
    found = attribute_sites(q, k, v, SitePolicy.preset("paper", fmt), fmt, mode=mode, block_k=8)
    rows = [{"site": site, "what": site, **dataclasses.asdict(row)} for site, row in found.items()]
    facts = {"mode": mode, "algorithm": "fa2", "policy": "paper", "distribution": "normal", "length": 64, "block": 8}
    document = report.envelope(
        "attnkit.sites/1", rows, command="x", seed=0, device="cpu", dtype="bf16", wall_s=0.1, extra=facts
    )
    jsonschema.validate(document, schema("attnkit.sites-1"))
    section = report.SECTIONS["attnkit.sites/1"].draw(document)
    extreme = (max if mode == "one_in" else min)((site for site in found if site != "all"), key=lambda site: found[site].rms)
    assert section.lead[0].startswith(f"{extreme} ({extreme}) {words} an rms of {report.number(found[extreme].rms)}")
    assert "Root mean square error by rounding site: S_scale" in report.render_html([document])
    first, second = sorted((row for row in rows if row["site"] != "all"), key=lambda row: row["rms"], reverse=mode == "one_in")[
        :2
    ]
    overflown = document | {"rows": [row | {"rms": None} if row is first else row for row in rows]}
    assert report.SECTIONS["attnkit.sites/1"].draw(overflown).lead[0].startswith(second["site"])
    assert f"{first['site']} -" in report.render_html([overflown])
    nothing = document | {"rows": [row | {"rms": None} for row in rows]}
    assert report.SECTIONS["attnkit.sites/1"].draw(nothing).lead == ["No site has a finite deviation."]
    report.render_html([nothing])
