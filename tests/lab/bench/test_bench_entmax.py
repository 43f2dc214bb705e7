"""The races of entmax and of entmax attention: what scores look like, who takes part, who does not and why."""

import json
import sys
from functools import partial
from importlib import resources
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import torch
from bench_examples import CPU
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import OptionError
from attnkit._core.opspec import Case
from attnkit.lab import bench
from attnkit.lab.bench import RACES, Shape, scores
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import contestants
from attnkit.lab.numerics import conformance

ATTENTION, ROWS = RACES["entmax_attention"], RACES["entmax"]
SMALL: dict[str, Any] = {"lengths": [128], "dims": [16], "heads": (2, 1), "rounds": 3}


def shape(length: int, regime: str = "gauss", *, step: str = "fwd", dtype: torch.dtype = torch.float32, **vary: Any) -> Shape:
    (variant,) = ATTENTION.choose_variants({"scores": [regime]} | {name: [value] for name, value in vary.items()})
    return Shape(step, ATTENTION.sizes(step, length, 32, (2, 1), 1), dtype, CPU, variant)


def rows(alpha: str, step: str = "fwd") -> Shape:
    (variant,) = ROWS.choose_variants({"alpha": [alpha]})
    return Shape(step, ROWS.sizes(step, 200, 1, (1, 1), 8), torch.float32, CPU, variant)


def failures(race: bench.Race, peer: bench.Peer, where: Shape) -> list[conformance.Row]:
    case = Case(str(where), partial(race.inputs, where), race.grads if where.trains else ())
    judged = conformance.check(ops.OPS[race.op], case, where.dtype, operator=peer.make(where))
    assert len(judged) > 1
    return [row for row in judged if not row.ok]


def empty_tiles(where: Shape) -> float:
    assert ATTENTION.facts is not None
    return ATTENTION.facts(where, ATTENTION.draw(where, seed=0))["empty_tiles"]


def test_scores_are_as_sparse_as_they_are_called() -> None:
    assert empty_tiles(shape(2048, "empty60", dtype=torch.bfloat16)) == pytest.approx(0.6, abs=0.08)
    assert empty_tiles(shape(2048, "empty80", dtype=torch.bfloat16)) == pytest.approx(0.8, abs=0.06)
    assert empty_tiles(shape(512)) < 0.05
    flat = ATTENTION.facts(shape(512, "flat"), ATTENTION.draw(shape(512, "flat"), seed=0))  # type: ignore[misc]
    assert flat["empty_tiles"] == 0
    assert flat["zeros"] < 0.01
    assert flat["support"] > 0.99 * 513 / 2


def test_gaussian_scores_have_the_variance_that_is_promised() -> None:
    inputs = ATTENTION.draw(shape(256), seed=0)
    products = torch.einsum("bihd,bjhd->bhij", inputs["q"][:, :, :1], inputs["k"]) / 32**0.5
    assert float(products.var()) == pytest.approx(6, rel=0.1)


def test_the_bonus_of_a_position_is_exact_in_sixteen_bits() -> None:
    """Keys beyond 256 cannot be told apart as one number of 8 significant bits."""
    generator = torch.Generator().manual_seed(0)
    q, k = scores.structured("empty80", (1, 1, 1500, 32), (1, 1, 1500, 32), 1.5, generator, torch.bfloat16)
    bonus = (q[0, 0, :, :3].double() @ k[0, 0, :, :3].double().T)[1000, 1:]
    steps = bonus.diff()
    assert float(steps.min()) == float(steps.max()) > 0
    sink = (q[0, 0, :, 3:6].double() @ k[0, 0, :1, 3:6].double().T)[1:, 0]
    assert torch.equal(sink.diff(), steps[:1].expand(1498))  # it keeps up with the rows


