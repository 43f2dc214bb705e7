"""The race of causal entmax attention, on scores of several kinds, against AdaSplash, matrices, and dense softmax attention."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.registry import Registry
from attnkit.lab.bench.attention import causal_flops, dense_baselines, few_heads, rows_traffic, sizes
from attnkit.lab.bench.entmax import alpha_axis, choice, package_entmax
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import Axis, Facts, Operator, Peer, Race, Shape
from attnkit.lab.bench.scores import REGIMES, structured

__all__ = ["RACE"]

_LONGEST_MATRIX = 4096  # tokens up to which somebody would write scores down
_LONGEST_LOOPS = 4096  # tokens up to which our loops in plain torch are worth waiting for on a GPU
_MEASURED_HEADS = 2


def _inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Heads before tokens in memory, as models hold them and as AdaSplash wants them."""
    sizes, alpha = shape.sizes, float(shape.variant["alpha"])
    queries, keys = ((sizes["B"], sizes[name], sizes["T"], sizes["D"]) for name in ("H", "Hkv"))
    q, k = structured(str(shape.variant["scores"]), queries, keys, alpha, generator, shape.dtype)
    v = normal(keys, generator, shape.dtype)
    tensors = {name: t.transpose(1, 2) for name, t in {"q": q, "k": k, "v": v}.items()}
    return tensors | {"causal": True, "alpha": alpha}


def _facts(shape: Shape, inputs: dict[str, Any]) -> Facts:
    """What thresholds say about the first heads: shares of empty tiles (64 x 64) and of zeros, and the keys of a row."""
    kv_heads = min(shape.sizes["Hkv"], _MEASURED_HEADS)
    heads = kv_heads * (shape.sizes["H"] // shape.sizes["Hkv"])
    few = {"q": inputs["q"][:1, :, :heads], "k": inputs["k"][:1, :, :kv_heads], "v": inputs["v"][:1, :, :kv_heads]}
    result = ops.entmax_attention(**inputs | few, return_aux=True)
    assert isinstance(result, ops.EntmaxAttentionResult)
    found = {name: float(values.mean()) for name, values in ops.attention_sparsity(result).items()}
    return {"empty_tiles": found["tile"], "zeros": found["element"], "support": found["support"]}


def _adasplash(shape: Shape) -> Operator:
    attention: Operator = importlib.import_module("adasplash").adasplash_v2

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, alpha: float) -> Tensor:
        queries, keys, values = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # views, of heads-first inputs
        out: Tensor = attention(queries, keys, values).transpose(1, 2)
        return out

    return attend


def _adasplash_limits(shape: Shape) -> list[str]:
    length, width, alpha = shape.sizes["T"], shape.sizes["D"], shape.variant["alpha"]
    reasons = [] if float(alpha) == 1.5 else [f"alpha={alpha}; its second version computes alpha 1.5"]
    if length < 64 or length & (length - 1):
        reasons.append(f"T={length}; it takes powers of two from 64 on")
    if width not in (16, 32, 64, 128, 256):
        reasons.append(f"D={width}; it takes powers of two from 16 to 256")
    return reasons


def _few_tokens(limit: int, why: str) -> Callable[[Shape], list[str]]:
    def limits(shape: Shape) -> list[str]:
        return [f"{why}; up to {limit} tokens"] if shape.sizes["T"] > limit else []

    return limits


def _matrices(shape: Shape) -> Operator:
    """Two products and the entmax of the package `entmax` between them; gradients are torch's and the package's."""
    activation = package_entmax(float(shape.variant["alpha"]))
    length = shape.sizes["T"]
    hidden = torch.ones(length, length, dtype=torch.bool, device=shape.device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, alpha: float) -> Tensor:
        group = q.shape[2] // k.shape[2]
        queries, keys, values = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = queries.float() @ keys.float().transpose(2, 3) * q.shape[3] ** -0.5
        prob = activation(scores.masked_fill(hidden, torch.finfo(torch.float32).min / 4))
        return (prob.to(v.dtype) @ values).transpose(1, 2)

    return attend


def _blockwise(shape: Shape) -> Operator:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, alpha: float) -> Tensor:
        out = ops.entmax_attention(q, k, v, causal=causal, alpha=alpha, backend="torch")
        assert isinstance(out, Tensor)
        return out

    return attend


PEERS: Registry[Peer] = Registry("peer")
for _peer in (
    Peer(
        "adasplash",
        "AdaSplash-2 as the package runs it",
        _adasplash,
        _adasplash_limits,
        module="adasplash",
        install="run: pip install adasplash",
        package="adasplash",
    ),
    Peer(
        "matrices",
        "two products around the entmax of the package entmax",
        _matrices,
        _few_tokens(_LONGEST_MATRIX, "it writes all scores down"),
        devices=("cpu", "cuda"),
        module="entmax",
        install="run: pip install entmax",
        package="entmax",
    ),
    Peer(
        "blockwise",
        "our own tiles in plain torch",
        _blockwise,
        _few_tokens(_LONGEST_LOOPS, "its loops run in Python"),
    ),
    *dense_baselines(),
):
    PEERS.register(_peer.name, _peer)

RACE = Race(
    op="entmax_attention",
    peers=PEERS,
    passes=("fwd", "fwd+bwd"),
    lengths={"cuda": (2048, 8192, 32768), "cpu": (256, 512, 1024)},
    dims=(64,),
    heads=(16, 16),
    sizes=sizes,
    inputs=_inputs,
    reduced=few_heads(4),
    grads=("q", "k", "v"),
    flops=causal_flops,
    traffic=rows_traffic,
    axes={
        "scores": Axis("what scores look like", ("gauss", "empty60", "empty95", "flat"), choice(REGIMES)),
        "alpha": alpha_axis(),
    },
    batch={"cuda": 4},
    facts=_facts,
)
