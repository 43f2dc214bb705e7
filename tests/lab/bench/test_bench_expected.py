"""The race of expected attention on a CPU: its inputs, both ways to choose keys, the layer beside it."""

import dataclasses
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_examples import CPU
from torch import Tensor

from attnkit import ops
from attnkit._core.opspec import Case
from attnkit.kv import selectors
from attnkit.lab import bench
from attnkit.lab.bench import RACES, Shape, heat
from attnkit.lab.bench.timing import Calls, Entrant
from attnkit.lab.numerics import conformance

OP = "expected_attention_scores"
RACE = RACES[OP]
FOLDER = Path(__file__).parents[3] / ".venv" / "peers"
SMALL: dict[str, Any] = {"lengths": [64, 96], "dims": [16], "heads": (4, 2), "rounds": 3}


def shape(length: int = 200, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape("fwd", RACE.sizes("fwd", length, 32, (8, 2), 2), dtype, CPU)


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (FOLDER / "kvpress").is_dir():
        pytest.skip("kvpress is not installed; run: make .venv/.peers")
    monkeypatch.syspath_prepend(str(FOLDER))


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, "kvpress").is_dir()])


def test_inputs_lie_as_in_a_cache() -> None:
    inputs = RACE.arguments(RACE.draw(shape(dtype=torch.bfloat16), seed=0))
    assert inputs["k"].shape == inputs["v"].shape == (2, 200, 2, 32)
    assert inputs["k"].transpose(1, 2).is_contiguous()
    assert inputs["k"].dtype == torch.bfloat16
    assert inputs["mean"].dtype == inputs["cov"].dtype == torch.float32
    assert inputs["cov"].shape == (2, 8, 32, 32)
    assert bool((torch.linalg.eigvalsh(inputs["cov"]) > -1e-5).all())
    assert RACE.traffic(shape()) == 2 * 2 * 200 * 2 * 32 * 4
    assert RACE.flops is not None
    assert RACE.flops(shape()) == 2 * 2 * 200 * 8 * (32 * 32 + 2 * 32)


def test_ours_chooses_half_as_the_cache_does(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []
    best = selectors.best

    def watched(scores: Tensor, counts: int | Tensor) -> selectors.Kept:
        kept = best(scores, counts)
        chosen.append(kept.index)
        return kept

    monkeypatch.setattr(selectors, "best", watched)
    inputs = RACE.arguments(RACE.draw(shape(), seed=0))
    scores = RACE.own("torch")(**inputs)
    assert torch.equal(scores, ops.expected_attention_scores(**inputs, backend="torch"))
    assert torch.equal(chosen[0], scores.transpose(1, 2).topk(100, -1).indices.sort(-1).values)


def loaded() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "kvpress"}


@pytest.mark.usefixtures("kvpress")
def test_kvpress_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress.presses", types.ModuleType("kvpress.presses"))
    before = loaded()
    RACE.peers["kvpress"].make(shape())
    assert loaded() == before


@pytest.mark.usefixtures("kvpress")
def test_kvpress_scores_alike() -> None:
    # one row of the batch, as it is judged: its sinks have the largest score of all rows, ours that of their own
    case = Case("race", partial(RACE.inputs, RACE.smaller(shape())), (), RACE.fixed)
    rows = conformance.check(ops.OPS[OP], case, torch.float32, operator=RACE.peers["kvpress"].make(shape()))
    assert rows
    assert not [row for row in rows if not row.ok]


@pytest.mark.usefixtures("kvpress")
def test_kvpress_is_unjudged_in_16_bits_only() -> None:
    unjudged = RACE.peers["kvpress-unjudged"]
    assert unjudged.limits(shape(dtype=torch.bfloat16)) == []
    assert unjudged.limits(shape()) == ["kvpress is who runs in torch.float32"]
    assert not unjudged.same_result
    assert "more than 4" in RACE.peers["kvpress"].limits(shape(4))[0]


