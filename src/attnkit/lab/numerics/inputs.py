"""Inputs on which deviation is measured: named distributions, and rows whose maximum is shared by several keys."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit._core.registry import Registry

__all__ = ["DISTRIBUTIONS", "Distribution", "tied_maxima"]

Draw = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Distribution:
    """A distribution of attention inputs.

    Attributes:
        summary: one line.
        draw: (CPU generator, tokens, heads, head width) -> q, k, v of shape [1, T, H, D] in float32.
    """

    summary: str
    draw: Draw


def _normal(generator: torch.Generator, length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, length, heads, width, generator=generator) for _ in range(3))
    return q, k, v


def _outliers(generator: torch.Generator, length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    def spiked() -> Tensor:
        x, spike = (torch.randn(1, length, heads, width, generator=generator) for _ in range(2))
        return x + 10 * spike * (torch.rand(x.shape, generator=generator) < 0.001)

    return spiked(), spiked(), spiked()


def _value_mean(generator: torch.Generator, length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _normal(generator, length, heads, width)
    return q, k, 1 + 0.3 * v


def _peaked(generator: torch.Generator, length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _normal(generator, length, heads, width)
    return 3 * q, k, v


def _sink(generator: torch.Generator, length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every query scores the first key about 10 above the others; its value is small, as those of attention sinks are."""
    q, k, v = _normal(generator, length, heads, width)
    q[..., 0] = 4
    k[..., 0] = 0
    k[:, 0] = 0
    k[:, 0, :, 0] = 2.5 * width**0.5
    v[:, 0] *= 0.01
    return q, k, v


DISTRIBUTIONS: Registry[Distribution] = Registry("input distribution")
for _name, _summary, _draw in (
    ("normal", "q, k, v ~ N(0, 1)", _normal),
    ("outliers", "N(0, 1), and one element in a thousand with N(0, 100) added", _outliers),
    ("value-mean", "normal scores, v ~ N(1, 0.3^2)", _value_mean),
    ("peaked", "normal with q three times as large: few keys matter", _peaked),
    ("sink", "normal, and a first key whose scores are 10 above, with a small value", _sink),
):
    DISTRIBUTIONS.register(_name, Distribution(_summary, _draw))


def tied_maxima(
    generator: torch.Generator,
    *,
    rows: int,
    keys: int = 64,
    ones: int = 2,
    depth: tuple[float, float] = (12.0, 20.0),
    top: float = 4.0,
    value_mean: float = -2.0,
    value_std: float = 0.6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that show biased rounding: some keys share the maximum, the others lie far below, values have one sign.

    Args:
        generator: on the CPU.
        rows: how many; each has keys and values of its own.
        keys: of a row.
        ones: how many of them, the first ones, score `top`.
        depth: how far below it the others lie, uniformly between the two.
        top: the largest score.
        value_mean, value_std: of the normal values.
    Returns:
        q [rows, 1, 1, 1], k and v [rows, keys, 1, 1] in float64; with scale=1 scores are k.
    Raises:
        OptionError: not 1 <= ones <= keys.
    Source: Qiu & Yao 2025 (arXiv:2510.04212), section 3.3.2.
    """
    if not 1 <= ones <= keys:
        raise OptionError(f"ones={ones} must lie in 1..{keys}, the keys")
    low, high = depth
    fall = low + (high - low) * torch.rand(rows, keys, generator=generator, dtype=torch.float64)
    fall[:, :ones] = 0
    v = value_mean + value_std * torch.randn(rows, keys, generator=generator, dtype=torch.float64)
    return torch.ones(rows, 1, 1, 1, dtype=torch.float64), (top - fall)[..., None, None], v[..., None, None]
