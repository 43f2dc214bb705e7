"""Distances between weights: exact values, what they do not see, refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from attnkit._core.errors import DTypeError, InputError, OptionError, ShapeError
from attnkit.lab.numerics import WeightDeviation, wasserstein1d, weight_deviation

STATE = {"w": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": torch.tensor([0.0])}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assigned(a: Tensor, b: Tensor, p: float) -> float:
    """The definition for equal sizes: the cheapest of all assignments."""
    costs = [sum(abs(x - b[j]) ** p for x, j in zip(a, order, strict=True)) for order in itertools.permutations(range(len(b)))]
    return float((min(costs) / len(a)) ** (1 / p))


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (2, 3), (3, 1), (6, 4)])
def test_wasserstein_is_the_cheapest_assignment(n: int, m: int, p: float) -> None:
    a, b = drawn(n, n), drawn(10 + m, m) + 0.3
    size = math.lcm(n, m)
    want = assigned(a.repeat_interleave(size // n), b.repeat_interleave(size // m), p) if size <= 6 else None
    if want is None:  # 12 terms have too many assignments; the sorted one is the cheapest on a line
        pairs = zip(a.sort().values.repeat_interleave(2), b.sort().values.repeat_interleave(3), strict=True)
        want = float((sum(abs(x - y) ** p for x, y in pairs) / size) ** (1 / p))
    assert wasserstein1d(a, b, p) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (1000, 777), (1, 500)])
def test_wasserstein_is_that_of_scipy(n: int, m: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = drawn(0, n), 1.5 * drawn(1, m) - 0.2
    a[: n // 3] = a[0]  # ties
    assert wasserstein1d(a, b) == pytest.approx(float(stats.wasserstein_distance(a.numpy(), b.numpy())), rel=1e-12)


def test_wasserstein_of_shifted_scaled_and_permuted_values() -> None:
    a = drawn(0, 40, 5)
    assert wasserstein1d(a, a + 3) == pytest.approx(3)
    assert wasserstein1d(a, a + 3, p=2) == pytest.approx(3)
    assert wasserstein1d(a, 2 * a) == pytest.approx(float(a.abs().mean()))
    assert wasserstein1d(a, a.flatten()[torch.randperm(200)]) == 0
    assert wasserstein1d(a.bfloat16(), (a + 3).bfloat16()) == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize(
    ("a", "b", "p", "error", "message"),
    [
        (torch.ones(2), torch.ones(2), 0.5, OptionError, "p=0.5 is not allowed"),
        (torch.ones(2), torch.ones(2), math.inf, OptionError, "p=inf is not allowed"),
        (torch.ones(0), torch.ones(2), 1, InputError, "a is empty"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), 1, InputError, "b holds NaN or infinities"),
        (torch.ones(2), torch.ones(2, dtype=torch.complex64), 1, DTypeError, "b holds complex numbers"),
    ],
)
def test_wasserstein_refuses(a: Tensor, b: Tensor, p: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wasserstein1d(a, b, p)


def test_metrics_of_a_tensor_by_hand() -> None:
    other = {"w": torch.tensor([[2.0, 1.0], [3.0, 10.0]]), "b": torch.tensor([0.5])}
    start = {"w": torch.tensor([[1.0, 2.0], [3.0, 2.0]]), "b": torch.tensor([0.0])}
    w, b = weight_deviation(STATE, other, start).tensors
    std, update = math.sqrt((4 + 1 + 0 + 9) / 4), 2.0  # around the mean 3; one of four weights has moved by 4
    assert (w.name, w.numel, w.max_abs, w.w1) == ("w", 4, 4.0, 1.0)  # sorted values differ in the last one only
    assert (w.max_abs_std, w.w1_std) == pytest.approx((4 / std, 1 / std))
    assert (w.max_abs_update, w.w1_update) == (4 / update, 1 / update)
    assert (b.max_abs, b.w1, b.max_abs_std, b.max_abs_update) == (0.5, 0.5, math.inf, math.inf)


def test_totals_are_a_largest_and_a_mean_over_elements() -> None:
    other = {"w": STATE["w"] + 1, "b": STATE["b"] + 6}
    found = weight_deviation(STATE, other)
    assert found.total("max_abs") == 6
    assert found.total("w1") == pytest.approx((4 * 1 + 1 * 6) / 5)
    assert found.total("max_abs_update") is None
    assert found.total("w1_update") is None


def test_no_deviation_is_zero_in_every_unit() -> None:
    found = weight_deviation(STATE, STATE, STATE)
    assert [found.total(metric) for metric in ("max_abs", "w1", "max_abs_std", "w1_std", "max_abs_update", "w1_update")] == [
        0
    ] * 6


def test_w1_does_not_see_a_permutation_and_d_max_does() -> None:
    found = weight_deviation(STATE, STATE | {"w": STATE["w"].flip(0)})
    assert found.total("w1") == 0
    assert found.total("max_abs") == 4


def test_differences_are_taken_in_float64() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([1e-9])
    assert weight_deviation({"w": a}, {"w": b}).total("max_abs") == 1.0 - float(b.double())


@pytest.mark.parametrize(
    ("a", "b", "start", "error", "message"),
    [
        ({}, {}, None, InputError, "state_a has no tensors"),
        (STATE, {"w": STATE["w"], "c": STATE["b"]}, None, InputError, "b only in state_a, c only in state_b"),
        (
            STATE,
            STATE,
            {"w": STATE["w"]},
            InputError,
            "start is of another model than state_a: b only in state_a, nothing only",
        ),
        (STATE, STATE | {"b": torch.zeros(2)}, None, ShapeError, r"b has shapes \(1,\), \(2,\)"),
        (STATE, STATE | {"b": torch.tensor([math.inf])}, None, InputError, r"state_b\['b'\] holds NaN or infinities"),
        ({"b": torch.zeros(0)}, {"b": torch.zeros(0)}, None, InputError, r"state_a\['b'\] is empty"),
    ],
)
def test_refusals(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        weight_deviation(a, b, start)


def test_broadcasting_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        weight_deviation({"w": torch.ones(4, 1)}, {"w": torch.ones(4, 4)})


def test_order_of_names_does_not_matter() -> None:
    assert weight_deviation(STATE, dict(reversed(STATE.items()))) == WeightDeviation(weight_deviation(STATE, STATE).tensors)
