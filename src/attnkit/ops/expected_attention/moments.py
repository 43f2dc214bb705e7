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
    turn, sums = _multipliers(inv_freq, mean, start, horizon, attention_factor, pairs=cov is not None and rope == "moment")
    z = torch.complex(*mean[..., order].chunk(2, dim=-1))
    mean_turned = z * turn.to(z.dtype)
    back = order.argsort()
    mean_out = torch.cat([mean_turned.real, mean_turned.imag], -1)[..., back]
    if cov is None:
        return mean_out, None
    flat = torch.stack([turn[..., :, None] * turn[..., None, :].conj(), turn[..., :, None] * turn[..., None, :]])
    own, mirrored = _pair_products(cov[..., order, :][..., order])
    used = flat if sums is None else sums
    own, mirrored = own * used[0].to(z.dtype), mirrored * used[1].to(z.dtype)
    if sums is not None:
        # E[R_t m m^T R_t^T] - E[R_t] m m^T E[R_t]^T with the difference taken of multipliers, which are float64
        apart, together = (sums - flat).to(z.dtype)
        own = own + z[..., :, None] * z[..., None, :].conj() * apart
        mirrored = mirrored + z[..., :, None] * z[..., None, :] * together
    total = _blocks(own, mirrored)
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
    inv_freq: Tensor, mean: Tensor, start: int | Tensor, horizon: int, attention_factor: float, *, pairs: bool
) -> tuple[Tensor, Tensor | None]:
    """Averages of exp(i t w_a), broadcast against `mean`; with `pairs` those of exp(i t (w_a -+ w_b)), [2, ...], against `cov`.

    All angles go through one pass: on a GPU tables of this size cost their launches.
    """
    half = mean.shape[-1] // 2
    freq = torch.zeros(half, dtype=torch.float64, device=mean.device)
    freq[: len(inv_freq)] = inv_freq
    size = torch.ones_like(freq)
    size[: len(inv_freq)] = attention_factor
    angle = freq[None]
    if pairs:
        angle = torch.cat([angle, freq[:, None] - freq, freq[:, None] + freq])  # [1 + 2 D / 2, D / 2]
    middle = start + (horizon - 1) / 2
    if isinstance(middle, Tensor):
        middle = middle.to(mean.device, torch.float64).view(-1, *(1,) * mean.dim())
    small = torch.sin(angle / 2)
    level = small.abs() < 1e-12
    length = torch.sin(horizon * angle / 2) / (horizon * small).masked_fill(level, 1)
    average = torch.polar(length.masked_fill(level, 1).expand((angle * middle).shape), angle * middle)
    turn = average[..., 0, :] * size
    if not pairs:
        return turn, None
    return turn, average[..., 1:, :].unflatten(-2, (2, half)).movedim(-3, 0) * (size[:, None] * size)


def _pair_products(cov: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix over [first, second] channels as z z^H and z z^T of z = first + i second."""
    half = cov.shape[-1] // 2
    xx, xy, yx, yy = cov[..., :half, :half], cov[..., :half, half:], cov[..., half:, :half], cov[..., half:, half:]
    return torch.complex(xx + yy, yx - xy), torch.complex(xx - yy, yx + xy)


def _blocks(own: Tensor, mirrored: Tensor) -> Tensor:
    """The real matrix whose z z^H and z z^T these are."""
    added, less = own + mirrored, own - mirrored
    upper = torch.cat([added.real, -less.imag], -1)
    return torch.cat([upper, torch.cat([added.imag, less.real], -1)], -2) / 2
