"""Following a live model with a second computation: what is found, and that the model is left alone."""

import json
import math
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor
from watched_models import batches, run, tiny

from attnkit import ops, report
from attnkit._core.errors import OptionError, ShapeError, UnsupportedError
from attnkit.lab.numerics import BF16, Shadow, deviation, golden_attention

FIRST, SECOND = "model.layers.0.mixer", "model.layers.1.mixer"


def forward(model: Any, count: int = 1) -> None:
    for batch, _ in zip(batches(), range(count), strict=False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**batch)


def test_it_finds_what_comparing_the_whole_call_finds() -> None:
    model = tiny()
    calls: list[tuple[Tensor, ...]] = []
    layer = model.model.layers[1].mixer
    operator = layer.operator

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = operator(q, k, v, **options)
        calls.append((q, k, v, out))
        return out

    layer.operator = recording
    with Shadow(model, rows=64) as log:  # two of four sequences of 32 rows: all of their rows
        forward(model)
    q, k, v, out = calls[0]
    chosen = next(
        pair
        for pair in torch.combinations(torch.arange(4))
        if math.isclose(_whole(q, k, v, out, pair, head=0), _row(log, 0)["rms"], rel_tol=1e-9)
    )
    for head in range(4):
        assert _row(log, head)["rms"] == pytest.approx(_whole(q, k, v, out, chosen, head), rel=1e-9)
        assert 0 < _row(log, head)["ulp_row_max"] < 2


def _whole(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sequences: Tensor, head: int) -> float:
    golden = golden_attention(q[sequences], k[sequences], v[sequences], causal=True)
    return deviation(out[sequences][:, :, head], golden[:, :, head], BF16).rms


def _row(log: Shadow, head: int) -> dict[str, Any]:
    (row,) = (row for row in log.rows if row["layer"] == SECOND and row["head"] == head)
    return row


def test_a_faulty_head_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    layer = model.model.layers[0].mixer
    operator = layer.operator

    def faulty(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = operator(q, k, v, **options).clone()
        out[:, :, 2] *= 1 + 2**-5
        return out

    layer.operator = faulty
    with Shadow(model, every=2) as log:
        forward(model, 3)
    assert layer.operator is faulty
    assert sorted({row["call"] for row in log.rows}) == [1, 3]
    assert len(log.rows) == 2 * 2 * 4
    found = {(row["layer"], row["head"]): row["ulp_row_max"] for row in log.rows if row["call"] == 3}
    assert found.pop((FIRST, 2)) > 4
    assert max(found.values()) < 2


def test_another_implementation_is_compared_with() -> None:
    model = tiny()
    with Shadow(model, partial(ops.attention, stable="dynamic_max"), every=1) as log:
        forward(model)
    assert {row["rms"] for row in log.rows} == {0.0}, "on a CPU both compute the same"
    assert log.report()["against"] == "attention(stable='dynamic_max')"
    with Shadow(model, lambda q, k, v, **options: (ops.attention(q, k, 2 * v, **options), None)) as log:
        forward(model)
    assert all(0.4 < row["rel_fro"] < 0.6 for row in log.rows)


def test_a_followed_run_has_the_losses_of_the_same_run_alone() -> None:
    alone = run(tiny(), 6)
    model = tiny()
    with Shadow(model, every=2) as log:
        followed = run(model, 6)
    assert followed == alone
    assert {row["call"] for row in log.rows} == {1, 3, 5}


def test_what_cannot_be_compared_is_left_out() -> None:
    model = tiny()
    operator = model.model.layers[1].mixer.operator
    model.model.layers[1].mixer.operator = lambda q, k, v, **options: operator(q, k, v, **options) * torch.nan
    with Shadow(model) as log:
        forward(model)
    assert {row["layer"] for row in log.rows} == {FIRST}
    assert log.left_out == [{"call": 1, "layer": SECOND, "why": "the result has NaN or infinities"}]


def test_the_report_follows_its_schema_and_is_drawn(tmp_path: Path) -> None:
    model = tiny()
    with Shadow(model, every=1) as log:
        forward(model, 2)
    log.left_out.append({"call": 2, "layer": FIRST, "why": "a reason"})
    document = report.plain(log.report())
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.shadow-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    page = report.render_html([document])
    assert "deviates most" in page
    assert "a reason" in page
    assert "calls" in page
    empty = Shadow(model).report()
    assert "Nothing was compared." in report.render_html([report.plain(empty)])


def test_bad_input() -> None:
    with pytest.raises(UnsupportedError, match="SoftmaxAttention"):
        Shadow(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match="every=0"):
        Shadow(tiny(), every=0)
    with pytest.raises(OptionError, match="rows=0"):
        Shadow(tiny(), rows=0)
    with pytest.raises(OptionError, match="against='gold': give 'golden' or a function"):
        Shadow(tiny(), "gold")  # type: ignore[arg-type]
    model = tiny()
    with pytest.raises(ShapeError, match="against gives shape"), Shadow(model, lambda q, k, v, **options: q[:, :1]):
        forward(model)
    forward(model)  # nothing is left installed
