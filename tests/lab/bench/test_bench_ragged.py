"""The race of ragged decode attention on a CPU: its inputs, its bytes and its peers."""

from functools import partial
from typing import Any

import pytest
import torch
from bench_examples import CPU

from attnkit import ops
from attnkit._core.opspec import Case
from attnkit.kv import FP8, IntN, Raw
from attnkit.lab import bench
from attnkit.lab.bench import RACES, Shape
from attnkit.lab.numerics import conformance

OP = "ragged_decode_attention"
RACE = RACES[OP]
CODECS = {"raw": Raw(), "raw64": Raw(64), "int8": IntN(8), "int4": IntN(4), "fp8": FP8()}


def shape(codec: str, kept: str = "all", length: int = 256, dtype: torch.dtype = torch.float32) -> Shape:
    (variant,) = RACE.choose_variants({"codec": [codec], "kept": [kept]})
    return Shape("decode", RACE.sizes("decode", length, 32, (8, 4), 2), dtype, CPU, variant)


@pytest.mark.parametrize("kept", ["all", "half", "adaptive"])
@pytest.mark.parametrize("codec", CODECS)
def test_inputs_are_what_an_axis_says(codec: str, kept: str) -> None:
    where = shape(codec, kept)
    arguments = RACE.arguments(RACE.draw(where, seed=0))
    pages: ops.KVPages = arguments["pages"]
    assert pages.code == codec.removesuffix("64")
    assert pages.page_size == CODECS[codec].page_size
    assert int(pages.lengths.sum()) == 2 * 4 * 256 // (1 if kept == "all" else 2)
    assert (len(pages.lengths.unique()) > 1) == (kept == "adaptive")
    assert arguments["q"].shape == (2, 1, 8, 32)
    used = int((-(-pages.lengths // pages.page_size)).sum())
    assert used == pages.keys.shape[0]
    assert RACE.traffic(where) == pytest.approx(int(pages.lengths.sum()) * CODECS[codec].bytes_per_token(32, 32, torch.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_everything_is_the_same(codec: str) -> None:
    where = shape(codec)
    case = Case(str(where), partial(RACE.inputs, where), (), RACE.fixed)
    rows = conformance.check(ops.OPS[OP], case, where.dtype, operator=RACE.peers["decoded"].make(where))
    assert rows
    assert not [row for row in rows if not row.ok]


def test_decoding_everything_needs_heads_of_one_length() -> None:
    limits = RACE.peers["decoded"].limits
    assert limits(shape("int4", "half")) == []
    assert "different numbers" in limits(shape("int4", "adaptive"))[0]


def test_a_race_with_dense_attention_beside_it() -> None:
    options: dict[str, Any] = {"lengths": [128], "dims": [16], "heads": (4, 2), "rounds": 3}
    document = bench.run(OP, vary={"codec": ["int4"], "kept": ["half", "adaptive"]}, **options)
    raced = {(row["shape"]["kept"], row["peer"]) for row in document["rows"]}
    assert raced == {("half", "decoded"), ("half", "sdpa*"), ("adaptive", "sdpa*")}
    assert [entry["peer"] for entry in document["skipped"]] == ["decoded"]
    assert all(row["bandwidth_share"] > 0 for row in document["rows"])
