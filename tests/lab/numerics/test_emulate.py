"""The emulator: exact where nothing is rounded, and what each option does."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from numerics_examples import SEEDS, drawn, identical, rms
from torch import Tensor

from attnkit._core.errors import OptionError, UnsupportedError
from attnkit.lab.numerics.emulate import emulated_attention
from attnkit.lab.numerics.formats import BF16, E4M3, FP16, FP32, FP64, custom, round_to, ulp
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.inputs import DISTRIBUTIONS
from attnkit.lab.numerics.policy import BACKWARD_SITES, FORWARD_SITES, Rounding, SitePolicy
from attnkit.lab.numerics.recurrences import ALGORITHMS, Algorithm

EXACT = SitePolicy.preset("paper", FP64)
PAPER, KERNEL = (SitePolicy.preset(name, BF16) for name in ("paper", "kernel"))
TILED: tuple[Algorithm, ...] = ("fa1", "fa2", "lagged")
SHAPES: Mapping[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "causal, fewer keys than rows": {"causal": True, "keys": 50},
    "causal, more keys than rows": {"causal": True, "keys": 111},
    "masked": {"mask": True},
}


def posed(shape: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    options = dict(SHAPES[shape])
    inputs = drawn(FP64, 77, options.pop("keys", 77), heads=(4, 2), batch=2)
    if options.pop("mask", False):
        mask = torch.rand(2, 77, 77, generator=torch.Generator().manual_seed(1)) < 0.3
        mask[:, 5] = False
        options["mask"] = mask
    return inputs, options


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [EXACT, SitePolicy("none")], ids=lambda policy: policy.name)
def test_without_rounding_every_algorithm_is_exact(algorithm: Algorithm, shape: str, policy: SitePolicy) -> None:
    inputs, options = posed(shape)
    golden, lse = golden_attention(*inputs, **options, return_lse=True)
    out, stats = emulated_attention(*inputs, **options, policy=policy, algorithm=algorithm, block_k=16, return_stats=True)
    assert float((out - golden).norm() / golden.norm()) <= 4e-15
    torch.testing.assert_close(out, golden, rtol=0, atol=4e-15)
    torch.testing.assert_close(stats.lse, lse, rtol=0, atol=4e-14)


@pytest.mark.parametrize("algorithm", TILED)
@pytest.mark.parametrize(
    "option",
    [{"kv_order": "reverse"}, {"normalizer": "consistent"}, {"stable": "dynamic_max"}, {"shift": lambda m, n: m - 0.3 * n}],
    ids=lambda option: next(iter(option)),
)
def test_no_option_changes_exact_arithmetic(algorithm: Algorithm, option: dict[str, Any]) -> None:
    for shape in SHAPES:
        inputs, options = posed(shape)
        out = emulated_attention(*inputs, **options, policy=EXACT, algorithm=algorithm, block_k=16, **option)
        torch.testing.assert_close(out, golden_attention(*inputs, **options), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [2**10, 2**22])
def test_results_do_not_depend_on_how_many_rows_are_run_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn(BF16, 100, heads=(4, 2))
    expected = {name: emulated_attention(*inputs, policy=PAPER, algorithm=name, causal=True) for name in ALGORITHMS}
    monkeypatch.setattr("attnkit.lab.numerics.recurrences._TILE_ELEMENTS", size)
    monkeypatch.setattr("attnkit.lab.numerics.recurrences._ROW_ELEMENTS", size)
    for name in ALGORITHMS:
        assert identical(emulated_attention(*inputs, policy=PAPER, algorithm=name, causal=True), expected[name])


@pytest.mark.parametrize("algorithm", ["fa1", "fa2"])
def test_a_single_tile_of_a_kernel_errs_by_one_rounding_and_its_probabilities(algorithm: Algorithm) -> None:
    q, k, v = drawn(BF16, 128, batch=SEEDS)
    golden, scale = golden_attention(q, k, v), golden_attention(q, k, v.abs())
    error = (emulated_attention(q, k, v, policy=KERNEL, algorithm=algorithm, block_k=128) - golden).abs()
    assert (error <= 0.5 * ulp(golden, BF16) + BF16.roundoff * scale).all()
    exact_p = SitePolicy.preset("kernel", BF16, {"P": FP32})
    once = emulated_attention(q, k, v, policy=exact_p, algorithm=algorithm, block_k=128)
    assert ((once - golden).abs() <= 0.5 * ulp(golden, BF16) + 1e-6 * scale).all()
    assert ((once - golden).abs() > 0.4 * ulp(golden, BF16)).any()


def test_results_are_numbers_of_the_format() -> None:
    inputs = drawn(BF16, 100)
    for algorithm in ALGORITHMS:
        out = emulated_attention(*inputs, policy=KERNEL, algorithm=algorithm)
        assert out.dtype is torch.float64
        assert identical(round_to(out, BF16), out)


@pytest.mark.parametrize(("fmt", "last"), [(BF16, 256), (FP16, 2048)], ids=["bf16", "fp16"])
def test_a_low_precision_sum_stops_growing(fmt: Any, last: int) -> None:
    """Equal scores, one key at a time: after 2^p terms the next one is less than half a unit of the sum."""
    zeros = torch.zeros(1, 1, 1, 16), torch.zeros(1, 2500, 1, 16), torch.ones(1, 2500, 1, 16)
    for site, expected in (("l", last), ("P", 2500)):
        policy = SitePolicy("sum", {site: Rounding(fmt)})
        _, stats = emulated_attention(*zeros, policy=policy, algorithm="fa2", block_k=1, return_stats=True)
        assert stats.lse.item() == pytest.approx(math.log(expected))


def test_serial_accumulation_rounds_inside_products() -> None:
    q, k, v = drawn(BF16, 64, width=64, batch=SEEDS)
    golden = golden_attention(q, k, v)
    sizes = {}
    for block in (1, 16, 64):
        policy = SitePolicy("serial", {}, Rounding(BF16), block)
        sizes[block] = rms(emulated_attention(q, k, v, policy=policy, algorithm="fa2"), golden)
    assert (sizes[1] > sizes[16]).all()
    assert (sizes[16] > sizes[64]).all()
    every, paper = (SitePolicy.preset(name, BF16) for name in ("all", "paper"))
    out = emulated_attention(q, k, v, policy=every, algorithm="fa2")
    assert (rms(out, golden) > rms(emulated_attention(q, k, v, policy=paper, algorithm="fa2"), golden)).all()


def test_one_serial_product() -> None:
    policy = SitePolicy("serial", {}, Rounding(custom(4)), 2)
    a, b = torch.tensor([[10.0, 6.0, 0.9, 0.0, 0.9]], dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    assert policy.dot(a, b, None).item() == 16  # 16, 16.9 -> 16, 16.9 -> 16
    assert SitePolicy("exact").dot(a, b, None).item() == pytest.approx(17.8)


def test_lagged_follows_large_rises_only() -> None:
    inputs = drawn(BF16, 256, batch=2)
    counts = {}
    for lag in (0.0, 1.0, 8.0):
        out, stats = emulated_attention(*inputs, policy=KERNEL, algorithm="lagged", block_k=16, lag=lag, return_stats=True)
        counts[lag] = int(stats.rescales.sum())
        assert float(rms(out, golden_attention(*inputs)).max()) < 1e-3
    every = emulated_attention(*inputs, policy=KERNEL, algorithm="fa2", block_k=16, return_stats=True)
    assert identical(every[0], emulated_attention(*inputs, policy=KERNEL, algorithm="lagged", block_k=16, lag=0.0))
    assert counts[0.0] == int(every[1].rescales.sum())
    assert counts[0.0] > counts[1.0] > counts[8.0] == 0
    assert every[1].tiles == 16


def test_reverse_order_saves_narrow_probabilities_from_a_sink() -> None:
    """After a sink many other probabilities fall below what E4M3 can hold; visited first, they do not."""
    generator = torch.Generator().manual_seed(0)
    samples = [DISTRIBUTIONS["sink"].draw(generator, 256, 1, 32) for _ in range(SEEDS)]
    q, k, v = (round_to(torch.cat(parts).double(), BF16) for parts in zip(*samples, strict=True))
    golden = golden_attention(q, k, v)
    policy = SitePolicy.preset("kernel", BF16, {"P": E4M3})
    first, last = (
        rms(emulated_attention(q, k, v, policy=policy, algorithm="fa2", block_k=64, kv_order=order), golden)
        for order in ("forward", "reverse")
    )
    assert (first.square() > 3 * last.square()).all()


def test_stochastic_sites_are_unbiased_and_follow_their_generator() -> None:
    q, k, v = (t.expand(400, -1, -1, -1) for t in drawn(BF16, 8))
    policy = SitePolicy.preset("kernel", BF16, {"O_out": Rounding(custom(4), "sr")})
    runs = [
        emulated_attention(q, k, v, policy=policy, algorithm="fa2", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert identical(runs[0], runs[1])
    assert not identical(runs[0], runs[2])
    exact = emulated_attention(q, k, v, policy=SitePolicy.preset("kernel", BF16, {"O_out": None}), algorithm="fa2")
    error = (runs[0] - exact) / ulp(exact, custom(4))
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(error.numel())


# --- policies and refusals


def test_presets() -> None:
    paper, kernel, autocast, every = (
        SitePolicy.preset(name, BF16).sites for name in ("paper", "kernel", "autocast_ref", "all")
    )
    assert {site for site in kernel if kernel[site].format == BF16} == {"P", "O_out", "dS", "grad_out"}
    assert {site for site in autocast if autocast[site].format == FP32} == {"X", "P_sum", "alpha", "delta"}
    assert {rounding.format for rounding in paper.values()} == {BF16}
    assert paper == every
    assert SitePolicy.preset("kernel", FP64).sites["l"].format == FP64
    changed = SitePolicy.preset("kernel", BF16, {"P": None, "l": FP16, "m": Rounding(BF16, "rtz")}).sites
    assert "P" not in changed
    assert (changed["l"], changed["m"]) == (Rounding(FP16), Rounding(BF16, "rtz"))
    assert not set(FORWARD_SITES) & set(BACKWARD_SITES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"algorithm": "fa9"}, OptionError, "algorithm='fa9' is not allowed; choose one of 'baseline', 'fa1'"),
        ({"normalizer": "none"}, OptionError, "normalizer='none'"),
        ({"stable": "on"}, OptionError, "stable='on'"),
        ({"kv_order": "random"}, OptionError, "kv_order='random'"),
        ({"block_k": 0}, OptionError, "block_k=0 must be at least 1"),
        ({"lag": -1.0}, OptionError, "lag at least 0"),
        ({"stable": "dynamic_max", "beta": 1.0}, OptionError, r"beta=1\.0 must be above 1"),
        ({"stable": "dynamic_max", "shift": lambda m, n: m}, UnsupportedError, "shift is of use to calls without"),
        ({"beta": 4.0}, UnsupportedError, "beta is of use to stable='dynamic_max' only; leave it out"),
        ({"tie_eps": 1e-3}, UnsupportedError, "tie_eps is of use to shift and stable"),
        ({"lag": 1.0}, UnsupportedError, "lag is of use to algorithm='lagged' only"),
        ({"algorithm": "baseline", "kv_order": "reverse"}, UnsupportedError, "kv_order is of use"),
        ({"algorithm": "baseline", "shift": lambda m, n: m}, UnsupportedError, "shift is of use to tiled"),
        (
            {"algorithm": "baseline", "normalizer": "consistent"},
            UnsupportedError,
            "normalizer is of use to tiled algorithms only",
        ),
        ({"algorithm": "baseline", "stable": "delta"}, UnsupportedError, "stable is of use to tiled algorithms only"),
        ({"algorithm": "lagged", "lag": 128.0}, UnsupportedError, r"probabilities reach 2\^128; bf16 ends at"),
        ({"stable": "dynamic_max", "policy": SitePolicy.preset("kernel", FP16)}, UnsupportedError, "vanish in fp16; use bf16"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emulated_attention(*drawn(BF16, 8), **{"policy": KERNEL, "algorithm": "fa2"} | options)


def test_refusals_of_policies() -> None:
    with pytest.raises(OptionError, match="site='Q' is not allowed; choose one of 'S'"):
        SitePolicy("mine", {"Q": Rounding(BF16)})
    with pytest.raises(OptionError, match="site='Q' is not allowed"):
        SitePolicy.preset("paper", BF16, {"Q": None})
    with pytest.raises(OptionError, match="name='papers' is not allowed"):
        SitePolicy.preset("papers", BF16)
    with pytest.raises(OptionError, match="accum_block=0 must be at least 1"):
        SitePolicy("mine", accum_block=0)
