"""The race of causal softmax attention: torch's fused kernels, FlexAttention, FlashAttention-4."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnkit import ops
from attnkit._core.registry import Registry
from attnkit.lab.bench.race import MEMORY_BOUND, Operator, Peer, Race, Shape, Sizes

__all__ = ["RACE", "causal_flops", "dense_baselines", "few_heads", "rows_traffic", "sizes"]

KV_TENSORS = 2
BACKWARD_FACTOR = 3.5  # five products of the backward pass and two of the forward pass, over two


def sizes(step: str, length: int, width: int, heads: tuple[int, int], batch: int) -> Sizes:
    """B, T (and S, where T is one token), H, Hkv, D."""
    rows = {"T": 1, "S": length} if step in MEMORY_BOUND else {"T": length}
    return {"B": batch, **rows, "H": heads[0], "Hkv": heads[1], "D": width}


def _inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    sizes = shape.sizes
    batch, num_q, width = sizes["B"], sizes["T"], sizes["D"]
    num_k = sizes.get("S", num_q)
    shapes = {"q": (num_q, sizes["H"]), "k": (num_k, sizes["Hkv"]), "v": (num_k, sizes["Hkv"])}
    tensors: dict[str, Any] = {
        name: torch.randn(batch, *rows, width, generator=generator, device=generator.device) for name, rows in shapes.items()
    }
    return tensors | {"causal": True}


def _reduced(sizes: Sizes) -> Sizes:
    limits = {"B": 1, "T": 256, "S": 512}
    return {name: min(size, limits.get(name, size)) for name, size in sizes.items()}


def few_heads(most: int) -> Callable[[Sizes], Sizes]:
    """Reduced sizes of a race that keeps no more key heads than that, and their groups; one sequence of 256 tokens at most."""

    def reduced(sizes: Sizes) -> Sizes:
        kv_heads = min(sizes["Hkv"], most)
        heads = min(sizes["H"], most * (sizes["H"] // max(sizes["Hkv"], 1)))
        return dict(sizes) | {"B": min(sizes["B"], 1), "T": min(sizes["T"], 256), "H": heads, "Hkv": kv_heads}

    return reduced


def causal_flops(shape: Shape) -> float:
    """Those of dense causal attention, whatever is skipped: a number for comparing."""
    sizes = shape.sizes
    rows = sizes["B"] * sizes["H"] * sizes["T"]
    pairs = rows * sizes["S"] if "S" in sizes else rows * sizes["T"] / 2
    return 4 * sizes["D"] * pairs * (BACKWARD_FACTOR if shape.trains else 1)


def _traffic(shape: Shape) -> float:
    sizes = shape.sizes
    keys = sizes["B"] * sizes.get("S", sizes["T"]) * sizes["Hkv"]
    return KV_TENSORS * keys * sizes["D"] * shape.dtype.itemsize


def rows_traffic(shape: Shape) -> float:
    """Bytes of q, k, v and the output."""
    sizes = shape.sizes
    return 2 * sizes["B"] * sizes["T"] * (sizes["H"] + sizes["Hkv"]) * sizes["D"] * shape.dtype.itemsize


def _sixteen_bits(shape: Shape) -> list[str]:
    reasons = [] if shape.dtype.itemsize == 2 else [f"{shape.dtype} (it takes 16 bits)"]
    return [*reasons, "head width is no multiple of 8"] if shape.sizes["D"] % 8 else reasons


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Torch's interface on views; it aligns causal masks top-left, so one query on many keys goes in without one."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal and q.shape[1] > 1, enable_gqa=grouped)
    return out.transpose(1, 2)


def _sdpa_with(backend: SDPBackend) -> Callable[[Shape], Operator]:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, causal)

    return lambda shape: attend


def _flex(shape: Shape) -> Operator:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # each shape is compiled for itself; torch gives up on a function after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    num_q = shape.sizes["T"]
    mask = None
    if num_q > 1:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, num_q, num_q, device=shape.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
        out: Any = compiled(queries, keys, values, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return attend


def _fa4(shape: Shape) -> Operator:
    from flash_attn.cute import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        result: Any = flash_attn_func(q, k, v, causal=causal)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the LSE
        return out

    return attend


PEERS: Registry[Peer] = Registry("peer")
for _peer in (
    Peer("sdpa", "torch's scaled_dot_product_attention as it chooses itself", lambda shape: _sdpa, devices=("cpu",)),
    Peer("sdpa-flash", "torch's FlashAttention-2 kernel", _sdpa_with(SDPBackend.FLASH_ATTENTION), _sixteen_bits),
    Peer("cudnn", "cuDNN's kernel through torch", _sdpa_with(SDPBackend.CUDNN_ATTENTION), _sixteen_bits),
    Peer("flex", "FlexAttention, compiled, with a causal block mask made beforehand", _flex),
    Peer(
        "fa4",
        "FlashAttention-4, flash_attn.cute",
        _fa4,
        _sixteen_bits,
        module="flash_attn.cute",
        install="run: pip install --pre flash-attn-4",
        package="flash-attn-4",
    ),
):
    PEERS.register(_peer.name, _peer)


def dense_baselines() -> list[Peer]:
    """Dense causal attention with softmax, for races of operators that leave some of it out: what they must be faster than."""
    theirs = (PEERS[name] for name in ("sdpa", "sdpa-flash", "cudnn", "fa4"))
    summary = "dense causal softmax attention"
    return [
        Peer("dense", f"{summary}, our own kernel", _ours, same_result=False),
        *(
            dataclasses.replace(peer, summary=f"{summary}, {peer.summary}", make=_plain(peer.name), same_result=False)
            for peer in theirs
        ),
    ]


def _ours(shape: Shape) -> Operator:
    """By name, because "auto" may well choose another library's kernel."""
    backend = "triton" if shape.device.type == "cuda" else "auto"
    return lambda q, k, v, **others: ops.attention(q, k, v, causal=True, backend=backend)


def _plain(name: str) -> Callable[[Shape], Operator]:
    def make(shape: Shape) -> Operator:
        attend = PEERS[name].make(shape)
        return lambda q, k, v, **others: attend(q=q, k=k, v=v, causal=True)

    return make


RACE = Race(
    op="attention",
    peers=PEERS,
    passes=("fwd", "fwd+bwd", "decode"),
    lengths={"cuda": (4096, 8192, 16384, 32768), "cpu": (256, 512, 1024)},
    dims=(64, 128),
    heads=(32, 8),
    sizes=sizes,
    inputs=_inputs,
    reduced=_reduced,
    grads=("q", "k", "v"),
    flops=causal_flops,
    traffic=_traffic,
)
