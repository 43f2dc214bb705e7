"""The peers of the indexed operators, judged on a CPU as far as their code goes there."""

import json
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from bench_examples import CPU
from click.testing import CliRunner
from torch import Tensor
from torch.nn.attention import varlen

from attnkit import ops
from attnkit._core.errors import OptionError
from attnkit._core.opspec import Case
from attnkit.cli import main
from attnkit.lab import bench
from attnkit.lab.bench import RACES, Shape
from attnkit.lab.bench.attention import few_heads
from attnkit.lab.bench.race import contestants
from attnkit.lab.numerics import conformance


def judge(op: str, name: str, where: Shape) -> list[conformance.Row]:
    race = RACES[op]
    case = Case(str(where), partial(race.inputs, where), race.grads if where.trains else ())
    rows = conformance.check(ops.OPS[op], case, where.dtype, operator=race.peers[name].make(where))
    assert len(rows) == (5 if where.trains else 2)
    return [row for row in rows if not row.ok]


def shape(op: str, step: str, length: int, heads: tuple[int, int], **vary: Any) -> Shape:
    race = RACES[op]
    (variant,) = race.choose_variants({name: [value] for name, value in vary.items()})
    return Shape(step, race.sizes(step, length, 16, heads, 1), torch.float32, CPU, variant)


