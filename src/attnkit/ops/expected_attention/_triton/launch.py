"""Launching the kernels of expected attention. No host synchronisation."""

import torch
from torch import Tensor

from attnkit._core.triton.configs import by_width
from attnkit._core.triton.launcher import launch, power_of_two, precision
from attnkit.ops.expected_attention._triton import kernels
from attnkit.ops.expected_attention.keys import roles, with_sinks

__all__ = ["expected"]

# keys of a tile, columns of a matrix, warps, stages, for widths 16, 32, 64, 128 and 256
_TILES = by_width(
    "quadratic", 16, (128, 16, 4, 3), (128, 32, 4, 3), (128, 64, 4, 3), (128, 64, 4, 2), (64, 32, 4, 2)
) | by_width("quadratic", 32, (64, 16, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1))
_KEYS = 128  # of a tile of the second pass
_PARTS = 1024  # LSEs of tiles that are read at once


def expected(
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    cov: Tensor | None,
    gram: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
    norm: str,
    sinks: int,
) -> Tensor:
    """Scores [B, S, Hkv], in memory [B, Hkv, S]."""
    batch, num_keys, kv_heads = k.shape[:3]
    scores = mean.new_empty(batch, kv_heads, num_keys)
    if scores.numel() == 0:
        return scores.movedim(1, 2)
    scored, sink = roles(k, valid, sinks)
    flags = scored.view(torch.uint8).expand(batch, num_keys, kv_heads)
    logits, parts = _quadratic(k, scale * mean, None if cov is None else scale**2 / 2 * cov, flags)
    norms = None if gram is None else _quadratic(v, None, gram[None], None, heads=mean.shape[1])[0]
    v = v if v.stride(3) == 1 else v.contiguous()
    tiles = parts.shape[2]
    arguments = (
        logits, parts, norms, v, flags, scores, num_keys, kv_heads, v.shape[3], tiles, eps, *v.stride()[:3], *flags.stride(),
    )  # fmt: skip
    sizes = {
        "NORM": norm,
        "GROUP": mean.shape[1] // kv_heads,
        "BLOCK_N": _KEYS,
        "BLOCK_D": power_of_two(v.shape[3], 16),
        "BLOCK_P": min(_PARTS, power_of_two(tiles)),
    }
    launch(kernels.weigh, (-(-num_keys // _KEYS), batch * kv_heads), arguments, sizes, num_warps=4)
    return with_sinks(scores, sink).movedim(1, 2)


def _quadratic(
    x: Tensor, first: Tensor | None, second: Tensor | None, scored: Tensor | None, heads: int | None = None
) -> tuple[Tensor, Tensor]:
    """x . first + x . second x of every head [B, H, S], and the LSE of each tile [B, H, tiles] where `scored` is given.

    Args:
        x: [B, S, Hkv, D].
        first: [B, H, D] float32, or None.
        second: [B or 1, H, D, D] float32, or None.
        scored: [B, S, Hkv] uint8, which rows compete.
        heads: H, where `first` does not say.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, num_keys, kv_heads, width = x.shape
    heads = first.shape[1] if first is not None else heads
    assert heads is not None
    high, low, unit = (None, None, None) if second is None else _halves(second.contiguous(), x.dtype)
    config = _TILES["quadratic", 8 * x.element_size(), power_of_two(width, 16)]
    tiles = -(-num_keys // config.block_m)
    out = x.new_empty(batch, heads, num_keys, dtype=torch.float32)
    parts = x.new_empty(batch, heads, tiles if scored is not None else 0, dtype=torch.float32)
    each = 0 if second is None or second.shape[0] == 1 else 1  # whether rows of the batch have matrices of their own
    arguments = (
        x, None if first is None else first.contiguous(), high, low, unit, scored, out, parts, num_keys, kv_heads, width, tiles,
        *x.stride()[:3], each * heads * width**2, each * heads, *((0, 0, 0) if scored is None else scored.stride()),
    )  # fmt: skip
    flags = {
        "LINEAR": first is not None,
        "SQUARE": second is not None,
        "SPLIT": low is not None,
        "SCORED": scored is not None,
        "PRECISION": precision(),
        "GROUP": heads // kv_heads,
        "BLOCK_N": config.block_m,
        "BLOCK_D": power_of_two(width, 16),
        "BLOCK_C": config.block_n,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(kernels.quadratic, (tiles, batch * kv_heads), arguments, flags, **options)
    return out, parts


def _halves(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A float32 matrix of each head as the sum of two in `dtype`, in float16 times a number, as good as 17 bits.

    One matrix in 16 bits would round what it holds to 8 bits in bfloat16, and logits are sums of D^2 such terms; with two,
    each matrix product is done twice, as with TF32, which keeps 11.
    """
    if dtype == torch.float32:
        return matrix, None, None
    if dtype == torch.bfloat16:
        high = matrix.to(dtype)
        return high, (matrix - high).to(dtype), None
    top = matrix.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.exp2(torch.ceil(torch.log2(top)))  # float16 holds neither what is large nor what is small
    scaled = matrix / unit
    high = scaled.to(dtype)
    return high, (scaled - high).to(dtype), unit[..., 0, 0].contiguous()
