"""The threshold solver against bisection in float64: start, updates, bracket, and rows made to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnkit.ops.entmax import solver
from attnkit.ops.entmax.reference import bisect

ALPHAS = (1.001, 1.1, 1.25, 4 / 3, 1.5, 1.75, 1.9, 2.0)
INF = torch.inf


def _true(v: Tensor, alpha: float) -> Tensor:
    """tau - top in float64."""
    return bisect(v.double(), alpha)


def _rows(scale: float, n: int, count: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).mul_(scale).to(dtype)


def _found(z: Tensor, alpha: float | Tensor) -> Tensor:
    found = solver.solve(lambda: (z,), alpha)
    return (found.place + found.end).double()


ADVERSARIAL = {
    "all equal": torch.full((1, 1000), 3.0),
    "one huge": torch.cat([torch.full((1, 1), 1e6), torch.randn(1, 300)], 1),
    "one entry": torch.tensor([[-7.5]]),
    "two equal": torch.tensor([[2.0, 2.0]]),
    "duplicates at the threshold": torch.tensor([[1.0, *[0.0] * 50, *[-1.0] * 50]]),
    "on the edges of bins": (torch.arange(17.0) / 8 - 2)[None],
    "masked": torch.tensor([[0.5, -INF, 0.25, -INF, -3.0]]),
    "halving distances": (1 - torch.exp2(-torch.arange(24.0)))[None],
    "a long flat row": torch.zeros(1, 65536),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_adversarial_rows(alpha: float, dtype: torch.dtype) -> None:
    for name, scores in ADVERSARIAL.items():
        z = (scores.double() * (alpha - 1)).to(dtype)
        found = solver.solve(lambda z=z: (z,), alpha)
        prob = solver.powers(z - found.shift, found.place, alpha)[0].double()
        exact = _found(z.double(), alpha)
        eps = torch.finfo(dtype).eps
        assert abs(float(prob.sum()) - 1) < 16 * eps * (1 + z.shape[1] ** 0.5 * 0.1), name
        assert float((_found(z, alpha) - exact).abs().max()) < 8 * eps, name
        assert float((exact - _true(z.double() - z.double().amax(), alpha)).abs().max()) < 1e-14, name
        assert found.updates < 40, name


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_random_rows(scale: float, alpha: float) -> None:
    for n in (1, 2, 33, 1000):
        z = _rows(scale, n) * (alpha - 1)
        wanted = _true(z - z.amax(-1, keepdim=True), alpha)
        assert (_found(z, alpha) - wanted).abs().max() < 1e-14
        per_row = torch.full((len(z), 1), alpha, dtype=torch.float64)
        assert (_found(z, per_row) - wanted).abs().max() < 1e-14
        assert (_found(z.float(), alpha) - wanted).abs().max() < 1e-6 * max(1, scale * (alpha - 1) * 3)


def test_rows_with_nothing_in_them_and_with_nan() -> None:
    z = torch.tensor([[0.0, 0.1], [-INF, -INF], [0.0, torch.nan]])
    for alpha in ALPHAS:
        found = solver.solve(lambda: (z,), alpha)
        assert torch.isfinite(found.tau[0])
        assert found.tau[1] == INF
        assert torch.isnan(found.tau[2])
        prob = solver.powers(z - found.shift, found.place, alpha)[0]
        assert (prob[1] == 0).all()
        assert torch.isnan(prob[2]).all()
        half = torch.tensor([[0.0, -INF, -0.1, -INF]]) * (alpha - 1)
        for own in (alpha, torch.full((1, 1), alpha)):
            found = solver.solve(lambda half=half: (half,), own)
            prob = solver.powers(half - found.shift, found.place, own)[0]
            assert (prob[0, 1::2] == 0).all()
            assert abs(float(prob.sum()) - 1) < 1e-5
    for alpha in (1.1, 1.5, 1.75, 2.0):
        assert (solver.solve(lambda: (torch.zeros(3, 0),), alpha).tau == INF).all()


rows = st.lists(st.floats(-3, 0, width=32), min_size=1, max_size=60)


@settings(max_examples=300, deadline=None)
@given(rows, st.sampled_from([1.5, 2.0]), st.sampled_from([2, 4, 8, 16]))
def test_the_histogram_brackets_the_threshold(values: list[float], alpha: float, bins: int) -> None:
    v = torch.tensor([values], dtype=torch.float64)
    v = v - v.amax()
    low = solver.start(solver.count_bins(v, bins).double(), alpha)
    tau = _true(v, alpha)
    assert low >= -1 - 1e-12
    assert low <= tau + 1e-12
    assert tau <= low + 1 / bins + 1e-12


def test_the_histogram_of_a_long_row_keeps_its_digits() -> None:
    for alpha in (1.5, 2.0):
        counts = torch.tensor([[3.0, 0.0, 17.0, 0.0, 5.0, 0.0, 0.0, 2.0**24]])
        assert (solver.start(counts, alpha) - solver.start(counts.double(), alpha)).abs() < 1e-6


@settings(max_examples=300, deadline=None)
@given(rows, st.sampled_from(ALPHAS), st.floats(0, 1))
def test_an_update_keeps_the_threshold_bracketed_and_raises_the_lower_bound(
    values: list[float], alpha: float, share: float
) -> None:
    v = torch.tensor([values], dtype=torch.float64)
    v = v - v.amax()
    tau = _true(v, alpha)
    first = solver.begin(torch.full((1, 1), float(len(values)), dtype=torch.float64), alpha)
    end = solver.anchor(alpha)
    assert first.low + end <= tau + 1e-12
    assert tau <= first.high + end + 1e-12
    state = solver.Bracket(first.low + share * (first.high - first.low), first.low, first.high)
    for _ in range(4):
        new = solver.update(state, *solver.sums(v, state.place, alpha), alpha)
        assert state.low <= new.low <= new.place <= new.high <= state.high
        assert new.low + end <= tau + 1e-12
        assert tau <= new.high + end + 1e-12
        state = new


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("n", [64, 1000, 65536])
def test_the_histogram_and_few_updates_suffice_in_float32(n: int, alpha: float) -> None:
    """What a kernel with a fixed number of passes does: two updates for 1.5, four for long flat rows and for sparsemax."""
    for scale in (0.1, 0.2, 0.5, 1.0, 4.0, 20.0):
        z = _rows(scale, n, 8, torch.float32) * (alpha - 1)
        v = z - z.amax(-1, keepdim=True)
        count = torch.full((8, 1), float(n))
        state = solver.begin(count, alpha, solver.count_bins(v))
        for _ in range(2 if alpha == 1.5 and scale >= 0.5 else 4):
            state = solver.update(state, *solver.sums(v, state.place, alpha), alpha)
        assert (state.place.double() - _true(v, alpha)).abs().max() < 1e-6


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from(ALPHAS), st.integers(1, 60))
def test_the_root_of_a_part_of_the_row_is_a_lower_bound(values: list[float], alpha: float, kept: int) -> None:
    z = torch.tensor([values], dtype=torch.float64) * (alpha - 1)
    part = solver.solve(lambda: (z[:, :kept],), alpha).tau
    assert part <= solver.solve(lambda: (z,), alpha).tau + 1e-12


def test_blocks_and_neighbours_change_nothing() -> None:
    z = _rows(2.0, 96, 7, torch.float32)
    z[3, 10:] = -INF
    for alpha in ALPHAS:
        whole = solver.solve(lambda: (z,), alpha)
        blocks = solver.solve(lambda: (z[:, :32], z[:, 32:32], z[:, 32:64], z[:, 64:]), alpha)
        assert torch.equal(whole.count, blocks.count)
        assert (whole.place - blocks.place).abs().max() < 4e-7
        alone = solver.solve(lambda: (z[3:4],), alpha)
        assert torch.equal(alone.place, whole.place[3:4])