@pytest.mark.parametrize("step", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("op", ["hash_sparse_attention", "qk_sparse_attention"])
def test_masks(op: str, step: str) -> None:
    assert judge(op, "sdpa-mask", shape(op, step, 100, (4, 2))) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile  # the uncompiled function uses it too, to trace itself

    def compiled(function: Any, **options: Any) -> Any:
        return function if options == {"dynamic": False} else compile_(function, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    assert judge("hash_sparse_attention", "flex", shape("hash_sparse_attention", "fwd", 200, (4, 2))) == []


@pytest.mark.parametrize("old", [True, False])
def test_packed_kernel_of_torch(monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """It runs on GPUs only: what it would be given, given to our own."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
        return ops.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)

    def windowed(*args: Any, window_size: tuple[int, int]) -> Any:
        assert window_size == (-1, 0)
        return attend(*args[:5])

    def causal(*args: Any, is_causal: bool) -> Any:
        assert is_causal
        return attend(*args[:5])

    monkeypatch.setattr(varlen, "varlen_attn", causal if old else windowed)
    where = shape("hash_sparse_attention", "fwd+bwd", 100, (2, 2))
    assert judge("hash_sparse_attention", "varlen", where) == []
    limits = RACES["hash_sparse_attention"].peers["varlen"].limits
    assert "16 bits" in limits(where)[0]
    assert "share a key head" in limits(shape("hash_sparse_attention", "fwd", 10, (4, 2)))[1]


def test_buckets_and_shares_can_be_named() -> None:
    inputs = RACES["hash_sparse_attention"].draw(shape("hash_sparse_attention", "fwd", 500, (4, 2), nb="4"), seed=0)
    assert (inputs["num_buckets"], int(inputs["q_bucket"].max())) == (4, 3)
    assert inputs["q_bucket"].dtype == torch.int32
    kept = RACES["qk_sparse_attention"].draw(shape("qk_sparse_attention", "fwd", 2000, (4, 2), keep=0.9), seed=0)
    assert float(kept["q_keep"].double().mean()) == pytest.approx(0.9, abs=0.02)
    assert float(kept["k_keep"].double().mean()) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("hash_sparse_attention", "nb", "0", "nb=0 of hash_sparse_attention: give a number of buckets, 1 or more"),
        ("hash_sparse_attention", "nb", "4.5", "give a number of buckets"),
        ("hash_sparse_attention", "keep", "0.5", "nothing called 'keep' to vary; known: nb"),
        ("qk_sparse_attention", "keep", "0", "give the share that is kept, above 0 and at most 1"),
        ("qk_sparse_attention", "keep", "most", "give the share that is kept"),
    ],
)
def test_other_values_are_refused(op: str, name: str, value: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench.run(op, vary={name: [value]})


def test_work_is_that_of_the_pairs_that_are_left() -> None:
    def flops(op: str, **vary: Any) -> float:
        count = RACES[op].flops
        assert count is not None
        return count(shape(op, "fwd", 64, (4, 2), **vary))

    dense = 4 * 4 * 16 * 64 * 64 / 2
    assert flops("hash_sparse_attention", nb=4) == dense / 4
    assert flops("qk_sparse_attention", keep="0.5") == dense / 4
    assert flops("qk_sparse_attention", keep="0.3") == pytest.approx(0.09 * dense)


@pytest.mark.parametrize(
    ("op", "vary", "density"),
    [("hash_sparse_attention", {"nb": [4]}, 1 / 4), ("qk_sparse_attention", {"keep": ["0.5"]}, 1 / 4)],
)
def test_a_race_says_what_could_be_gained_and_what_sorting_costs(op: str, vary: Any, density: float) -> None:
    options: dict[str, Any] = {"lengths": [256], "dims": [16], "heads": (4, 4), "passes": ["fwd"], "rounds": 3}
    document = bench.run(op, vary=vary, **options)
    assert [row["peer"] for row in document["rows"]] == ["sdpa-mask", "sdpa*"]
    facts = document["rows"][0]["facts"]
    assert facts["density"] == pytest.approx(density, rel=0.2)
    assert facts["ideal_by_pairs"] == pytest.approx(1 / facts["density"])
    assert facts["ideal_by_tiles"] == pytest.approx(1 / facts["tile_share"])
    assert facts["density"] < facts["tile_share"]  # tiles waste some
    assert facts["sort_ms"] > 0


def test_conformance_is_judged_on_few_heads_of_a_short_sequence() -> None:
    sizes = {"B": 4, "T": 16384, "H": 48, "Hkv": 24, "D": 64}
    assert few_heads(8)(sizes) == {"B": 1, "T": 256, "H": 16, "Hkv": 8, "D": 64}
    assert few_heads(8)({"B": 1, "T": 100, "H": 6, "Hkv": 6, "D": 16}) == {"B": 1, "T": 100, "H": 6, "Hkv": 6, "D": 16}


def test_values_come_from_the_command_line(tmp_path: Path) -> None:
    options = ["--vary", "nb=2,4", "--vary", "nb=8", "--lengths", "64", "--dims", "16", "--heads", "2", "--passes", "fwd"]
    call = ["bench", "kernels", "hash_sparse_attention", *options, "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, [*call, "--quiet"])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "hash_sparse_attention.json").read_text())
    schema = json.loads(resources.files("attnkit.report").joinpath("schemas", "attnkit.race-1.json").read_text("utf-8"))
    jsonschema.validate(document, schema)
    assert list(dict.fromkeys(row["shape"]["nb"] for row in document["rows"])) == [2, 4, 8]
    assert "sdpa* computes something else" in (tmp_path / "hash_sparse_attention.html").read_text()
    for bad in ("nb", "nb=", "=4", "nb=4,"):
        assert CliRunner().invoke(main, [*call, "--vary", bad]).exit_code == 2


def test_a_race_goes_on_where_its_inputs_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def occupancy(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "occupancy", occupancy)
    options: dict[str, Any] = {"lengths": [64], "dims": [16], "heads": (2, 2), "passes": ["fwd"], "rounds": 3}
    document = bench.run("hash_sparse_attention", **options)
    assert all("inputs not measured: out of memory" in row["note"] for row in document["rows"])
    assert all("facts" not in row for row in document["rows"])


@pytest.mark.parametrize("op", ["hash_sparse_attention", "qk_sparse_attention"])
def test_heavy_shapes_by_default(op: str) -> None:
    race = RACES[op]
    assert race.heads[0] * race.batch["cuda"] == 192
    assert {16384, 65536} <= set(race.lengths["cuda"])
    assert [peer.name for peer in contestants(race, None, torch.device("cuda"))][-3:] == ["sdpa-flash", "cudnn", "fa4"]
