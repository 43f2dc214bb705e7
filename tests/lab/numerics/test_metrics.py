"""The metrics, each on errors made by hand, and which site is to blame."""

import math

import pytest
import torch
from numerics_examples import drawn

from attnkit._core.errors import InputError, OptionError, ShapeError
from attnkit.lab.numerics.formats import BF16, FP32, FP64, FloatFormat, round_to
from attnkit.lab.numerics.metrics import attribute_sites, deviation
from attnkit.lab.numerics.policy import SitePolicy

UNIT = 2.0**-7  # of bf16 between 1 and 2


def test_metrics_by_hand() -> None:
    golden = torch.tensor([[1.0, 1.5], [4.0, 1.0]], dtype=torch.float64)
    error = torch.tensor([[1.0, -2.0], [4.0, 0.0]], dtype=torch.float64) * UNIT
    found = deviation(golden + error, golden, BF16, row_scale=torch.full_like(golden, 8.0))
    assert found.max_abs == 4 * UNIT
    assert found.mean_abs == 7 / 4 * UNIT
    assert found.rms == pytest.approx(math.sqrt(21 / 4) * UNIT)
    assert found.rel_fro == pytest.approx(math.sqrt(21 / 20.25) * UNIT)
    assert (found.ulp_max, found.ulp_mean, found.bias_ulp) == (2, 1, 0)  # 1, -2, 1, 0
    assert found.ulp_row_max == 0.5
    assert found.ulp_p99 == 2
    assert found.z == 0
    a, b = (golden + error).flatten(), golden.flatten()
    assert found.cos == pytest.approx(1 - float(a @ b / a.norm() / b.norm()), rel=1e-6)


def test_a_correctly_rounded_result() -> None:
    golden = torch.randn(2000, 8, dtype=torch.float64)
    found = deviation(round_to(golden, BF16), golden, BF16)
    assert 0.49 < found.ulp_max <= 0.5
    assert found.ulp_p99 == pytest.approx(0.495, abs=0.002)
    assert found.bits_lost == pytest.approx(0)
    assert abs(found.bias_ulp) < 0.01
    assert abs(found.z) < 4
    assert deviation(golden + 4 * (round_to(golden, BF16) - golden), golden, BF16).bits_lost == pytest.approx(2)


def test_a_bias_is_seen_and_rows_are_its_samples() -> None:
    golden = 1 + torch.rand(400, 16, dtype=torch.float64)
    noise = torch.randn(400, 1, dtype=torch.float64).expand(400, 16)  # shared by the elements of a row
    found = deviation(golden + UNIT * (0.2 + noise), golden, BF16)
    assert found.bias_ulp == pytest.approx(0.2 + float(noise.mean()))
    assert found.z == pytest.approx(found.bias_ulp / (float(noise[:, 0].std(correction=0)) / 20))


def test_the_angle_does_not_cancel() -> None:
    golden = torch.ones(1, 2, dtype=torch.float64)
    out = golden + torch.tensor([1e-12, -1e-12], dtype=torch.float64)
    assert deviation(out, golden, FP32).cos == pytest.approx(5e-25, rel=1e-3)


def test_what_cannot_be_compared() -> None:
    golden = torch.ones(2, 3, dtype=torch.float64)
    exact = deviation(golden, golden, BF16)
    assert math.isnan(exact.bits_lost)
    assert math.isnan(exact.z)
    assert exact.ulp_max == 0
    assert math.isnan(deviation(golden * math.nan, golden, BF16).max_abs)
    with pytest.raises(ShapeError, match=r"golden has shape \(2, 3\) and out has \(3, 2\)"):
        deviation(golden.T, golden, BF16)
    with pytest.raises(ShapeError, match="row_scale has shape"):
        deviation(golden, golden, BF16, golden[:1])
    for wrong in (golden[:0], golden / 0):
        with pytest.raises(InputError, match="golden is empty or not finite"):
            deviation(wrong, wrong, BF16)


@pytest.mark.parametrize("fmt", [BF16, FP64], ids=lambda fmt: fmt.name)
def test_one_site_in(fmt: FloatFormat) -> None:
    inputs = drawn(BF16, 256)
    found = attribute_sites(*inputs, SitePolicy.preset("paper", fmt), BF16, block_k=16)
    assert list(found) == ["S_scale", "X", "P", "P_sum", "m", "alpha", "l", "O_acc", "O_out", "all"]
    if fmt == FP64:
        assert all(row.rms < 1e-15 for row in found.values())
        return
    largest = max((site for site in found if site != "all"), key=lambda site: found[site].rms)
    assert largest == "O_acc"
    assert found["O_out"].ulp_max <= 0.5
    assert found["m"].rms < 1e-15  # what is subtracted cancels, as long as everybody subtracts it


def test_one_site_out() -> None:
    inputs = drawn(BF16, 256)
    found = attribute_sites(*inputs, SitePolicy.preset("paper", BF16), BF16, mode="one_out", block_k=16)
    assert min(found, key=lambda site: found[site].rms) == "O_acc"
    assert found["O_acc"].rms < 0.8 * found["all"].rms


def test_the_accumulator_is_a_site_of_its_own() -> None:
    inputs, policy = drawn(BF16, 64), SitePolicy.preset("all", BF16)
    found = attribute_sites(*inputs, policy, BF16, block_k=16)
    assert list(found)[-2:] == ["accumulator", "all"]
    assert found["m"].rms < 1e-15
    assert found["accumulator"].rms > found["P"].rms
    without = attribute_sites(*inputs, policy, BF16, mode="one_out", block_k=16)["accumulator"]
    assert without == attribute_sites(*inputs, SitePolicy.preset("paper", BF16), BF16, block_k=16)["all"]


def test_the_baseline_has_three_sites() -> None:
    found = attribute_sites(*drawn(BF16, 64), SitePolicy.preset("paper", BF16), BF16, algorithm="baseline")
    assert list(found) == ["S_scale", "P", "O_out", "all"]
    with pytest.raises(OptionError, match="mode='both' is not allowed"):
        attribute_sites(*drawn(BF16, 8), SitePolicy.preset("paper", BF16), BF16, mode="both")
