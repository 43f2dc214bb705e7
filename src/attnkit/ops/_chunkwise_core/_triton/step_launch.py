"""Launching a step. No host synchronisation."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.devices import capability
from attnkit._core.triton.launcher import launch, power_of_two
from attnkit.ops._chunkwise_core._triton.step import step

__all__ = ["run"]

# rows and columns of a tile at most, by padded widths; measured on an H100 with 256 and 512 states, exp gates
_TILES = {(128, 256): (32, 64)}
_TILE = (256, 64)
_EARLY = (9, 0)  # compute capability from which on a launch may begin before the last one has ended


def run(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor | None, f: Tensor, S: Tensor, n: Tensor | None, m: Tensor | None,
    gates: str, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, H, Dv], S, n and m of one token (arguments as of `attnkit::recurrent_step`); no host synchronisation."""
    batch, heads, width = k.shape
    width_v, group = v.shape[-1], q.shape[1] // heads
    q, k, v, S = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, S))
    n = n if n is None or n.stride(-1) == 1 else n.contiguous()
    out = q.new_empty(batch, q.shape[1], width_v)
    new = [torch.empty(0 if t is None else t.shape, dtype=S.dtype, device=S.device) for t in (S, n, m)]
    if out.numel():
        strides: list[int] = []
        for t, count in ((q, 2), (k, 2), (v, 2), (i, 2), (f, 2), (S, 3), (n, 2), (m, 2)):
            strides += [0] * count if t is None else t.stride()[:count]
        given = (None if t is None else new_t for t, new_t in zip((S, n, m), new, strict=True))
        arguments = (q, k, v, i, f, S, n, m, out, *given, *strides, heads, width, width_v, scale, eps)
        padded = power_of_two(width, 16), power_of_two(width_v, 16)
        rows, columns = map(min, padded, _TILES.get(padded, _TILE))
        early = S.is_cuda and capability(S.device) >= _EARLY
        flags: dict[str, Any] = {
            "GATES": gates, "NORMALIZE": n is not None, "GROUP": group, "BLOCK_G": power_of_two(group), "BLOCK_D": rows,
            "BLOCK_V": columns, "EARLY": early,
        }  # fmt: skip
        launch(step, (batch * heads * -(-width_v // columns),), arguments, flags, num_warps=4, launch_pdl=early)
    return out, new[0], new[1], new[2]
