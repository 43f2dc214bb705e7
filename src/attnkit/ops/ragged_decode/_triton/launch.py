"""Launching ragged decode attention. No host synchronisation: sizes come from shapes alone."""

import torch
from torch import Tensor

from attnkit._core.triton.launcher import launch, power_of_two, precision
from attnkit.ops.ragged_decode._triton import kernels
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["run"]

MOST_ROWS = 64  # of a tile: queries times the heads that share a key head
# tokens a head may store, up to which a part is so many of them: enough parts for short caches, few to merge for long ones
SPLITS = ((16_384, 256), (65_536, 512))
LONGEST_SPLIT = 1024
COMBINED = 32, 128  # columns and parts of a tile of `combine`
# keys, warps and stages of a tile by what pages hold, bits of q and padded width, where no width is a limit
_TILES = {
    ("raw", 16): ((64, (128, 4, 3)), (128, (64, 4, 3)), (256, (32, 4, 3))),
    ("raw", 32): ((64, (64, 4, 2)), (128, (32, 4, 2)), (256, (16, 4, 2))),
    ("codes", 16): ((128, (64, 4, 4)), (256, (32, 4, 4))),
    ("codes", 32): ((64, (64, 4, 2)), (128, (32, 4, 2)), (256, (16, 4, 2))),
}


def run(
    q: Tensor, pages: KVPages, sinks: Tensor | None, scale: float, softcap: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, T, H] float32."""
    batch, num_q, heads, _ = q.shape
    kv_heads, group = pages.table.shape[1], heads // pages.table.shape[1]
    width_v = pages.widths[1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    lengths, tail_lengths = pages.lengths.contiguous(), None if pages.tail_lengths is None else pages.tail_lengths.contiguous()
    rows, row_tiles, block_m = batch * num_q * heads, *_row_tiles(num_q * group)
    split, page_parts, parts = _parts(pages, row_tiles)
    part_out = q.new_empty(parts, rows, width_v, dtype=torch.float32)
    part_max, part_sum = q.new_empty(2, parts, rows, dtype=torch.float32)
    out, lse = q.new_empty(batch, num_q, heads, width_v, dtype=out_dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
    if rows == 0 or width_v == 0:
        return out, lse.fill_(-torch.inf)
    if parts:
        _decode(
            q, pages, lengths, tail_lengths, scale, softcap, part_out, part_max, part_sum, split, page_parts, row_tiles, block_m
        )
    columns = min(COMBINED[0], power_of_two(width_v, 16))
    flags = {"BLOCK_P": min(COMBINED[1], power_of_two(max(parts, 1))), "BLOCK_V": columns}
    arguments = (
        part_out, part_max, part_sum, sinks if sinks is None else sinks.contiguous(), lengths, tail_lengths, out, lse,
        rows, num_q, heads, kv_heads, split, page_parts, width_v,
    )  # fmt: skip
    launch(kernels.combine, (rows, -(-width_v // columns)), arguments, flags, num_warps=4)
    return out, lse


def _decode(
    q: Tensor, pages: KVPages, lengths: Tensor, tail_lengths: Tensor | None, scale: float, softcap: float, part_out: Tensor,
    part_max: Tensor, part_sum: Tensor, split: int, page_parts: int, row_tiles: int, block_m: int,
) -> None:  # fmt: skip
    """The parts."""
    batch, num_q, heads, width = q.shape
    kv_heads, code = pages.table.shape[1], pages.code
    halves = 2 if code == "int4" else 1
    widths = width // halves, pages.widths[1] // halves
    blocks = power_of_two(widths[0], 16), power_of_two(widths[1], 16)
    keys, values = (t.view(torch.uint8) if code == "fp8" else t for t in (pages.keys, pages.values))
    tails = (pages.tail_keys, pages.tail_values)
    tail_keys, tail_values = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tails)
    tail_strides = [stride for t in (tail_keys, tail_values) for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    tail_bias = None if pages.tail_bias is None else pages.tail_bias.contiguous()
    scales = (pages.key_scale, pages.key_zero, pages.value_scale, pages.value_zero, pages.bias)
    arguments = (
        q, keys, values, pages.table.contiguous(), lengths, tail_keys, tail_values, tail_lengths, *scales, tail_bias,
        part_out, part_max, part_sum, *q.stride()[:3], *keys.stride()[:2], *values.stride()[:2], *tail_strides,
        part_max.shape[1], num_q, kv_heads, pages.table.shape[2], 0 if tail_bias is None else tail_bias.shape[2], split,
        page_parts, scale, softcap, *widths,
    )  # fmt: skip
    block_n, warps, stages = _tiles("raw" if code == "raw" else "codes", q.element_size() * 8, max(blocks))
    if code != "raw":
        block_n = min(block_n, pages.page_size)  # scales of a page's channels are multiplied into the queries
    flags = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": blocks[0], "BLOCK_V": blocks[1], "GROUP": heads // kv_heads,
        "CODE": code, "PAGE": pages.page_size, "SOFTCAP": softcap > 0, "EVEN": blocks == widths, "PRECISION": precision(),
    }  # fmt: skip
    grid = (batch * kv_heads, part_max.shape[0], row_tiles)
    stages = 2 * stages - 1  # a page's number is fetched as long before its rows as the rows before their use
    launch(kernels.decode, grid, arguments, flags, num_warps=warps, num_stages=stages)


def _row_tiles(rows: int) -> tuple[int, int]:
    """How many tiles the rows of a key head make, and rows of a tile."""
    block = min(MOST_ROWS, power_of_two(max(rows, 1), 16))
    return -(-rows // block), block


def _parts(pages: KVPages, row_tiles: int) -> tuple[int, int, int]:
    """Tokens of a part, parts of the pages, and all of them; longer parts where many rows each have results of every part."""
    most = pages.table.shape[2] * pages.page_size
    tail = 0 if pages.tail_keys is None else pages.tail_keys.shape[2]
    split = next((split for limit, split in SPLITS if max(most, tail) <= limit), LONGEST_SPLIT) * power_of_two(
        max(row_tiles, 1)
    )
    page_parts = -(-most // split)
    return split, page_parts, page_parts + -(-tail // split)


def _tiles(kind: str, bits: int, width: int) -> tuple[int, int, int]:
    return next(tile for limit, tile in _TILES[kind, bits] if width <= limit)
