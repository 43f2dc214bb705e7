"""The races of hash buckets and of dropped rows, against what computes the same thing and against dense attention.

Dense attention is a baseline: it computes something else, and is what dropping pairs must be faster than. What is known of a
shape says by how much it could be: by the pairs that are left, by the tiles that hold any of them, and how much of our time
goes into sorting rows.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from attnkit import ops
from attnkit._core.opspec import OPS
from attnkit._core.registry import Registry
from attnkit.lab.bench.attention import causal_flops, dense_baselines, few_heads, rows_traffic, sizes
from attnkit.lab.bench.indexed_peers import HASH_PEERS, QK_PEERS
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import Axis, Facts, Peer, Race, Shape
from attnkit.lab.bench.timing import elapsed
from attnkit.ops.indexed.rows import order_rows

__all__ = ["HASH_RACE", "QK_RACE"]

_TIMED = 5  # measurements of sorting


def _tensors(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    sizes = shape.sizes
    heads = {"q": sizes["H"], "k": sizes["Hkv"], "v": sizes["Hkv"]}
    return {
        name: normal((sizes["B"], sizes["T"], number, sizes["D"]), generator, shape.dtype) for name, number in heads.items()
    }


def _buckets(shape: Shape) -> int:
    return int(shape.variant["nb"])


def _keep(shape: Shape) -> float:
    return float(shape.variant["keep"])


def _hash_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Uniform buckets; a query's is that of its token's key, as with projections that queries and keys share."""
    sizes, device, buckets = shape.sizes, generator.device, _buckets(shape)
    rows = (sizes["B"], sizes["T"], sizes["Hkv"])
    bucket = torch.randint(0, buckets, rows, generator=generator, device=device, dtype=torch.int32)
    shared = bucket.repeat_interleave(sizes["H"] // sizes["Hkv"], 2)
    return _tensors(shape, generator) | {"q_bucket": shared, "k_bucket": bucket, "num_buckets": buckets}


def _qk_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Every head keeps a share of its queries and, on its own, the same share of its keys."""
    tensors = _tensors(shape, generator)
    kept = {
        f"{name}_keep": torch.rand(tensors[name].shape[:3], generator=generator, device=generator.device) < _keep(shape)
        for name in "qk"
    }
    return tensors | kept


def _facts(op: str) -> Callable[[Shape, dict[str, Any]], Facts]:
    """What is left of dense attention, and what a forward call spends before attention itself."""

    def facts(shape: Shape, inputs: dict[str, Any]) -> Facts:
        found = ops.occupancy(op, **inputs)
        call = OPS[op].prepare(**inputs)
        numbers = {
            "density": found.density,
            "tile_share": found.step_share,
            "unmasked_tiles": found.unmasked,
            "ideal_by_pairs": 1 / found.density if found.density else math.inf,
            "ideal_by_tiles": 1 / found.step_share if found.step_share else math.inf,
            "sort_ms": _milliseconds(shape, lambda: order_rows(call)),
        }
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    return facts


def _milliseconds(shape: Shape, call: Callable[[], object]) -> float:
    elapsed(shape.device, call, 1)
    return 1e3 * statistics.median(elapsed(shape.device, call, 2) for _ in range(_TIMED))


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("give a number of buckets, 1 or more")
    return int(text)


def _share(text: str) -> str:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError("give the share that is kept, above 0 and at most 1")
    return f"{share:g}"


def _race(
    op: str,
    inputs: Callable[[Shape, torch.Generator], dict[str, Any]],
    density: Callable[[Shape], float],
    axes: dict[str, Axis],
    peers: tuple[Peer, ...],
) -> Race:
    registry: Registry[Peer] = Registry("peer")
    for peer in (*peers, *dense_baselines()):
        registry.register(peer.name, peer)
    return Race(
        op=op,
        peers=registry,
        passes=("fwd", "fwd+bwd"),
        lengths={"cuda": (4096, 16384, 65536), "cpu": (512, 1024, 2048)},
        dims=(64,),
        heads=(48, 48),
        sizes=sizes,
        inputs=inputs,
        reduced=few_heads(8),
        grads=("q", "k", "v"),
        flops=lambda shape: causal_flops(shape) * density(shape),
        traffic=rows_traffic,
        axes=axes,
        batch={"cuda": 4},
        facts=_facts(op),
    )


HASH_RACE = _race(
    "hash_sparse_attention",
    _hash_inputs,
    lambda shape: 1 / _buckets(shape),
    {"nb": Axis("number of buckets", (16,), _number)},
    HASH_PEERS,
)
QK_RACE = _race(
    "qk_sparse_attention",
    _qk_inputs,
    lambda shape: _keep(shape) ** 2,
    {"keep": Axis("share of the queries, and of the keys, that every head keeps", ("0.5",), _share)},
    QK_PEERS,
)
