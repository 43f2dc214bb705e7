"""Rounding, bit for bit against other implementations, and the laws that it obeys."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_examples import identical
from torch import Tensor

from attnkit._core.errors import DTypeError, OptionError
from attnkit.lab.numerics.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    TF32,
    FloatFormat,
    Mode,
    custom,
    parse_format,
    round_to,
    ulp,
)

ORACLES = {BF16: ml_dtypes.bfloat16, FP16: np.float16, E5M2: ml_dtypes.float8_e5m2, E4M3: ml_dtypes.float8_e4m3fn}
by_format = pytest.mark.parametrize("fmt", ORACLES, ids=lambda fmt: fmt.name)
by_container = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in-float32", "in-float64"])


def cast(x: Tensor, fmt: FloatFormat) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.numpy().astype(ORACLES[fmt]).astype(np.float64))


def every_pattern(fmt: FloatFormat) -> Tensor:
    """All numbers of a 16-bit format and what stands between each and the next: quarters, ties, and a hair beside a tie."""
    kind = np.float16 if fmt in (FP16, E5M2, E4M3) else ml_dtypes.bfloat16
    with np.errstate(all="ignore"):
        patterns = np.arange(2**16, dtype=np.uint16).view(kind)
        values, step = (torch.from_numpy(part.astype(np.float64)) for part in (patterns, np.spacing(np.abs(patterns))))
    between = [values + step * part for part in (0, 0.25, 0.5, 0.5 + 2**-10, 0.5 - 2**-10, 0.75)]
    return torch.cat(between).float()


def scattered(count: int, seed: int = 0) -> Tensor:
    """Random float32 of every size, by random bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).int().view(torch.float32)


