"""How keys and values are written as codes: bits of a byte, scales and zeros. Everything that reads pages follows this file.

A number is code * scale + zero for integers of 4 or 8 bits, and code * scale for fp8 (e4m3). Keys have a scale and a zero for
each channel of a page, values for each token. Two codes of 4 bits share a byte: byte j of a row of width D holds channel j in
its low half and channel j + D / 2 in its high half, so that a kernel reads both halves of a row without moving anything.
"""

import torch
from torch import Tensor

__all__ = ["CODE_DTYPES", "FP8", "decode", "pack4", "unpack4"]

FP8 = torch.float8_e4m3fn
CODE_DTYPES = (torch.uint8, FP8)


def pack4(codes: Tensor) -> Tensor:
    """Codes 0 .. 15 [..., D] uint8 -> [..., D / 2] bytes; D is even."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unpack4(packed: Tensor) -> Tensor:
    """The codes of `pack4`."""
    return torch.cat([packed & 15, packed >> 4], -1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Numbers of codes.

    Args:
        codes: [..., D] uint8 or fp8, or [..., D / 2] with 4 bits.
        scale, zero: broadcast to [..., D]; no zero with fp8.
        bits: 4 or 8.
        dtype: of the result; the arithmetic is in it, at least in float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    numbers = (unpack4(codes) if bits == 4 else codes).to(wide) * scale.to(wide)
    return (numbers if zero is None else numbers + zero.to(wide)).to(dtype)
