"""The race of ragged decode attention: dense attention on everything, and decoding to plain tensors before attention."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.registry import Registry
from attnkit.lab.bench.attention import PEERS as DENSE
from attnkit.lab.bench.attention import sizes
from attnkit.lab.bench.entmax import choice
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.machine import copies_beyond_cache
from attnkit.lab.bench.quantized import QUANTIZED
from attnkit.lab.bench.race import Axis, Operator, Peer, Race, Shape, Sizes
from attnkit.ops import KVPages
from attnkit.ops.ragged_decode.cases import FIXED

__all__ = ["RACE"]

PAGES = {"raw": 16, "raw64": 64, "int8": 64, "int4": 64, "fp8": 64}  # tokens of a page
BITS = {"int8": 8, "int4": 4, "fp8": 8}
KEPT = ("all", "half", "adaptive")
_HALF_PRECISION = 2  # bytes of a scale or zero


def _lengths(shape: Shape) -> list[int]:
    """Tokens that each key head keeps: all, half, or between almost none and almost all, half of them together."""
    num, heads = shape.sizes["S"], shape.sizes["Hkv"]
    kept = shape.variant["kept"]
    shares = (
        [(2 * h + 1) / (2 * heads) for h in range(heads)] if kept == "adaptive" else [0.5 if kept == "half" else 1.0] * heads
    )
    return [int(num * share) for share in shares]


def _inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Pages in random order; codes are uniform, and their scales those of numbers between -2 and 2."""
    s, code, device = shape.sizes, str(shape.variant["codec"]), generator.device
    size, width = PAGES[code], s["D"]
    lengths = torch.tensor(_lengths(shape), dtype=torch.int32, device=device).expand(s["B"], -1)
    most = max(-(-length // size) for length in _lengths(shape))
    num = -(-lengths // size)
    used = torch.arange(most, device=device) < num[..., None]
    pool = s["B"] * sum(-(-length // size) for length in _lengths(shape))
    table = torch.zeros(used.shape, dtype=torch.int32, device=device)
    table[used] = torch.randperm(pool, generator=generator, device=device).int()
    inputs: dict[str, Any] = {"q": torch.randn(s["B"], s["T"], s["H"], width, generator=generator, device=device)}
    inputs |= {"table": table, "lengths": lengths.contiguous()}
    if code.startswith("raw"):
        return inputs | {name: normal((pool, size, width), generator, shape.dtype) for name in ("keys", "values")}
    bits, top = BITS[code], 120 if code == "fp8" else 2 ** BITS[code]
    for name, rows in (("key", (pool, width)), ("value", (pool, size))):
        shape_of = (pool, size, width * bits // 8)
        inputs[f"{name}s"] = torch.randint(
            0, 120 if code == "fp8" else 256, shape_of, generator=generator, device=device, dtype=torch.uint8
        )
        scale = (torch.rand(rows, generator=generator, device=device) + 3) / (256 if code == "fp8" else top)
        inputs[f"{name}_scale"] = scale.half().float()
        if code != "fp8":
            inputs[f"{name}_zero"] = (-scale * top / 2).half().float()
    return inputs | {"code": code}


def _reduced(sizes: Sizes) -> Sizes:
    limits = {"B": 1, "S": 512}
    return {name: min(size, limits.get(name, size)) for name, size in sizes.items()}


def _traffic(shape: Shape) -> float:
    """Bytes of stored keys and values, their scales and zeros included."""
    s, code = shape.sizes, str(shape.variant["codec"])
    tokens, width = s["B"] * sum(_lengths(shape)), s["D"]
    if code.startswith("raw"):
        return float(2 * tokens * width * shape.dtype.itemsize)
    scales = (1 if code == "fp8" else 2) * _HALF_PRECISION
    return tokens * (2 * width * BITS[code] / 8 + scales * (1 + width / PAGES[code]))


def _decoded(shape: Shape) -> Operator:
    """All stored keys and values are written out in q's dtype, then torch attends."""

    def attend(q: Tensor, pages: KVPages) -> Tensor:
        keys, values, _ = pages.materialize(q.dtype)
        grouped = q.shape[2] != keys.shape[1]
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=grouped).transpose(1, 2)

    return attend


def _decoded_limits(shape: Shape) -> list[str]:
    whole = len(set(_lengths(shape))) == 1 and _lengths(shape)[0] % PAGES[str(shape.variant["codec"])] == 0
    return [] if whole else ["heads that store different numbers of tokens, or a page that is not full (it would need a mask)"]


def _dense(name: str) -> Callable[[Shape], Operator]:
    """Attention over as many raw keys as there were before any was dropped, on tensors of its own."""

    def make(shape: Shape) -> Operator:
        s, attend = shape.sizes, DENSE[name].make(shape)
        each = 2 * s["B"] * s["S"] * s["Hkv"] * s["D"] * shape.dtype.itemsize
        generator = torch.Generator(shape.device).manual_seed(0)
        copies = copies_beyond_cache(shape.device, each)  # a cache that a GPU holds on chip would be no baseline
        pairs = [
            [normal((s["B"], s["Hkv"], s["S"], s["D"]), generator, shape.dtype).transpose(1, 2) for _ in range(2)]
            for _ in range(copies)
        ]
        turns = itertools.cycle(pairs)

        def run(q: Tensor, **_: Any) -> Tensor:
            k, v = next(turns)
            out: Tensor = attend(q=q, k=k, v=v, causal=True)
            return out

        return run

    return make


PEERS: Registry[Peer] = Registry("peer")
PEERS.register(
    "decoded",
    Peer(
        "decoded",
        "pages copied out and decoded in every call, then torch's scaled_dot_product_attention",
        _decoded,
        _decoded_limits,
        devices=("cpu", "cuda"),
    ),
)
for _peer in QUANTIZED:
    PEERS.register(_peer.name, _peer)
for _name in ("sdpa", "sdpa-flash", "cudnn"):
    _summary = f"attention over all keys, raw and dense, {DENSE[_name].summary}"
    PEERS.register(_name, dataclasses.replace(DENSE[_name], summary=_summary, make=_dense(_name), same_result=False))

RACE = Race(
    op="ragged_decode_attention",
    peers=PEERS,
    passes=("decode",),
    lengths={"cuda": (8192, 32768, 131072), "cpu": (1024, 4096)},
    dims=(128,),
    heads=(32, 8),
    sizes=sizes,
    inputs=_inputs,
    reduced=_reduced,
    grads=(),
    flops=None,
    traffic=_traffic,
    axes={
        "codec": Axis("how pages are stored", ("raw", "int8", "int4"), choice(tuple(PAGES))),
        "kept": Axis(
            "tokens that heads keep: all, half each, or adaptive: half of all, more in some heads", KEPT, choice(KEPT)
        ),
    },
    fixed=FIXED,
)
