"""The four laws of deviation, on eight seeds, and what comes out of them at length."""

import math

import pytest
import torch
from numerics_examples import SEEDS, drawn, identical, rms
from torch import Tensor

from attnkit.lab.numerics.emulate import emulated_attention
from attnkit.lab.numerics.formats import BF16, FP16, FloatFormat, custom, round_to
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.policy import Preset, SitePolicy
from attnkit.lab.numerics.recurrences import Algorithm

both = pytest.mark.parametrize("algorithm", ["fa1", "fa2"])


def measured(fmt: FloatFormat, length: int, block: int, algorithm: Algorithm = "fa2", preset: Preset = "paper") -> Tensor:
    """Error of each seed in terms of the size of its true value, [SEEDS]."""
    q, k, v = drawn(fmt, length, batch=SEEDS)
    golden = golden_attention(q, k, v)
    out = emulated_attention(q, k, v, policy=SitePolicy.preset(preset, fmt), algorithm=algorithm, block_k=block)
    return rms(out, golden) / rms(golden, torch.zeros_like(golden))


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(t: Tensor) -> Tensor:
        return (t[:, None] > t).sum(1) + ((t[:, None] == t).sum(1) + 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


@both
def test_every_bit_of_the_significand_halves_the_deviation(algorithm: Algorithm) -> None:
    errors = torch.stack([measured(custom(p), 256, 16, algorithm) for p in range(4, 14)])
    assert (errors.diff(dim=0) < 0).all()
    slope = (errors[0] / errors[-1]).log2() / 9
    assert ((slope > 0.85) & (slope < 1.15)).all()


GRID = [(length, block) for length in (256, 512, 1024) for block in (16, 32, 64)]
RESCALES = torch.tensor([math.ceil(length / block) for length, block in GRID])


@both
def test_more_rescales_mean_more_deviation(algorithm: Algorithm) -> None:
    """In terms of the true value, which shrinks with the length where values have mean 0."""
    errors = torch.stack([measured(BF16, length, block, algorithm) for length, block in GRID])
    assert all(spearman(RESCALES, errors[:, seed]) >= 0.7 for seed in range(SEEDS))
    assert (errors.unflatten(0, (3, 3)).diff(dim=0) > 0).all()


def test_where_values_have_a_mean_more_rescales_mean_more_absolute_deviation() -> None:
    policy, errors = SitePolicy.preset("paper", BF16), []
    for length, block in GRID:
        q, k, v = drawn(BF16, length, batch=SEEDS)
        v = round_to(1 + 0.3 * v, BF16)
        out = emulated_attention(q, k, v, policy=policy, algorithm="fa2", block_k=block)
        errors.append(rms(out, golden_attention(q, k, v)))
    assert all(spearman(RESCALES, torch.stack(errors)[:, seed]) >= 0.7 for seed in range(SEEDS))


@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda fmt: fmt.name)
@both
def test_larger_tiles_mean_less_deviation(fmt: FloatFormat, algorithm: Algorithm) -> None:
    errors = torch.stack([measured(fmt, 512, block, algorithm) for block in (8, 32, 128, 512)])
    assert (errors.diff(dim=0) < 0).all()


@pytest.mark.parametrize("algorithm", ["fa1", "fa2", "lagged"])
def test_swapping_the_axes_matters_unless_tiles_are_square(algorithm: Algorithm) -> None:
    q, k, v = drawn(BF16, 256, batch=SEEDS)
    golden, policy = golden_attention(q, k, v), SitePolicy.preset("paper", BF16)

    def run(block_q: int, block_k: int, swap: bool) -> Tensor:
        return emulated_attention(q, k, v, policy=policy, algorithm=algorithm, block_q=block_q, block_k=block_k, swap_axes=swap)

    assert identical(run(32, 32, True), run(32, 32, False))
    plain, swapped = rms(run(64, 16, False), golden), rms(run(64, 16, True), golden)
    assert (plain > swapped).all()  # swapped, keys come in the larger tiles
    assert identical(run(64, 16, True), run(16, 64, False))


def test_float32_statistics_take_the_laws_of_tiles_away() -> None:
    """A kernel's deviation depends on neither length nor tile beyond what the baseline's does."""
    for length in (256, 1024):
        errors = torch.stack([measured(BF16, length, block, preset="kernel") for block in (16, 128)])
        assert ((errors[0] / errors[1]).log2().abs() < 0.1).all()
        assert (errors < 0.7 * measured(BF16, length, 16, "baseline")).all()


@pytest.mark.parametrize(("value_mean", "factor"), [(1.0, 2.5), (3.0, 8.0)])
def test_the_consistent_normaliser_takes_the_mean_of_the_values_out_of_a_kernels_error(
    value_mean: float, factor: float
) -> None:
    """Before the result is rounded, which would hide it."""
    q, k, v = drawn(BF16, 1024, width=64, batch=SEEDS)
    v = round_to(value_mean + 0.3 * v, BF16)
    policy, golden = SitePolicy.preset("kernel", BF16, {"O_out": None}), golden_attention(q, k, v)
    exact, consistent = (
        rms(emulated_attention(q, k, v, policy=policy, algorithm="fa2", normalizer=normalizer), golden)
        for normalizer in ("exact", "consistent")
    )
    assert (exact > factor * consistent).all()


def test_ten_times_the_baseline_with_16_bit_statistics_and_half_of_it_with_float32() -> None:
    """Both facts, for 4,096 tokens and tiles of 16, in root mean squares; largest errors hang on a single element."""
    q, k, v = drawn(BF16, 4096, width=64)
    golden = golden_attention(q, k, v)

    def error(preset: Preset, algorithm: Algorithm) -> float:
        policy = SitePolicy.preset(preset, BF16)
        return rms(emulated_attention(q, k, v, policy=policy, algorithm=algorithm, block_k=16), golden).item()

    baseline = error("paper", "baseline")
    assert 5 <= error("paper", "fa2") / baseline <= 20
    assert 5 <= error("paper", "fa1") / baseline <= 20
    assert error("kernel", "fa2") / baseline <= 0.6
