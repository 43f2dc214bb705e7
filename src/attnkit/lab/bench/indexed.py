"""The races of hash buckets and of dropped rows: what computes the same thing, sorting and masks included.

Dense causal attention computes something else and is no peer here; race `attention` on the same sizes for its times.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.registry import Registry
from attnkit.lab.bench.attention import BACKWARD_FACTOR
from attnkit.lab.bench.race import Operator, Peer, Race, Shape, Sizes
from attnkit.ops.indexed.call import prepare_hash
from attnkit.ops.indexed.rows import gather, order_rows, scatter

__all__ = ["HASH_RACE", "QK_RACE"]

BUCKETS = 16
_LONGEST_MASK = 4096  # tokens up to which somebody would write a mask down


def _sizes(step: str, length: int, width: int, heads: tuple[int, int], batch: int) -> Sizes:
    return {"B": batch, "T": length, "H": heads[0], "Hkv": heads[1], "D": width}


def _tensors(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    shapes = {"q": sizes["H"], "k": sizes["Hkv"], "v": sizes["Hkv"]}
    return {
        name: torch.randn(sizes["B"], sizes["T"], heads, sizes["D"], generator=generator, device=generator.device)
        for name, heads in shapes.items()
    }


def _hash_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Uniform buckets; a query's is that of its token's key, as with projections that queries and keys share."""
    shape, device = (sizes["B"], sizes["T"], sizes["Hkv"]), generator.device
    bucket = torch.randint(0, BUCKETS, shape, generator=generator, device=device, dtype=torch.int32)
    shared = bucket.repeat_interleave(sizes["H"] // sizes["Hkv"], 2)
    return _tensors(sizes, generator) | {"q_bucket": shared, "k_bucket": bucket, "num_buckets": BUCKETS}


def _qk_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Half of the queries and half of the keys are dropped."""
    tensors = _tensors(sizes, generator)
    kept = {
        f"{name}_keep": torch.rand(tensors[name].shape[:3], generator=generator, device=generator.device) < 0.5 for name in "qk"
    }
    return tensors | kept


def _reduced(sizes: Sizes) -> Sizes:
    return dict(sizes) | {"B": 1, "T": min(sizes["T"], 256)}


def _flops(density: float) -> Callable[[Shape], float]:
    def flops(shape: Shape) -> float:
        sizes = shape.sizes
        pairs = sizes["B"] * sizes["H"] * sizes["T"] ** 2 / 2 * density
        return 4 * sizes["D"] * pairs * (BACKWARD_FACTOR if shape.trains else 1)

    return flops


def _traffic(shape: Shape) -> float:
    sizes = shape.sizes
    return 2 * sizes["B"] * sizes["T"] * (sizes["H"] + sizes["Hkv"]) * sizes["D"] * shape.dtype.itemsize


def _few_tokens(shape: Shape) -> list[str]:
    return [f"a mask of T x T for every head; up to {_LONGEST_MASK} tokens"] if shape.sizes["T"] > _LONGEST_MASK else []


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Torch's interface with an explicit mask [B, H, T, T]; a row that sees nothing gives 0."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=q.shape[2] != k.shape[2])
    return torch.where(seen.any(-1, keepdim=True), out, 0).transpose(1, 2)


def _causal(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()


def _each_head(t: Tensor, heads: int) -> Tensor:
    """[B, T, Hkv] -> [B, H, T]."""
    return t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2)


def _masked_hash(shape: Shape) -> Operator:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        mine, theirs = q_bucket.transpose(1, 2)[..., None], _each_head(k_bucket, q.shape[2])[..., None, :]
        return _sdpa(q, k, v, (mine == theirs) & _causal(q.shape[1], q.device))

    return attend


def _masked_qk(shape: Shape) -> Operator:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_keep: Tensor, k_keep: Tensor) -> Tensor:
        kept = q_keep.transpose(1, 2)[..., None] & _each_head(k_keep, q.shape[2])[..., None, :]
        return _sdpa(q, k, v, kept & _causal(q.shape[1], q.device))

    return attend


def _flex(shape: Shape) -> Operator:
    """FlexAttention on rows sorted by bucket; the block mask is a new one for every call, as hashes are."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        heads = q.shape[2]
        bucket, order = torch.sort(_each_head(k_bucket, heads), stable=True)  # [B, H, T]

        def sort(t: Tensor) -> Tensor:
            rows = t.transpose(1, 2).repeat_interleave(heads // t.shape[2], 1)
            return rows.gather(2, order[..., None].expand(-1, -1, -1, t.shape[3]))

        batch, _, rows = bucket.shape

        def meet(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (bucket[b, h, i] == bucket[b, h, j]) & (i >= j)

        mask = make_mask(meet, batch, heads, rows, rows, device=q.device)
        out: Any = compiled(sort(q), sort(k), sort(v), block_mask=mask)
        index = order[..., None].expand_as(out)
        return torch.empty_like(out).scatter(2, index, out).transpose(1, 2)

    return attend


def _varlen(shape: Shape) -> Operator:
    """Torch's kernel for packed sequences on the rows as we sort them: buckets are sequences where q and k share them."""
    from torch.nn.attention.varlen import varlen_attn

    function: Any = varlen_attn
    windowed = "window_size" in inspect.signature(function).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    longest = shape.sizes["T"]

    def attend(q: Tensor, k: Tensor, v: Tensor, q_bucket: Tensor, k_bucket: Tensor, num_buckets: int) -> Tensor:
        order = order_rows(prepare_hash(q, k, v, q_bucket, k_bucket, num_buckets=num_buckets))
        rows = (gather(t.flatten(0, 2), where)[:, None] for t, where in ((q, order.queries), (k, order.keys), (v, order.keys)))
        out: Tensor = function(*rows, order.cu_q, order.cu_k, longest, longest, **causal)
        return scatter(out[:, 0], order.queries).view(*q.shape[:3], -1)

    return attend


def _plain_heads(shape: Shape) -> list[str]:
    reasons = [] if shape.dtype.itemsize == 2 else [f"{shape.dtype} (it takes 16 bits)"]
    if shape.sizes["H"] != shape.sizes["Hkv"]:
        reasons.append("query heads that share a key head would be rows of one sequence, which it aligns by their number")
    return reasons


def _race(op: str, inputs: Callable[[Sizes, torch.Generator], dict[str, Any]], density: float, *peers: Peer) -> Race:
    registry: Registry[Peer] = Registry("peer")
    for peer in peers:
        registry.register(peer.name, peer)
    return Race(
        op=op,
        peers=registry,
        passes=("fwd", "fwd+bwd"),
        lengths={"cuda": (4096, 8192, 16384, 32768), "cpu": (512, 1024, 2048)},
        dims=(64, 128),
        heads=(16, 16),
        sizes=_sizes,
        inputs=inputs,
        reduced=_reduced,
        grads=("q", "k", "v"),
        flops=_flops(density),
        traffic=_traffic,
    )


_MASK = "torch's scaled_dot_product_attention with a mask of every head"
HASH_RACE = _race(
    "hash_sparse_attention",
    _hash_inputs,
    1 / BUCKETS,
    Peer("sdpa-mask", _MASK, _masked_hash, _few_tokens, devices=("cpu", "cuda")),
    Peer("flex", "FlexAttention, compiled, on sorted rows with a block mask made in the call", _flex),
    Peer("varlen", "torch's kernel for packed sequences on the rows as we sort them", _varlen, _plain_heads),
)
QK_RACE = _race(
    "qk_sparse_attention",
    _qk_inputs,
    0.25,
    Peer("sdpa-mask", _MASK, _masked_qk, _few_tokens, devices=("cpu", "cuda")),
)
