"""Ratios, their intervals, and the verdict on deviations that were planted."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit._core.errors import InputError, OptionError
from attnkit.lab.numerics import ReferenceBands, WeightDeviation, contextualize, significance, weight_deviation

State = Mapping[str, Tensor]


def model(seed: int, *, tensors: int = 24, width: int = 400) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(width, generator=generator, dtype=torch.float64) for i in range(tensors)}


def perturbed(state: State, size: float, seed: int) -> dict[str, Tensor]:
    noise = model(seed)
    return {name: weight + size * noise[name] for name, weight in state.items()}


BASE = model(0)
BANDS = ReferenceBands(
    random_init=weight_deviation(BASE, perturbed(BASE, 0.5, 1)),
    precision=weight_deviation(BASE, perturbed(BASE, 0.05, 2)),
    repeat=weight_deviation(BASE, BASE),
)


@pytest.mark.parametrize(("size", "outcome"), [(0.1, "accept"), (1.0, "inconclusive"), (10.0, "reject")])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_planted_noise_is_judged(size: float, outcome: str, seed: int) -> None:
    """Noise of 0.1, 1 and 10 times the smaller band."""
    verdict = contextualize(weight_deviation(BASE, perturbed(BASE, 0.05 * size, seed)), BANDS, margin=1.0)
    assert verdict.outcome == outcome
    assert verdict.ratios["max_abs"].value == pytest.approx(size, rel=0.3)
    assert verdict.margin == 1.0


@pytest.mark.parametrize(("size", "outcome"), [(0.1, "accept"), (1.0, "inconclusive"), (10.0, "reject")])
def test_planted_shifts_are_judged(size: float, outcome: str) -> None:
    """Every tensor exactly on its multiple of the band: intervals are points, and the line belongs to nobody."""

    def shifted(by: float) -> WeightDeviation:
        zero = {name: torch.zeros(8) for name in BASE}
        return weight_deviation(zero, {name: torch.full((8,), by, dtype=torch.float64) for name in BASE})

    bands = ReferenceBands(random_init=shifted(4.0), precision=shifted(1.0))
    verdict = contextualize(shifted(size), bands, margin=1.0)
    assert verdict.outcome == outcome
    for ratio in verdict.ratios.values():
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((size, size, size), rel=1e-12)


def test_the_margin_moves_the_line() -> None:
    found = weight_deviation(BASE, perturbed(BASE, 0.05, 3))
    assert [contextualize(found, BANDS, margin=margin).outcome for margin in (0.1, 1.0, 10.0)] == [
        "reject", "inconclusive", "accept",
    ]  # fmt: skip


def test_one_metric_is_enough_to_reject_and_both_are_needed_to_accept() -> None:
    """A permutation moves no distribution: W1 accepts what D_max does not."""
    moved = weight_deviation(BASE, {name: weight.flip(0) for name, weight in BASE.items()})
    verdict = contextualize(moved, BANDS, margin=1.0)
    assert verdict.ratios["w1"].value == 0
    assert verdict.outcome == "reject"
    assert verdict.reason == "max_abs above 1 times the smaller band"


@pytest.mark.parametrize("smaller", ["random_init", "precision"])
def test_the_smaller_band_counts(smaller: str) -> None:
    sizes = {"random_init": 0.5, "precision": 0.5, smaller: 0.005}
    bands = ReferenceBands(**{name: weight_deviation(BASE, perturbed(BASE, size, 1)) for name, size in sizes.items()})
    assert contextualize(weight_deviation(BASE, perturbed(BASE, 0.05, 2)), bands, margin=1.0).outcome == "reject"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": BASE}, "the band precision is 0 in max_abs"),
        ({"random_init": BASE}, "the band random_init is 0 in max_abs"),
        ({"repeat": perturbed(BASE, 0.2, 4)}, r"repeating the run changes max_abs by .*, the band precision by "),
        ({"precision": {name: weight.flip(0) for name, weight in BASE.items()}}, "the band precision is 0 in w1"),
    ],
)
def test_bands_that_are_not_valid_judge_nothing(change: dict[str, State], reason: str) -> None:
    fields: dict[str, Any] = vars(BANDS) | {name: weight_deviation(BASE, state) for name, state in change.items()}
    verdict = contextualize(weight_deviation(BASE, perturbed(BASE, 1e-6, 3)), ReferenceBands(**fields), margin=1.0)
    assert verdict.outcome == "inconclusive"
    assert verdict.ratios == {}
    assert re.match(reason, verdict.reason)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_margins_that_are_none(margin: float) -> None:
    with pytest.raises(OptionError, match=r"must be positive and finite"):
        contextualize(BANDS.precision, BANDS, margin=margin)


def test_there_is_no_margin_that_we_chose() -> None:
    with pytest.raises(TypeError, match="margin"):
        contextualize(BANDS.precision, BANDS)  # type: ignore[call-arg]


def test_other_tensors_are_refused() -> None:
    other = weight_deviation({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    with pytest.raises(InputError, match="different tensors"):
        contextualize(other, BANDS, margin=1.0)
    with pytest.raises(InputError, match="precision is 0 in max_abs and w1"):
        significance(BANDS.precision, weight_deviation(BASE, BASE))


def test_significance_is_a_ratio_of_totals_with_an_interval_around_it() -> None:
    found = weight_deviation(BASE, perturbed(BASE, 0.02, 7))
    for metric, ratio in significance(found, BANDS.precision).items():
        assert ratio.value == pytest.approx(found.total(metric) / BANDS.precision.total(metric))  # type: ignore[arg-type,operator]
        assert ratio.low < ratio.value < ratio.high
    assert significance(found, BANDS.precision) == significance(found, BANDS.precision)


def test_the_interval_sees_what_hangs_on_one_tensor() -> None:
    """One tensor of twenty-four is far off: with and without it the answer differs."""
    state = perturbed(BASE, 0.02, 7)
    state["layer5"] = state["layer5"] + 3
    ratio = significance(weight_deviation(BASE, state), BANDS.precision)["max_abs"]
    assert ratio.low < 1 < 10 < ratio.high


def test_tensors_weigh_as_much_as_they_have_elements() -> None:
    zero = {"large": torch.zeros(900), "small": torch.zeros(100)}
    found = weight_deviation(zero, {"large": torch.full((900,), 1.0), "small": torch.full((100,), 5.0)})
    whole = weight_deviation(zero, {name: torch.full_like(weight, 2.0) for name, weight in zero.items()})
    ratio = significance(found, whole)["w1"]
    assert ratio.value == pytest.approx((900 * 1 + 100 * 5) / 1000 / 2)
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 2.5))


def test_bands_that_rest_on_one_tensor_have_no_upper_end() -> None:
    """A sample without that tensor says nothing about the others, and nothing can be accepted."""
    zero = {name: torch.zeros(10) for name in ("a", "b", "c")}
    band = weight_deviation(zero, zero | {"a": torch.ones(10)})
    small = weight_deviation(zero, {name: torch.full((10,), 1e-3) for name in zero})
    verdict = contextualize(small, ReferenceBands(band, band), margin=1.0)
    assert verdict.outcome == "inconclusive"
    assert {ratio.high for ratio in verdict.ratios.values()} == {math.inf}