@pytest.mark.usefixtures("kvpress")
def test_kvpress_chooses_as_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = RACE.peers["kvpress"].make(shape())
    inputs = RACE.arguments(RACE.draw(shape(), seed=0))
    counts: list[int] = []
    topk = Tensor.topk

    def watched(self: Tensor, count: int, **options: Any) -> Any:
        counts.append(count)
        return topk(self, count, **options)

    monkeypatch.setattr(Tensor, "topk", watched)
    operator(**inputs)
    assert counts == [100]


def test_who_is_absent_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    document = bench.run(OP, peers=["kvpress"], **SMALL)
    assert document["rows"] == []
    assert {entry["reason"] for entry in document["skipped"]} == {
        "kvpress is not installed; run: pip install --no-deps kvpress==0.5.5"
    }


def test_ours_is_replayed_and_who_waits_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def ready(name: str, device: torch.device, calls: Calls, *, graph: bool) -> Entrant:
        asked[name] = graph
        return Entrant(name, device, calls.all, 1, 1, None, calls)

    monkeypatch.setattr(Entrant, "ready", ready)
    calls = Calls(RACE.own("torch"), [])
    on_gpu = dataclasses.replace(shape(), device=torch.device("cuda"))
    notes = {}
    for race in (RACE, RACES["attention"]):
        course = heat.Course(race, "auto", (), rounds=3, seed=0, cold=False, copy_gb_s=1.0)
        for name, plain in (("ours", ""), ("kvpress", RACE.peers["kvpress"].plain)):
            notes[race.op, name] = course._ready(name, on_gpu, calls, plain).note, asked[name]
    assert notes == {
        (OP, "ours"): ("", True),
        (OP, "kvpress"): ("kvpress: plain calls, no CUDA graph (it waits for the device)", False),
        ("attention", "ours"): ("", False),
        ("attention", "kvpress"): ("", False),
    }


def test_the_layer_is_causal_and_whole() -> None:
    """Its output at a token is that of the same weights written down, and nobody looks ahead."""
    where = Shape("fwd", RACE.sizes("fwd", 24, 16, (4, 2), 2), torch.float32, CPU)
    run: Any = RACE.peers["llama-8b-layer"].make(where)
    cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
    layer, hidden, (cos, sin) = cells["layer"], cells["hidden"], cells["turns"]
    assert layer.mlp.gate_proj.weight.shape == (224, 64)  # 14,336 of 4,096
    with torch.no_grad():
        out = run()
        x = F.rms_norm(hidden, (64,), layer.input_layernorm.weight, 1e-6)
        part = layer.self_attn
        q, k, v = (linear(x).unflatten(-1, (-1, 16)).transpose(1, 2) for linear in (part.q_proj, part.k_proj, part.v_proj))

        def turned(t: Tensor) -> Tensor:
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat([-second, first], -1) * sin

        heads = [t.repeat_interleave(2, 1) for t in (turned(k), v)]
        scores = (turned(q) @ heads[0].mT / 4).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
        x = hidden + part.o_proj((scores.softmax(-1) @ heads[1]).transpose(1, 2).flatten(2))
        y = F.rms_norm(x, (64,), layer.post_attention_layernorm.weight, 1e-6)
        wanted = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kvpress")
def test_a_race_says_what_share_each_part_has() -> None:
    document = bench.run(OP, batch=2, **SMALL)
    assert [row["peer"] for row in document["rows"]] == ["kvpress", "llama-8b-layer*"] * 2
    assert {entry["peer"] for entry in document["skipped"]} == {"kvpress-unjudged"}
    assert document["versions"]["kvpress"] == "0.5.5"
    for row in document["rows"]:
        assert row["facts"].keys() == {"score_ms", "select_ms"}
        assert all(value > 0 for value in row["facts"].values())
        assert row["same_result"] == (row["peer"] == "kvpress")
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
