"""What `attnkit tune` tries for each attention kernel, and the problem it measures it on."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit._core.triton.configs import Config
from attnkit._core.triton.probe import Probe
from attnkit.ops._attention_core._triton import launch
from attnkit.ops._attention_core._triton.configs import CONFIGS

__all__ = ["CONFIGS", "KERNELS", "candidates", "probe"]

KERNELS = ("fwd", "decode", "bwd_dq", "bwd_dkdv", "gather_fwd", "gather_dq", "gather_dkdv")
_REGISTERS = 255  # of a thread, 4 bytes each; accumulators beyond them spill in every step of the loop
_CACHE = 2**28  # bytes of K and V in a decoding step: several times any last-level cache


@dataclass(frozen=True)
class _Cost:
    """What a kernel holds for the side that stays (`outer`) and for a step of the side it walks along, in head widths.

    Attributes:
        kept: operand tiles that stay in shared memory.
        walked: operand tiles of one step, in shared memory as often as the pipeline has buffers.
        summed: accumulators as wide as a head.
        products: products of outer x inner that are alive together.
    """

    kept: int
    walked: int
    summed: int
    products: int


_COSTS = {
    "fwd": _Cost(kept=1, walked=2, summed=1, products=1),
    "decode": _Cost(kept=1, walked=2, summed=1, products=1),
    "bwd_dq": _Cost(kept=2, walked=2, summed=1, products=2),
    "bwd_dkdv": _Cost(kept=2, walked=2, summed=2, products=2),
}
_COSTS |= {"gather_fwd": _COSTS["fwd"], "gather_dq": _COSTS["bwd_dq"], "gather_dkdv": _COSTS["bwd_dkdv"]}


def candidates(kernel: str, bits: int, width: int, shared: int) -> tuple[Config, ...]:
    """Configurations worth trying: sensible ones that are not sure to overflow shared memory or registers.

    Args:
        kernel: one of KERNELS.
        bits: of the inputs, 16 or 32.
        width: padded head width.
        shared: bytes of shared memory that a program may have.
    """
    cost, size = _COSTS[kernel], bits // 8
    found = []
    for outer, inner, warps, stages in _grid(kernel, bits, width):
        # a pipeline of n stages has n or n - 1 buffers, by architecture; the compiler has the last word
        held = size * width * (cost.kept * outer + cost.walked * max(stages - 1, 1) * inner)
        registers = outer * (cost.summed * width + cost.products * inner) // (32 * warps)
        if held <= shared and registers <= _REGISTERS:
            block_m, block_n = (inner, outer) if kernel.endswith("dkdv") else (outer, inner)
            found.append(Config(block_m, block_n, warps, stages))
    return tuple(found)


def _grid(kernel: str, bits: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(rows that stay, rows of a step, warps, stages); for gradients of keys these stay and queries are walked along."""
    inner = (32, 64, 128) if bits == 16 else (16, 32, 64)
    if kernel == "decode":
        yield from itertools.product((16,), inner, (2, 4, 8), (2, 3, 4))
    elif bits == 32:  # no matrix units in full precision: small tiles, and little to gain from long pipelines
        yield from itertools.product((16, 32, 64) if width > 128 else (32, 64), inner, (4, 8), (1, 2))
    else:
        # a matrix instruction of Hopper takes 64 rows of four warps; wide heads may have to do with fewer
        groups = [(64, 4), (128, 4), (128, 8)]
        if kernel.endswith("fwd"):
            groups.append((256, 8))
        if width > 64:
            groups.append((64, 8))
        if width > 128:
            groups.append((32, 4))
        lengths = (2, 3, 5) if kernel == "gather_dkdv" else (2, 3, 4)
        yield from ((outer, step, warps, stages) for (outer, warps) in groups for step in inner for stages in lengths)


@dataclass
class _Trial(launch.Launch):
    """A call that runs with a given configuration instead of the table's."""

    chosen: Config

    def config(self, kernel: str) -> Config:
        """The given one."""
        return self.chosen


