"""The peers of the indexed operators, judged on a CPU as far as their code goes there."""

from functools import partial
from typing import Any

import pytest
import torch
from bench_examples import CPU
from torch import Tensor
from torch.nn.attention import varlen

from attnkit import ops
from attnkit._core.opspec import Case
from attnkit.lab.bench import RACES, Shape
from attnkit.lab.numerics import conformance


def judge(op: str, name: str, where: Shape) -> list[conformance.Row]:
    race = RACES[op]
    case = Case(str(where), partial(race.inputs, where.sizes), race.grads if where.trains else ())
    rows = conformance.check(ops.OPS[op], case, where.dtype, operator=race.peers[name].make(where))
    assert len(rows) == (5 if where.trains else 2)
    return [row for row in rows if not row.ok]


def shape(op: str, step: str, length: int, heads: tuple[int, int]) -> Shape:
    return Shape(step, RACES[op].sizes(step, length, 16, heads, 1), torch.float32, CPU)


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
