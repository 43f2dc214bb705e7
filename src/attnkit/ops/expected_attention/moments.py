"""Mean and covariance of queries at positions to come: the average of a Gaussian over rotations, in closed form."""

import torch
from torch import Tensor

from attnkit._core.checks import check_choice, check_dtype
from attnkit._core.errors import OptionError, ShapeError

__all__ = ["future_query_moments"]


def future_query_moments(
    mean: Tensor,
    cov: Tensor | None,
    *,
    inv_freq: Tensor | None,
    start: int | Tensor,
    horizon: int = 512,
    rope: str = "moment",
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Moments of queries after rotation, over the positions start, ..., start + horizon - 1.

    With R_t the rotation at position t and E the average over positions, the mean becomes E[R_t] mean. The covariance is
    "moment": E[R_t (cov + mean mean^T) R_t^T] less the outer product of the new mean, which is that of the mixture, or
    "mean": E[R_t] cov E[R_t]^T, which leaves out what rotation itself spreads.

    Args:
        mean: [..., D] of queries before rotation, float32 or float64, D even.
        cov: [..., D, D], symmetric; None where only the mean is wanted.
        inv_freq: [R / 2] radians a token, R <= D even: the first R channels turn, the rest stays. None turns nothing.
        start: the first position, an int or [B] integers where the first dimension of `mean` is B.
        horizon: how many positions.
        rope: "moment" or "mean".
        attention_factor: cos and sin are multiplied by it (YaRN).
        interleaved: channel 2i turns with 2i + 1; otherwise i with i + R / 2.
    Returns:
        mean and covariance in the shapes and dtype given; angles are computed in float64.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
    Source: Devoto et al. 2025 (arXiv:2510.00636), equations 5 to 7, for "mean"; the law of total covariance for "moment".
    """
    _check(mean, cov, inv_freq, start, horizon, rope)
    if inv_freq is None:
        return mean, cov
    order = _pairs(mean.shape[-1], 2 * len(inv_freq), interleaved, mean.device)
    turn, apart, together = _multipliers(inv_freq, mean, start, horizon, rope, attention_factor)
    first, second = mean[..., order].chunk(2, dim=-1)
    mean_turned = torch.complex(first, second) * turn
    back = order.argsort()
    mean_out = torch.cat([mean_turned.real, mean_turned.imag], -1)[..., back]
    if cov is None:
        return mean_out, None
    total = _turned(cov[..., order, :][..., order], apart, together)
    if rope == "moment":
        # E[R_t m m^T R_t^T] - E[R_t] m m^T E[R_t]^T with the difference taken of multipliers, which are float64
        z = torch.complex(first, second)
        apart_mean, together_mean = _multipliers(inv_freq, mean, start, horizon, "mean", attention_factor)[1:]
        own = z[..., :, None] * z[..., None, :].conj() * (apart - apart_mean).to(z.dtype)
        mirrored = z[..., :, None] * z[..., None, :] * (together - together_mean).to(z.dtype)
        total = total + _blocks(own, mirrored)
    return mean_out, total[..., back, :][..., back]


def _check(mean: Tensor, cov: Tensor | None, inv_freq: Tensor | None, start: int | Tensor, horizon: int, rope: str) -> None:
    check_dtype("mean", mean, torch.float32, torch.float64)
    check_choice("rope", rope, ("moment", "mean"))
    width = mean.shape[-1]
    if cov is not None:
        check_dtype("cov", cov, mean.dtype)
        if cov.shape != (*mean.shape, width):
            raise ShapeError(f"cov has shape {tuple(cov.shape)}; expected {(*mean.shape, width)}, as mean has D = {width}")
    if inv_freq is not None and (inv_freq.dim() != 1 or 2 * len(inv_freq) > width or width % 2):
        raise ShapeError(
            f"inv_freq has shape {tuple(inv_freq.shape)}; expected one number for each of at most {width // 2} pairs of "
            f"channels, and an even D (it is {width})"
        )
    if isinstance(start, Tensor) and start.shape != mean.shape[:1]:
        raise ShapeError(f"start has shape {tuple(start.shape)}; expected {tuple(mean.shape[:1])}, or give an int")
    if horizon < 1:
        raise OptionError(f"horizon={horizon} is below 1; the average is over at least one position")


def _pairs(width: int, turning: int, interleaved: bool, device: torch.device) -> Tensor:
    """[D] channels: one of each pair, then their partners; channels that stay are paired as they come."""
    channel = torch.arange(width, device=device)
    inside, rest = channel[:turning], channel[turning:]
    pairs = inside.view(-1, 2).T if interleaved else inside.view(2, -1)
    return torch.cat([pairs, rest.view(2, -1)], dim=1).flatten()


def _multipliers(
    inv_freq: Tensor, mean: Tensor, start: int | Tensor, horizon: int, rope: str, attention_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages of exp(i t w_a), exp(i t (w_a - w_b)) and exp(i t (w_a + w_b)), broadcast against `mean` and `cov`."""
    half = mean.shape[-1] // 2
    freq = torch.zeros(half, dtype=torch.float64, device=mean.device)
    freq[: len(inv_freq)] = inv_freq
    size = torch.ones_like(freq)
    size[: len(inv_freq)] = attention_factor
    middle = start + (horizon - 1) / 2
    if isinstance(middle, Tensor):
        middle = middle.to(mean.device, torch.float64).view(-1, *(1,) * (mean.dim() - 1))

    def average(angle: Tensor, middle: float | Tensor) -> Tensor:
        small = torch.sin(angle / 2)
        level = small.abs() < 1e-12
        length = torch.sin(horizon * angle / 2) / (horizon * small).masked_fill(level, 1)
        return torch.polar(length.masked_fill(level, 1), angle * middle)

    turn = average(freq, middle) * size
    kind = torch.complex64 if mean.dtype == torch.float32 else torch.complex128
    if rope == "mean":
        return turn.to(kind), turn[..., :, None] * turn[..., None, :].conj(), turn[..., :, None] * turn[..., None, :]
    if isinstance(middle, Tensor):
        middle = middle[..., None]
    both = size[:, None] * size
    return turn.to(kind), average(freq[:, None] - freq, middle) * both, average(freq[:, None] + freq, middle) * both


def _turned(cov: Tensor, apart: Tensor, together: Tensor) -> Tensor:
    """A symmetric matrix over [first, second] channels as z z^H and z z^T of z = first + i second, each multiplied."""
    half = cov.shape[-1] // 2
    xx, xy, yx, yy = cov[..., :half, :half], cov[..., :half, half:], cov[..., half:, :half], cov[..., half:, half:]
    own = torch.complex(xx + yy, yx - xy)
    return _blocks(own * apart.to(own.dtype), torch.complex(xx - yy, yx + xy) * together.to(own.dtype))


def _blocks(own: Tensor, mirrored: Tensor) -> Tensor:
    """The real matrix whose z z^H and z z^T these are."""
    added, less = own + mirrored, own - mirrored
    upper = torch.cat([added.real, -less.imag], -1)
    return torch.cat([upper, torch.cat([added.imag, less.real], -1)], -2) / 2