def test_inputs_are_drawn_in_pieces_and_in_their_dtype() -> None:
    drawn = normal((40, 500), torch.Generator().manual_seed(0), torch.bfloat16)
    assert drawn.dtype == torch.bfloat16
    assert float(drawn.double().std()) == pytest.approx(1, abs=0.03)
    assert len(drawn.unique(dim=0)) == 40
    assert torch.equal(drawn, normal((40, 500), torch.Generator().manual_seed(0), torch.bfloat16))


def test_heads_come_before_tokens_in_memory() -> None:
    inputs = ATTENTION.draw(shape(100), seed=0)
    assert all(inputs[name].transpose(1, 2).is_contiguous() for name in "qkv")


@pytest.mark.parametrize("step", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("regime", ["gauss", "empty95", "flat"])
@pytest.mark.parametrize("name", ["matrices", "blockwise"])
def test_peers_of_attention_compute_the_same(name: str, regime: str, step: str) -> None:
    assert failures(ATTENTION, ATTENTION.peers[name], shape(150, regime, step=step)) == []
    assert failures(ATTENTION, ATTENTION.peers[name], shape(100, regime, step=step, alpha="1.75")) == []


def test_a_wrong_threshold_does_not_go_through() -> None:
    def off(shape: Shape) -> Any:
        return lambda q, k, v, causal, alpha: ops.entmax_attention(q, k, v, causal=causal, alpha=alpha + 0.01)

    assert failures(ATTENTION, bench.Peer("off", "", off), shape(150)) != []


@pytest.fixture
def adasplash(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The package, computed by ours: what it is given, and that results come back."""
    given: dict[str, Any] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.is_contiguous()
        given["storage"] = q.data_ptr()
        out = ops.entmax_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, backend="torch")
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    package = ModuleType("adasplash")
    vars(package).update(adasplash_v2=attention, triton_entmax=lambda x, alpha: ops.entmax(x, alpha))
    monkeypatch.setitem(sys.modules, "adasplash", package)
    return given


def test_adasplash_gets_heads_first_without_a_copy(adasplash: dict[str, Any]) -> None:
    peer, where = ATTENTION.peers["adasplash"], shape(128, step="fwd+bwd")
    assert failures(ATTENTION, peer, where) == []
    inputs = ATTENTION.draw(where, seed=0)
    out = peer.make(where)(**inputs)
    assert out.shape == inputs["q"].shape
    assert adasplash["storage"] == inputs["q"].data_ptr()
    assert failures(ROWS, ROWS.peers["adasplash"], rows("1.5", "fwd+bwd")) == []


def test_adasplash_says_what_it_cannot_do(adasplash: dict[str, Any]) -> None:
    limits = ATTENTION.peers["adasplash"].limits
    assert limits(shape(128)) == []
    assert limits(shape(128, alpha="2")) == ["alpha=2; its second version computes alpha 1.5"]
    assert limits(shape(96)) == ["T=96; it takes powers of two from 64 on"]
    assert limits(shape(32)) == ["T=32; it takes powers of two from 64 on"]
    wide = Shape("fwd", {"T": 64, "D": 80}, torch.float32, CPU, {"alpha": "1.5"})
    assert limits(wide) == ["D=80; it takes powers of two from 16 to 256"]
    assert ATTENTION.peers["adasplash"].reasons(shape(128)) == ["runs on cuda only"]


def test_adasplash_is_refused_by_name_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adasplash", None)
    peer = ATTENTION.peers["adasplash"]
    assert peer.reasons(shape(128)) == ["adasplash is not installed; run: pip install adasplash"]
    document = bench.run("entmax_attention", peers=["adasplash"], passes=["fwd"], vary={"scores": ["gauss"]}, **SMALL)
    assert document["rows"] == []
    assert [entry["reason"] for entry in document["skipped"]] == ["adasplash is not installed; run: pip install adasplash"]


def test_slow_forms_stop_where_they_would_take_too_long() -> None:
    assert ATTENTION.peers["matrices"].limits(shape(4096)) == []
    assert ATTENTION.peers["matrices"].limits(shape(8192)) == ["it writes all scores down; up to 4096 tokens"]
    assert ATTENTION.peers["blockwise"].limits(shape(8192)) == ["its loops run in Python; up to 4096 tokens"]


def test_a_race_of_attention_says_how_sparse_its_scores_are() -> None:
    document = bench.run("entmax_attention", vary={"scores": ["empty60", "flat"]}, passes=["fwd+bwd"], **SMALL)
    assert [(row["shape"]["scores"], row["peer"]) for row in document["rows"]] == [
        (regime, peer) for regime in ("empty60", "flat") for peer in ("matrices", "sdpa*")
    ]
    schema = json.loads(resources.files("attnkit.report").joinpath("schemas", "attnkit.race-1.json").read_text("utf-8"))
    jsonschema.validate(document, schema)
    facts = {row["shape"]["scores"]: row["facts"] for row in document["rows"]}
    assert facts["empty60"]["zeros"] > 0.9
    assert facts["flat"]["zeros"] < 0.05
    for row in document["rows"]:
        assert (row["shape"]["alpha"], row["backend"]) == ("1.5", "torch")


def test_the_kernels_race_in_the_interpreter() -> None:
    options = SMALL | {"lengths": [64], "backend": "triton", "peers": ["attnkit:torch"], "passes": ["fwd"]}
    document = bench.run("entmax_attention", vary={"scores": ["empty60"]}, **options)
    (row,) = document["rows"]
    assert (row["backend"], row["peer"], document["skipped"]) == ("triton", "attnkit:torch", [])


@pytest.mark.parametrize("step", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(("name", "alpha"), [("entmax-sort", "1.5"), ("entmax-sort", "2"), ("entmax-bisect", "1.25")])
def test_peers_of_rows_compute_the_same(name: str, alpha: str, step: str) -> None:
    bad = failures(ROWS, ROWS.peers[name], rows(alpha, step))
    assert [row.quantity for row in bad if row.quantity != "ulp_row"] == []  # bisection ends a few roundings short


def test_sorting_is_known_for_two_alphas() -> None:
    assert ROWS.peers["entmax-sort"].limits(rows("2")) == []
    assert ROWS.peers["entmax-sort"].limits(rows("1.25")) == ["alpha=1.25; sorting is known for 1.5 and 2"]


def test_a_race_of_rows_is_measured_in_bytes() -> None:
    document = bench.run("entmax", lengths=[64], batch=8, rounds=3)
    assert {"entmax-sort", "softmax*"} <= {row["peer"] for row in document["rows"]}
    for row in document["rows"]:
        assert row["shape"] == {"B": 8, "T": 64, "scores": "gauss", "alpha": "1.5"}
        moved = {"fwd": 2, "fwd+bwd": 5}[row["pass"]] * 8 * 64 * 4
        assert row["bandwidth_share"] == pytest.approx(moved / row["ours_ms"] / 1e6 / document["copy_gb_s"])
        assert "tflops" not in row


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("entmax", {"dims": [64]}, "entmax has no heads; leave dims and heads out"),
        ("entmax", {"heads": (4, 4)}, "entmax has no heads"),
        ("entmax", {"vary": {"alpha": ["1"]}}, "alpha=1 of entmax: give a number above 1 and at most 2"),
        (
            "entmax_attention",
            {"vary": {"scores": ["empty50"]}},
            "choose one of gauss, empty60, empty80, empty90, empty95, flat",
        ),
        ("entmax_attention", {"vary": {"alphas": ["2"]}}, "nothing called 'alphas' to vary; known: scores, alpha"),
    ],
)
def test_other_values_are_refused(op: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench.run(op, **options)


def test_who_runs_on_a_gpu_by_default() -> None:
    cuda = torch.device("cuda")
    assert [peer.name for peer in contestants(ATTENTION, None, cuda)] == [
        "adasplash", "matrices", "blockwise", "dense", "sdpa-flash", "cudnn", "fa4",
    ]  # fmt: skip
    assert [peer.name for peer in contestants(ROWS, None, cuda)] == ["adasplash", "entmax-sort", "entmax-bisect", "softmax"]
