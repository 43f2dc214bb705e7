"""Biased rounding on tied maxima: who has it, and what removes it (dossier of Qiu & Yao 2025, arXiv:2510.04212)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.lab.numerics.emulate import emulated_attention
from attnkit.lab.numerics.formats import BF16, FP32, round_to
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.inputs import tied_maxima
from attnkit.lab.numerics.metrics import deviation
from attnkit.lab.numerics.policy import SitePolicy
from attnkit.lab.numerics.shift import dynamic_max_shift

AUTOCAST, KERNEL = (SitePolicy.preset(name, BF16) for name in ("autocast_ref", "kernel"))
DEEP = (12.0, 20.0)


def bias(
    policy: SitePolicy,
    *,
    ones: int = 2,
    depth: tuple[float, float] = DEEP,
    value_mean: float = -2.0,
    rows: int = 20_000,
    algorithm: Any = "fa2",
    **options: Any,
) -> float:
    """Mean signed error of the output in units in the last place."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = tied_maxima(generator, rows=rows, ones=ones, depth=depth, value_mean=value_mean)
    k, v = round_to(k, BF16), round_to(v, BF16)
    out = emulated_attention(q, k, v, policy=policy, algorithm=algorithm, scale=1.0, **options)
    return deviation(out, golden_attention(q, k, v, scale=1.0), BF16).bias_ulp


def test_16_bit_partial_outputs_are_biased_away_from_zero() -> None:
    assert -0.25 <= bias(AUTOCAST) <= -0.15
    assert 0.15 <= bias(AUTOCAST, value_mean=2.0) <= 0.25
    assert abs(bias(AUTOCAST, value_mean=0.0)) <= 0.03
    assert abs(bias(AUTOCAST, depth=(5.0, 9.0))) <= 0.03


@pytest.mark.parametrize("beta", [2.0, 4.0, 7.0])
def test_the_dynamic_maximum_removes_the_bias(beta: float) -> None:
    assert abs(bias(AUTOCAST, stable="dynamic_max", beta=beta)) <= 0.03


@pytest.mark.parametrize("ones", [2, 3, 4, 8])
@pytest.mark.parametrize("depth", [(5.0, 9.0), (8.0, 14.0), DEEP])
@pytest.mark.parametrize("value_mean", [-2.0, 0.0, 2.0])
def test_kernels_are_not_biased(ones: int, depth: tuple[float, float], value_mean: float) -> None:
    suite = {"ones": ones, "depth": depth, "value_mean": value_mean}
    assert abs(bias(KERNEL, **suite)) <= 0.03
    assert abs(bias(KERNEL, **suite, shift=_lagging, normalizer="consistent")) <= 0.03


def test_a_maximum_that_lags_needs_the_consistent_normaliser() -> None:
    assert abs(bias(KERNEL, shift=_lagging)) >= 0.15
    assert abs(bias(KERNEL, shift=_lagging, normalizer="consistent")) <= 0.03


def test_so_does_the_dynamic_maximum_of_a_kernel() -> None:
    assert abs(bias(KERNEL, stable="dynamic_max", beta=7.0)) >= 0.15
    assert abs(bias(KERNEL, stable="dynamic_max", beta=7.0, normalizer="consistent")) <= 0.03


def test_a_fixed_offset_does_not_help_where_the_sum_is_exact() -> None:
    exact_sum = SitePolicy.preset("autocast_ref", BF16, {"l": FP32, "m": FP32})
    assert abs(bias(exact_sum, shift=lambda row_max, ties: row_max + 0.5)) >= 0.2
    assert abs(bias(exact_sum, shift=lambda row_max, ties: row_max + 0.5, normalizer="consistent")) <= 0.03


def _lagging(row_max: Tensor, ties: Tensor) -> Tensor:
    return row_max - 0.3


def test_lagging_by_order_of_the_tiles() -> None:
    """The same as `lagged` has it: the first tile sets a maximum that the tied keys of the second exceed a little."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = tied_maxima(generator, rows=20_000, keys=32)
    early = torch.full_like(k, -12.0)
    early[:, 0] = 4.0 - 0.3
    v_early = v[:, :2].mean(1, keepdim=True).expand_as(v)  # else the rounded share of this key would count as bias too
    k, v = (round_to(torch.cat(parts, 1), BF16) for parts in ((early, k), (v_early, v)))
    golden = golden_attention(q, k, v, scale=1.0)
    found = {}
    for normalizer in ("exact", "consistent"):
        out = emulated_attention(
            q,
            k,
            v,
            policy=KERNEL,
            algorithm="lagged",
            block_k=32,
            scale=1.0,
            normalizer=normalizer,
        )
        found[normalizer] = abs(deviation(out, golden, BF16).bias_ulp)
    assert found["exact"] >= 0.1
    assert found["consistent"] <= 0.03


# --- the dynamic maximum itself


def test_dynamic_maximum() -> None:
    top = torch.tensor([2.0, 2.0, 20.0, 1e4, -5.0, -120.0, -5.0, 0.0, -1e-9, -torch.inf], dtype=torch.float64)
    ties = torch.tensor([2, 1, 3, 2, 2, 2, 1, 2, 2, 0])
    expected = [8.0, 2.0, 50.0, 1e4 + 30, 0.0, -90.0, -5.0, 1.0, 1.0, -torch.inf]
    assert dynamic_max_shift(top, ties, 4.0).tolist() == expected
    assert dynamic_max_shift(top, ties, 4.0, cap=10.0).tolist()[2:6] == [30.0, 1e4 + 10, 0.0, -110.0]


@pytest.mark.parametrize(("beta", "cap"), [(1.0, 30.0), (float("nan"), 30.0), (2.0, 0.0)])
def test_refusals(beta: float, cap: float) -> None:
    with pytest.raises(OptionError, match="must be above 1"):
        dynamic_max_shift(torch.zeros(1), torch.ones(1), beta, cap)
    with pytest.raises(OptionError, match=r"ones=5 must lie in 1\.\.4"):
        tied_maxima(torch.Generator(), rows=1, keys=4, ones=5)


@pytest.mark.parametrize("top", [0.0, -120.0, 1e4, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_tied_rows_keep_their_value_through_the_dynamic_maximum(top: float, causal: bool) -> None:
    """All scores equal, or all negative, or huge: also where hidden tiles would look like ties."""
    generator = torch.Generator().manual_seed(0)
    _, k, v = tied_maxima(generator, rows=2, keys=50, ones=3, top=top)
    q = torch.ones(2, 50, 1, 1, dtype=torch.float64)
    options: dict[str, Any] = {"causal": causal, "scale": 1.0}
    golden = golden_attention(q, k, v, **options)
    for policy, error in ((SitePolicy("exact"), 1e-14), (KERNEL, 0.02)):
        out = emulated_attention(
            q, k, v, policy=policy, algorithm="fa2", block_k=16, stable="dynamic_max", normalizer="consistent", **options
        )
        torch.testing.assert_close(out, golden, rtol=error, atol=0)


def test_close_scores_count_as_ties_on_request() -> None:
    scores = torch.tensor([4.0, 3.9995, -9.0], dtype=torch.float64)[None, :, None, None]
    q, v = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 3, 1, 1, dtype=torch.float64)
    seen: list[int] = []

    def count(row_max: Tensor, ties: Tensor) -> Tensor:
        seen.append(int(ties))
        return row_max

    for tie_eps in (0.0, 1e-3):
        emulated_attention(q, scores, v, policy=SitePolicy("exact"), algorithm="fa2", scale=1.0, shift=count, tie_eps=tie_eps)
    assert seen == [1, 2]
