import math

import numpy as np
import pytest

from attnkit.lab.compare.statistics import Z95, block_bootstrap, wilson


@pytest.mark.parametrize("trials", [1, 3, 10, 500])
def test_wilson_at_the_ends_is_the_closed_form(trials: int) -> None:
    edge = Z95**2 / (trials + Z95**2)
    assert wilson(0, trials) == (0.0, pytest.approx(edge))
    assert wilson(trials, trials) == (pytest.approx(1 - edge), 1.0)


@pytest.mark.parametrize(("hits", "trials"), [(8, 10), (1, 3), (17, 40)])
def test_wilson_bounds_solve_the_score_equation(hits: int, trials: int) -> None:
    share = hits / trials
    for bound in wilson(hits, trials):
        assert abs(share - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / trials))


def test_bootstrap_of_independent_values_has_the_width_of_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    mean, low, high = block_bootstrap([values.tolist()], seed=0)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * Z95 * values.std() / math.sqrt(len(values)), rel=0.1)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.01)


def test_bootstrap_sees_that_neighbours_depend_on_each_other() -> None:
    levels = np.random.default_rng(2).normal(size=250)
    runs = np.repeat(levels, 16)
    shuffled = np.random.default_rng(3).permutation(runs)
    _, low, high = block_bootstrap([runs.tolist()], seed=0)
    _, narrow_low, narrow_high = block_bootstrap([shuffled.tolist()], seed=0)
    assert high - low > 2.5 * (narrow_high - narrow_low)


def test_bootstrap_weights_windows_by_their_tokens_and_takes_short_ones() -> None:
    mean, low, high = block_bootstrap([[1.0] * 30, [4.0] * 10], seed=0)
    assert (mean, low, high) == (1.75, 1.75, 1.75)
    assert block_bootstrap([[2.5]], seed=0) == (2.5, 2.5, 2.5)


def test_bootstrap_draws_again_what_the_seed_drew() -> None:
    values = [np.random.default_rng(4).normal(size=100).tolist()]
    assert block_bootstrap(values, seed=5) == block_bootstrap(values, seed=5)
    assert block_bootstrap(values, seed=5) != block_bootstrap(values, seed=6)
