"""The emulated backward pass: exact without roundings, and what becomes of the row sums of dS."""

from typing import Any

import pytest
import torch
from numerics_examples import drawn, identical
from torch import Tensor

from attnkit._core.errors import UnsupportedError
from attnkit.lab.numerics.emulate import Normalizer, Stable, emulated_attention
from attnkit.lab.numerics.formats import BF16, FP32, FP64, custom, round_to
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.policy import Rounding, SitePolicy
from attnkit.lab.numerics.recurrences import ALGORITHMS, Algorithm

STABLE: tuple[Stable, ...] = ("off", "delta", "exact_delta", "dynamic_max")


def gradients(inputs: Any, policy: SitePolicy, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = emulated_attention(*leaves, policy=policy, **options)
    return torch.autograd.grad((out * _weight(out)).sum(), leaves)


def expected(inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = golden_attention(*leaves, **options)
    return torch.autograd.grad((out * _weight(out)).sum(), leaves)


def _weight(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return round_to(torch.randn(out.shape, generator=generator, dtype=torch.float64), BF16)


def masked() -> Tensor:
    mask = torch.rand(2, 50, 70, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, 7] = False
    return mask


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": masked()}, {"scale": 0.3}], ids=lambda o: next(iter(o), ""))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_rounding_gradients_are_exact(algorithm: Algorithm, options: dict[str, Any]) -> None:
    inputs = drawn(FP64, 50, 70, heads=(4, 2), batch=2)
    for stable in STABLE if algorithm != "baseline" else STABLE[:1]:
        got = gradients(
            inputs, SitePolicy.preset("paper", FP64), algorithm=algorithm, block_q=16, block_k=24, stable=stable, **options
        )
        torch.testing.assert_close(got, expected(inputs, **options), rtol=0, atol=1e-13)


@pytest.mark.parametrize("preset", ["kernel", "autocast_ref"])
@pytest.mark.parametrize("stable", STABLE)
def test_rounded_gradients_are_near_and_numbers_of_the_format(preset: Any, stable: Stable) -> None:
    inputs = drawn(BF16, 64, heads=(4, 2))
    got = gradients(
        inputs, SitePolicy.preset(preset, BF16), algorithm="fa2", block_q=16, block_k=16, stable=stable,
        normalizer="consistent", causal=True,
    )  # fmt: skip
    limit = 0.006 if preset == "kernel" else 0.03
    for ours, exact in zip(got, expected(inputs, causal=True), strict=True):
        assert identical(round_to(ours, BF16), ours)
        assert float((ours - exact).norm() / exact.norm()) < limit


TOUCHED = {
    "S_scale": "qkv", "P": "v", "delta": "qk", "dP": "qk", "dS": "qk", "dQ_acc": "q", "dK_acc": "k", "dV_acc": "v",
    "grad_out": "qkv",
}  # fmt: skip


@pytest.mark.parametrize("site", TOUCHED)
def test_a_site_of_the_backward_pass_changes_the_gradients_that_it_is_part_of(site: str) -> None:
    inputs = drawn(BF16, 32)
    options: dict[str, Any] = {"algorithm": "fa2", "block_q": 16, "block_k": 16, "stable": "exact_delta"}
    exact = gradients(inputs, SitePolicy("exact"), **options)
    got = gradients(inputs, SitePolicy("one site", {site: Rounding(custom(4))}), **options)
    assert "".join(name for name, a, b in zip("qkv", got, exact, strict=True) if not identical(a, b)) == TOUCHED[site]


def test_the_gradients_of_the_baseline_come_from_the_probabilities_that_it_has_stored() -> None:
    inputs, policy = drawn(BF16, 32), SitePolicy("one site", {"P": Rounding(custom(4))})
    exact, got = (gradients(inputs, chosen, algorithm="baseline") for chosen in (SitePolicy("exact"), policy))
    assert not any(identical(a, b) for a, b in zip(got, exact, strict=True))


def leak(stable: Stable, normalizer: Normalizer = "exact", **sites: Any) -> float:
    """Size of the row sums of dS, which are zero in exact arithmetic: where all keys agree in one element, dQ shows them."""
    q, k, v = drawn(BF16, 128, width=32)
    k[..., 0] = 1.0
    v = round_to(v + 2, BF16)
    policy = SitePolicy.preset("kernel", BF16, {"dS": FP32, "grad_out": None} | sites)
    dq, _, _ = gradients((q, k, v), policy, algorithm="fa2", block_k=32, stable=stable, normalizer=normalizer)
    return float(dq[..., 0].square().mean().sqrt())


def test_the_row_sums_of_the_score_gradients_leak_through_a_16_bit_output() -> None:
    plain = leak("off")
    assert leak("exact_delta") < plain / 1000
    assert leak("delta", P=FP32) < plain / 50


def test_a_split_output_leaves_the_leak_that_rounded_probabilities_make() -> None:
    """The output then comes from other probabilities than the gradient; summing the same ones makes it smaller."""
    plain = leak("off")
    split, consistent = leak("delta"), leak("delta", normalizer="consistent")
    assert plain / 50 < split < plain / 5
    assert consistent < split / 1.5
    assert leak("off", O_out=FP32) == pytest.approx(split, rel=0.05)


def test_tiles_of_rows_matter_to_gradients_of_keys_and_values_only() -> None:
    inputs = drawn(BF16, 64)
    policy = SitePolicy.preset("paper", BF16)
    first, second = (gradients(inputs, policy, algorithm="fa2", block_q=size, block_k=16) for size in (8, 64))
    assert identical(first[0], second[0])
    assert not identical(first[1], second[1])
    assert not identical(first[2], second[2])


def test_inputs_that_were_changed_since_and_second_derivatives_are_refused() -> None:
    q, k, v = (t.requires_grad_() for t in drawn(FP64, 8))
    out = emulated_attention(q, k, v, policy=SitePolicy("exact"), algorithm="fa2")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    out = emulated_attention(q, k, v, policy=SitePolicy("exact"), algorithm="fa2")
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("algorithm", "site"), [("fa2", "S_scale"), ("fa2", "S"), ("baseline", "P")])
def test_what_would_be_drawn_again_is_refused(algorithm: Algorithm, site: str) -> None:
    policy = SitePolicy("stochastic", {site: Rounding(BF16, "sr")})
    with pytest.raises(UnsupportedError, match=f"site {site} rounds stochastically"):
        gradients(drawn(BF16, 8), policy, algorithm=algorithm)