def probe(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Probe:
    """One kernel on a problem like those it is meant for; tiny on a CPU, where only the interpreter runs it.

    Causal; 8,192 tokens (2,048 in 32 bits) of 16 heads, which "gather_" kernels find by index, or one query of 32 heads over
    256 MiB of keys and values of 8 heads, 65,536 tokens of width 128 in 16 bits.

    Args:
        kernel: one of KERNELS. The time of "decode" includes merging the parts, that of the others is their own alone.
        dtype: of the inputs.
        width: D and Dv.
        device: where.
    Raises:
        OptionError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise OptionError(f"unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    generator = torch.Generator(device).manual_seed(0)
    num_q, num_k, heads, kv_heads = _sizes(kernel, dtype.itemsize, width, device)
    shapes = ((num_q, heads), (num_k, kv_heads), (num_k, kv_heads), (num_q, heads))
    q, k, v, d_out = (torch.randn(1, *s, width, generator=generator, device=device).to(dtype) for s in shapes)
    inputs = {"q": q, "k": k, "v": v, "causal": True}
    arguments = (q, k, v, None, None, None, None, None, width**-0.5, -1, 0, 0.0, "off")

    gathers: dict[str, Any] = {}
    upstream = d_out
    if kernel.startswith("gather"):
        flat = tuple(t.flatten(1, 2)[:, :, None] for t in (q, k, v, d_out))
        d_out, gathers = flat[3], _gathers(num_q, heads, device)
        ends = torch.arange(heads + 1, dtype=torch.int32, device=device) * num_q
        last = torch.arange(num_q * heads, dtype=torch.int32, device=device)
        arguments = (*flat[:3], None, None, ends, ends, last, width**-0.5, -1, 0, 0.0, "off")
    if kernel.endswith("fwd") or kernel == "decode":

        def rows_of(config: Config) -> tuple[Tensor, ...]:
            out, lse, _ = launch.forward(_Trial(*arguments, **gathers, chosen=config), dtype)
            return out.view_as(q), lse.view(q.shape[:3])

        return Probe(rows_of, ("out", "lse"), inputs, None, kernel == "decode")
    call = launch.Launch(*arguments, **gathers)
    out, lse, _ = launch.forward(call, dtype)
    known = (None, out, lse, None)

    def queries(config: Config) -> tuple[Tensor, ...]:
        return (launch.backward_queries(_Trial(*arguments, **gathers, chosen=config), d_out, *known)[0].view_as(q),)

    if kernel.endswith("dq"):
        return Probe(queries, ("d_q",), inputs, upstream, False)
    rows = launch.backward_queries(call, d_out, *known)[1:]

    def keys(config: Config) -> tuple[Tensor, ...]:
        found = launch.backward_keys(_Trial(*arguments, **gathers, chosen=config), d_out, *rows)[:2]
        return found[0].view_as(k), found[1].view_as(v)

    return Probe(keys, ("d_k", "d_v"), inputs, upstream, False)


def _gathers(tokens: int, heads: int, device: torch.device) -> dict[str, Tensor]:
    """Heads one after another, as sequences whose rows lie `heads` apart."""
    rows = torch.arange(tokens * heads, dtype=torch.int32, device=device).view(tokens, heads).t().flatten()
    return {"q_rows": rows, "k_rows": rows}


def _sizes(kernel: str, item_bytes: int, width: int, device: torch.device) -> tuple[int, int, int, int]:
    """T, S, H, Hkv."""
    if device.type == "cpu":
        return (1, 160, 4, 2) if kernel == "decode" else (40, 40, 2, 2)
    if kernel == "decode":
        return 1, _CACHE // (2 * 8 * width * item_bytes), 32, 8
    tokens = 8192 if item_bytes == 2 else 2048
    return tokens, tokens, 16, 16
