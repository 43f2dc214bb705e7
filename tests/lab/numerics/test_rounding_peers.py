"""Rounding against other packages: directed modes and saturation, and speed."""

import math
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from numerics_examples import identical

from attnkit.lab.numerics.formats import BF16, E4M3, E5M2, FP16, TF32, FloatFormat, Mode, round_to

gfloat = pytest.importorskip("gfloat")
from gfloat import formats as peer_formats  # noqa: E402

GFLOAT: dict[FloatFormat, Any] = {
    BF16: peer_formats.format_info_bfloat16,
    FP16: peer_formats.format_info_binary16,
    E5M2: peer_formats.format_info_ocp_e5m2,
    E4M3: peer_formats.format_info_ocp_e4m3,
}
MODES: dict[Mode, Any] = {
    "rne": gfloat.RoundMode.TiesToEven,
    "rtz": gfloat.RoundMode.TowardZero,
    "rna": gfloat.RoundMode.TiesToAway,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}
by_format = pytest.mark.parametrize("fmt", GFLOAT, ids=lambda fmt: fmt.name)


def test_no_mode_is_left_out() -> None:
    assert set(get_args(Mode)) == {*MODES, "sr"}


@pytest.mark.parametrize("mode", MODES)
@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in-float32", "in-float64"])
def test_directed_modes_against_gfloat(fmt: FloatFormat, dtype: torch.dtype, mode: Mode) -> None:
    top = torch.tensor([fmt.max, fmt.tiny], dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    edges = torch.cat([top * factor for factor in (1, 1 + 2**-20, 1.01, 1.5, 0.5, 0.5 + 2**-20, 0.01, 4)])
    ordinary = torch.randn(300, dtype=torch.float64) * torch.exp2(torch.randint(-30, 20, (300,)).double())
    x = torch.cat([special, edges, -edges, ordinary]).to(dtype)
    got = round_to(x, fmt, mode)
    expected = torch.tensor([gfloat.round_float(GFLOAT[fmt], value, MODES[mode]) for value in x.tolist()])
    assert identical(got, expected.double())


@by_format
def test_saturation_against_gfloat(fmt: FloatFormat) -> None:
    kept = FloatFormat("kept", fmt.p, fmt.emin, fmt.emax, has_inf=fmt.has_inf, saturate=True)
    x = torch.tensor([1.0, 1e39, -1e39, fmt.max * 1.1, math.inf, -math.inf, math.nan], dtype=torch.float64)
    expected = [gfloat.round_float(GFLOAT[fmt], value, gfloat.RoundMode.TiesToEven, sat=True) for value in x.tolist()]
    assert identical(round_to(x, kept), torch.tensor(expected, dtype=torch.float64))


# --- speed


def _best(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def test_bf16_costs_what_torch_asks_for_it_and_other_formats_less_than_gfloat() -> None:
    x = torch.randn(1_000_000)
    assert _best(lambda: round_to(x, BF16)) < 2 * _best(lambda: x.bfloat16().float())
    assert 2 * _best(lambda: round_to(x, TF32)) < _best(lambda: gfloat.round_ndarray(GFLOAT[BF16], x.double().numpy()))


def test_faster_than_pychop_and_the_same() -> None:
    pychop = pytest.importorskip("pychop")
    pychop.backend("torch")
    chop = pychop.Chop(exp_bits=8, sig_bits=10, rmode=1)
    x = torch.randn(1_000_000)
    assert torch.equal(chop(x), round_to(x, TF32))
    assert _best(lambda: round_to(x, TF32)) < _best(lambda: chop(x))
