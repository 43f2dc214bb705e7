"""How a page of keys and values is stored: raw, as integers of 8 or 4 bits, or as fp8.

A page is encoded once, when it is written, and never again, so that errors do not add up. `ops.ragged_decode_attention` reads
codes as they are (`ops.KVPages`); `ops/ragged_decode/codes.py` says which bit is where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.ops.ragged_decode.call import PAGE_SIZES
from attnkit.ops.ragged_decode.codes import FP8 as FP8_DTYPE
from attnkit.ops.ragged_decode.codes import decode, pack4

__all__ = ["FP8", "Codec", "IntN", "Raw"]

_HALF_ULP = 2.0**-11 * 1.001  # of float16, relative; a little more, for the rounding of what computes with it
_HALF_TINY = 2.0**-25  # the same below the normal range
_TINY = 2.0**-24  # the smallest scale
_FP8_MAX = 448.0
_SCALE_BYTES = 2
Parts = dict[str, Tensor]


class Codec(Protocol):
    """What a cache asks of a way to store pages."""

    @property
    def page_size(self) -> int:
        """Tokens of a page, P."""

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """Keys [.., n, D] and values [.., n, Dv] of pages -> tensors under the names of `KVPages`.

        A page that is not full is encoded from the n tokens it has: others would widen its range.
        """

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [.., n, D] and values [.., n, Dv] of what `encode` returned."""

    def bytes_per_token(self, width: int, width_v: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bytes of a token of one head in a full page, scales and zeros included; `dtype` is that of raw tensors."""


@dataclass(frozen=True)
class Raw:
    """Keys and values as they are.

    Raises:
        OptionError: another page size than 16, 32, 64 or 128.
    """

    page_size: int = 16

    def __post_init__(self) -> None:
        _check_page_size(self.page_size)

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """The same tensors."""
        return {"keys": keys, "values": values}

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same tensors in `dtype`."""
        return parts["keys"].to(dtype), parts["values"].to(dtype)

    def bytes_per_token(self, width: int, width_v: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """(D + Dv) times the size of a number."""
        return float((width + width_v) * dtype.itemsize)


@dataclass(frozen=True)
class IntN:
    """Unsigned integers between smallest and largest number, of each channel of a page for keys, of each token for values.

    A number is off by half a scale at most: the zero is rounded down and the scale up, so that every number lies between the
    first and the last code. Numbers beyond 65,504, the largest of float16, come back infinite or NaN.

    Attributes:
        bits: 8 or 4.
        page_size: 16, 32, 64 or 128; scales of keys cost 4 / page_size bytes a channel.
    Raises:
        OptionError: other bits, or another page size.
    Source: Liu et al. 2024 (KIVI, arXiv:2402.02750).
    """

    bits: int = 8
    page_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(
                f"IntN(bits={self.bits}) is not there; choose bits=8 (about lossless) or bits=4, or drop more keys instead"
            )
        _check_page_size(self.page_size)

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """Codes, scales and zeros."""
        key_codes, key_scale, key_zero = self._codes(keys, -2)
        value_codes, value_scale, value_zero = self._codes(values, -1)
        return {
            "keys": key_codes,
            "values": value_codes,
            "key_scale": key_scale.squeeze(-2),
            "key_zero": key_zero.squeeze(-2),
            "value_scale": value_scale.squeeze(-1),
            "value_zero": value_zero.squeeze(-1),
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Numbers again."""
        keys = decode(parts["keys"], parts["key_scale"][..., None, :], parts["key_zero"][..., None, :], self.bits, dtype)
        rows = parts["value_scale"][..., None], parts["value_zero"][..., None]
        return keys, decode(parts["values"], *rows, self.bits, dtype)

    def bytes_per_token(self, width: int, width_v: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Codes, two numbers for the token's value, and its share of two numbers for each channel."""
        return (width + width_v) * self.bits / 8 + 2 * _SCALE_BYTES + 2 * _SCALE_BYTES * width / self.page_size

    def _codes(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of x, and the scale and zero of each slice along `dim`."""
        if self.bits == 4 and x.shape[-1] % 2:
            raise OptionError(f"IntN(bits=4) puts two channels into a byte, and width {x.shape[-1]} is odd; use bits=8")
        x, top = x.to(torch.promote_types(x.dtype, torch.float32)), 2**self.bits - 1
        low, high = x.aminmax(dim=dim, keepdim=True)
        zero = (low - low.abs() * _HALF_ULP - _HALF_TINY).half()
        scale = _rounded_up((high - zero) / top)
        codes = ((x - zero) / scale).round_().clamp_(0, top).to(torch.uint8)
        return pack4(codes) if self.bits == 4 else codes, scale, zero


@dataclass(frozen=True)
class FP8:
    """Floats of 8 bits (e4m3) under a scale: of each channel of a page for keys, of each token for values.

    A number is off by 1/16 of itself at most, or by 2^-10 of its scale where that is more.

    Attributes:
        page_size: 16, 32, 64 or 128.
    Raises:
        OptionError: another page size.
    """

    page_size: int = 64

    def __post_init__(self) -> None:
        _check_page_size(self.page_size)

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """Codes and scales."""
        key_codes, key_scale = _fp8(keys, -2)
        value_codes, value_scale = _fp8(values, -1)
        scales = {"key_scale": key_scale.squeeze(-2), "value_scale": value_scale.squeeze(-1)}
        return {"keys": key_codes, "values": value_codes} | scales

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Numbers again."""
        keys = decode(parts["keys"], parts["key_scale"][..., None, :], None, 8, dtype)
        return keys, decode(parts["values"], parts["value_scale"][..., None], None, 8, dtype)

    def bytes_per_token(self, width: int, width_v: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Codes, one number for the token's value, and its share of one number for each channel."""
        return float(width + width_v) + _SCALE_BYTES + _SCALE_BYTES * width / self.page_size


def _fp8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = _rounded_up(x.abs().amax(dim, keepdim=True) / _FP8_MAX)
    return (x / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8_DTYPE), scale


def _rounded_up(scale: Tensor) -> Tensor:
    """In float16, not below what it is and never 0."""
    return (scale + scale * _HALF_ULP + _HALF_TINY).half().clamp(min=_TINY)


def _check_page_size(size: int) -> None:
    if size not in PAGE_SIZES:
        raise OptionError(f"page_size={size} is not allowed; choose one of {', '.join(map(str, PAGE_SIZES))}")
