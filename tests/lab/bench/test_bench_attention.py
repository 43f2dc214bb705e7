"""The peers of attention: GPU peers judged on a CPU as far as their code goes there."""

import dataclasses
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_examples import CPU, peer, right, shape
from torch import Tensor
from torch.nn.attention import flex_attention

from attnkit import ops
from attnkit._core.opspec import Case
from attnkit.lab.bench import RACES, Shape
from attnkit.lab.bench.attention import dense_baselines
from attnkit.lab.bench.race import Operator, contestants
from attnkit.lab.numerics import conformance

RACE = RACES["attention"]
STEPS = ("fwd", "fwd+bwd", "decode")


def judge(operator: Operator, where: Shape) -> list[conformance.Row]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        return RACE.inputs(where, generator)

    case = Case(str(where), make, RACE.grads if where.trains else ())
    rows = conformance.check(ops.OPS["attention"], case, where.dtype, operator=operator)
    assert len(rows) == (5 if where.trains else 2)
    return [row for row in rows if not row.ok]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash"])
def test_fused_kernels_of_torch(name: str, step: str) -> None:
    where = shape(step, 128)
    assert judge(RACE.peers[name].make(where), where) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("step", ["fwd", "decode"])
def test_flex_gets_a_causal_mask_and_grouped_heads(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile  # the uncompiled function uses it too, to trace itself

    def compiled(function: Any, **options: Any) -> Any:
        return function if options == {"dynamic": False} else compile_(function, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    where = shape(step, 200)
    masks: list[Any] = []
    plain = flex_attention.flex_attention

    def watched(*args: Tensor, **options: Any) -> Any:
        masks.append(options["block_mask"])
        return plain(*args, **options)

    monkeypatch.setattr(flex_attention, "flex_attention", watched)
    assert judge(RACE.peers["flex"].make(where), where) == []
    assert [mask is None for mask in masks] == [step == "decode"]


@pytest.mark.parametrize("with_lse", [True, False])
def test_flash_attention_4_returns_the_output_alone(with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        out, lse = ops.attention(q, k, v, causal=causal, return_lse=True)
        return (out, lse) if with_lse else out

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None, is_package=True)
    vars(cute)["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    where = shape("fwd+bwd", 100)
    assert judge(RACE.peers["fa4"].make(where), where) == []


def test_kernels_for_sixteen_bits_say_so() -> None:
    fused = RACE.peers["cudnn"]
    assert fused.limits(shape()) == ["torch.float32 (it takes 16 bits)"]
    assert fused.limits(shape(dtype=torch.bfloat16)) == []
    odd = Shape("fwd", {"T": 8, "D": 20}, torch.float16, CPU)
    assert fused.limits(odd) == ["head width is no multiple of 8"]


def test_a_package_that_cannot_be_imported_gives_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    fa4 = RACE.peers["fa4"]
    assert fa4.reasons(shape()) == ["flash_attn is not installed; run: pip install --pre flash-attn-4"]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert "flash_attn" in fa4.reasons(shape())[0]


def test_peers_by_default_are_those_of_the_device() -> None:
    assert [each.name for each in contestants(RACE, None, CPU)] == ["sdpa"]
    named = [each.name for each in contestants(RACE, None, torch.device("cuda"))]
    assert named == ["sdpa-flash", "cudnn", "flex", "fa4"]
    mine = peer("mine", right)
    again = contestants(RACE, ["flex", mine, "sdpa", "flex"], CPU)
    assert [each.name for each in again] == ["flex", "mine", "sdpa"]


def test_peers_of_ours_may_have_options() -> None:
    (peer,) = contestants(RACE, ["attnkit:torch:stable=delta:out_dtype=float32"], CPU)
    made: Any = peer.make(Shape("fwd", {}, torch.float32, CPU))
    assert made.keywords == {"backend": "torch", "stable": "delta", "out_dtype": torch.float32}


def test_work_counts_what_a_causal_mask_leaves() -> None:
    def flops(step: str) -> float:
        return RACE.flops(Shape(step, RACE.sizes(step, 1024, 64, (8, 2), 3), torch.bfloat16, CPU))

    assert flops("fwd") == 4 * 3 * 8 * 64 * 1024 * 1024 / 2
    assert flops("fwd+bwd") == 3.5 * flops("fwd")
    assert flops("decode") == 4 * 3 * 8 * 64 * 1024
    decode = Shape("decode", RACE.sizes("decode", 1024, 64, (8, 2), 3), torch.bfloat16, CPU)
    inputs = RACE.draw(decode, seed=0)
    assert RACE.traffic(decode) == inputs["k"].nbytes + inputs["v"].nbytes


def test_baselines_are_dense_attention_whatever_else_they_are_given() -> None:
    baseline = next(each for each in dense_baselines() if each.name == "sdpa")
    assert (baseline.same_result, baseline.label) == (False, "sdpa*")
    where = shape("fwd", 64)
    inputs = RACE.draw(where, seed=0)
    expected = RACE.peers["sdpa"].make(where)(**inputs)
    assert torch.equal(baseline.make(where)(**inputs, num_buckets=4), expected)


@pytest.mark.parametrize(("device", "backend"), [("cuda", "triton"), ("cpu", "auto")])
def test_the_baseline_that_is_ours_is_no_other_library(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *, causal, backend: chosen.append(backend))
    baseline = next(each for each in dense_baselines() if each.name == "dense")
    where = shape("fwd", 64)
    inputs = RACE.draw(where, seed=0)
    baseline.make(dataclasses.replace(where, device=torch.device(device)))(**inputs)
    assert chosen == [backend]