@by_format
@by_container
def test_every_16_bit_pattern_and_its_neighbours(fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = every_pattern(fmt)
    assert identical(round_to(x.to(dtype), fmt), cast(x, fmt))


@by_format
@by_container
def test_random_float32(fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = scattered(500_000)
    assert identical(round_to(x.to(dtype), fmt), cast(x, fmt))


@pytest.mark.slow
@by_format
def test_ten_million_random_float32(fmt: FloatFormat) -> None:
    x = scattered(10_000_000)
    assert identical(round_to(x, fmt), cast(x, fmt))
    assert identical(round_to(x.double(), fmt), cast(x, fmt))


def test_float64_is_rounded_once() -> None:
    """Through float32 this number would first become a tie, and then the even neighbour."""
    x = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert round_to(x, BF16).item() == 1 + 2**-7
    assert round_to(round_to(x, FP32), BF16).item() == 1.0


def test_wide_formats() -> None:
    x = scattered(100_000).double() * (1 + 2**-30)
    assert identical(round_to(x, FP32), x.float())
    assert identical(round_to(x, FP64), x)
    assert identical(round_to(x.float(), FP32), x.float())
    y = torch.randn(1000)
    bits = y.view(torch.int32)
    assert identical(round_to(y, TF32, "rtz"), (bits & ~0x1FFF).view(torch.float32))
    assert identical(round_to(y.double(), custom(11)), round_to(y, TF32))


def test_without_subnormals_the_small_become_zero() -> None:
    flushed = FloatFormat("flushed", 11, -14, 15, subnormals=False)
    x = torch.tensor([2**-14, 2**-15, -(2**-20), -0.0, 2**-14 * (1 - 2**-12)], dtype=torch.float64)
    assert identical(round_to(x, flushed), torch.tensor([2**-14, 0.0, -0.0, -0.0, 2**-14], dtype=torch.float64))
    assert (flushed.tiny, FP16.tiny) == (2**-14, 2**-24)


# --- laws

formats = st.builds(custom, st.integers(2, 24), st.integers(-100, -1), st.integers(0, 100)) | st.sampled_from([*ORACLES])
numbers = st.floats(allow_nan=False, width=64)
modes = st.sampled_from(["rne", "rtz", "rna", "up", "down"])


def one(x: float, fmt: FloatFormat, mode: Mode = "rne") -> float:
    return round_to(torch.tensor([x], dtype=torch.float64), fmt, mode).item()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(numbers, formats, modes)
def test_rounding_is_idempotent_and_odd(x: float, fmt: FloatFormat, mode: Mode) -> None:
    once = one(x, fmt, mode)
    if math.isnan(once):
        assert abs(x) > fmt.max
        return
    assert one(once, fmt, mode) == once
    mirrored: Mode = {"up": "down", "down": "up"}.get(mode, mode)
    assert one(-x, fmt, mirrored) == -once


@settings(max_examples=300, deadline=None, derandomize=True)
@given(numbers, numbers, formats, modes)
def test_rounding_is_monotone(x: float, y: float, fmt: FloatFormat, mode: Mode) -> None:
    low, high = (one(value, fmt, mode) for value in sorted((x, y)))
    assert low <= high or math.isnan(low) or math.isnan(high)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(numbers, formats)
def test_directed_modes_enclose_the_number_and_the_nearest_is_one_of_them(x: float, fmt: FloatFormat) -> None:
    down, up = one(x, fmt, "down"), one(x, fmt, "up")
    if math.isfinite(down) and math.isfinite(up):
        assert down <= x <= up
        assert up - down in (0, ulp(torch.tensor([x], dtype=torch.float64), fmt).item())
        assert one(x, fmt, "rtz") == (down if x > 0 else up)
        for mode in ("rne", "rna"):
            assert abs(one(x, fmt, mode) - x) == min(x - down, up - x)


@pytest.mark.parametrize("fmt", [BF16, E4M3, custom(5)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.93])
def test_stochastic_rounding_is_unbiased(fmt: FloatFormat, place: float) -> None:
    count = 40_000
    base = ulp(torch.tensor([1.3], dtype=torch.float64), fmt).item()
    for value in (1 + place * base, -(1 + place * base), place * fmt.tiny):
        x = torch.full((count,), value, dtype=torch.float64)
        rounded = round_to(x, fmt, "sr", generator=torch.Generator().manual_seed(3))
        assert len(set(rounded.tolist())) == 2
        step = ulp(x[:1], fmt).item()
        sigma = step * math.sqrt(place * (1 - place) / count)
        assert abs(rounded.mean().item() - value) < 4 * sigma
    again = round_to(x, fmt, "sr", generator=torch.Generator().manual_seed(3))
    assert identical(again, rounded)
    assert identical(round_to(rounded, fmt, "sr"), rounded)


@by_format
def test_unit_in_the_last_place(fmt: FloatFormat) -> None:
    kind = ORACLES[fmt]
    x = round_to(torch.randn(2000, dtype=torch.float64) * torch.exp2(torch.randint(-14, 6, (2000,)).double()), fmt)
    with np.errstate(all="ignore"):
        expected = np.spacing(x.abs().numpy().astype(kind)).astype(np.float64)
    usual = torch.isfinite(torch.from_numpy(expected))  # the step above the largest number leads out of the format
    assert torch.equal(ulp(x, fmt)[usual], torch.from_numpy(expected)[usual])
    assert ulp(torch.zeros(1, dtype=torch.float64), fmt).item() == fmt.tiny


def test_unit_in_the_last_place_of_float64() -> None:
    values = [0.0, 1.0, -1.5, 1e-310, 1e300, math.pi, math.inf]
    assert ulp(torch.tensor(values, dtype=torch.float64), FP64).tolist() == [math.ulp(value) for value in values]
    assert math.isnan(ulp(torch.tensor([math.nan]), BF16).item())


def test_gradients_pass_straight_through_and_are_rounded_on_request() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, dtype=torch.float64)
    assert torch.equal(torch.autograd.grad((round_to(x, BF16) * weight).sum(), x)[0], weight)
    (low,) = torch.autograd.grad((round_to(x, BF16, grad_format=E5M2) * weight).sum(), x)
    assert torch.equal(low, round_to(weight, E5M2))
    assert not torch.equal(low, weight)


# --- names and refusals


def test_formats_by_name() -> None:
    assert [parse_format(name) for name in FORMATS] == [FP64, FP32, TF32, BF16, FP16, E5M2, E4M3]
    for fmt in (custom(12), custom(5, -14, 15)):
        assert parse_format(fmt.name) == fmt
    assert [fmt.max for fmt in (FP16, E5M2, E4M3)] == [65504, 57344, 448]
    assert custom(8).roundoff == 2**-8
    with pytest.raises(OptionError, match="unknown number format 'bf61'; did you mean 'bf16'"):
        parse_format("bf61")


@pytest.mark.parametrize("name", ["p1", "p54", "p8:15:-14", "p8:-2000:15"])
def test_formats_that_do_not_exist(name: str) -> None:
    with pytest.raises(OptionError, match=r"p must lie in 2\.\.53"):
        parse_format(name)


def test_refusals() -> None:
    x = torch.ones(3)
    with pytest.raises(DTypeError, match="x is bfloat16; allowed: float32, float64"):
        round_to(x.bfloat16(), BF16)
    for fmt in (FP64, custom(8), custom(8, -140, 127)):
        with pytest.raises(DTypeError, match=r"x is fp32, which cannot hold every number of .*; give x\.double"):
            round_to(x, fmt)
        with pytest.raises(DTypeError, match="cannot hold"):
            ulp(x, fmt)
    with pytest.raises(DTypeError, match="cannot hold"):
        round_to(x, BF16, grad_format=FP64)
    with pytest.raises(OptionError, match="mode='even' is not allowed"):
        round_to(x, BF16, "even")
    with pytest.raises(OptionError, match="generator is of no use to mode='rne'"):
        round_to(x, BF16, generator=torch.Generator())
