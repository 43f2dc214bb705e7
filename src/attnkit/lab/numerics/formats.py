"""Number formats and rounding to them, exact to the last bit, in tensors of a wider dtype."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnkit._core.checks import check_choice, check_dtype
from attnkit._core.errors import DTypeError, OptionError
from attnkit._core.registry import Registry

__all__ = [
    "BF16", "E4M3", "E5M2", "FORMATS", "FP16", "FP32", "FP64", "TF32", "FloatFormat", "Mode", "custom", "parse_format",
    "round_to", "ulp",
]  # fmt: skip

Mode = Literal["rne", "rtz", "rna", "up", "down", "sr"]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: as `parse_format` takes it.
        p: significant bits, the hidden one included; the unit roundoff is 2^-p.
        emin, emax: exponents of the smallest and the largest normal numbers, whose size lies in 2^emin .. 2^(emax + 1).
        has_inf: whether there are infinities. Without them (E4M3) the topmost code is NaN, the largest number is the one
            below it, and what overflows becomes NaN.
        saturate: what overflows, infinities included, becomes the largest number instead.
        subnormals: whether there are numbers below 2^emin; without them they become zero.
    Raises:
        OptionError: p outside 2..53, or emin above emax or either outside float64's -1022..1023.
    """

    name: str
    p: int
    emin: int
    emax: int
    has_inf: bool = True
    saturate: bool = False
    subnormals: bool = True

    def __post_init__(self) -> None:
        if not (2 <= self.p <= 53 and -1022 <= self.emin <= self.emax <= 1023):
            raise OptionError(
                f"format {self.name!r} has p={self.p}, emin={self.emin}, emax={self.emax}; "
                "p must lie in 2..53 and -1022 <= emin <= emax <= 1023"
            )

    @property
    def max(self) -> float:
        """The largest finite number."""
        return (2 - 2.0 ** ((1 if self.has_inf else 2) - self.p)) * 2.0**self.emax

    @property
    def tiny(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (self.emin - (self.p - 1 if self.subnormals else 0))

    @property
    def roundoff(self) -> float:
        """Largest relative error of rounding to nearest, 2^-p."""
        return 2.0**-self.p


FORMATS: Registry[FloatFormat] = Registry("number format")
FP64 = FORMATS.register("fp64", FloatFormat("fp64", 53, -1022, 1023))
FP32 = FORMATS.register("fp32", FloatFormat("fp32", 24, -126, 127))
TF32 = FORMATS.register("tf32", FloatFormat("tf32", 11, -126, 127))
BF16 = FORMATS.register("bf16", FloatFormat("bf16", 8, -126, 127))
FP16 = FORMATS.register("fp16", FloatFormat("fp16", 11, -14, 15))
E5M2 = FORMATS.register("e5m2", FloatFormat("e5m2", 3, -14, 15))
E4M3 = FORMATS.register("e4m3", FloatFormat("e4m3", 4, -6, 8, has_inf=False))


def custom(p: int, emin: int = -1022, emax: int = 1023) -> FloatFormat:
    """A format with infinities and subnormals, by default with float64's range, to study the significand alone.

    Args:
        p: significant bits, the hidden one included.
        emin, emax: exponents of the smallest and the largest normal numbers.
    Raises:
        OptionError: there is no such format.
    """
    full_range = (emin, emax) == (-1022, 1023)
    return FloatFormat(f"p{p}" if full_range else f"p{p}:{emin}:{emax}", p, emin, emax)


def parse_format(name: str) -> FloatFormat:
    """A format by name: one of FORMATS, "p12" for `custom(12)`, "p12:-14:15" for `custom(12, -14, 15)`.

    Raises:
        OptionError: there is no such format; the message says what is near.
    """
    found = re.fullmatch(r"p(\d+)(?::(-?\d+):(-?\d+))?", name)
    if found is None:
        return FORMATS[name]
    return custom(*(int(part) for part in found.groups() if part is not None))


def round_to(
    x: Tensor,
    fmt: FloatFormat,
    mode: Mode = "rne",
    *,
    generator: torch.Generator | None = None,
    grad_format: FloatFormat | None = None,
) -> Tensor:
    """Round every element to a number of `fmt`, in one rounding from the dtype of `x`.

    NaN stays NaN; infinities stay, or become what the format has for them. Gradients pass straight through.

    Args:
        x: any shape, float32 or float64; the dtype must hold every number of the format.
        fmt: the format to round to.
        mode: "rne" to nearest, ties to even; "rna" to nearest, ties away from zero; "rtz" towards zero; "up" and "down"
            towards an infinity; "sr" stochastic, up with a probability equal to the distance, so that the mean is `x`.
        generator: of "sr"; None means torch's own.
        grad_format: what the gradient is rounded to (to nearest) on its way back; None leaves it as it is.
    Returns:
        a tensor like `x`; its memory is that of `x` where the format is that of its dtype.
    Raises:
        DTypeError: `x` is neither float32 nor float64, or cannot hold the format.
        OptionError: an unknown mode, or a generator without "sr".
    """
    check_dtype("x", x, torch.float32, torch.float64)
    check_choice("mode", mode, get_args(Mode))
    if generator is not None and mode != "sr":
        raise OptionError(f'generator is of no use to mode={mode!r}; leave it out, or round with mode="sr"')
    for needed in (fmt, grad_format):
        _check_container(x, needed)
    if grad_format is None and not (x.requires_grad and torch.is_grad_enabled()):
        return _round(x, fmt, mode, generator)
    rounded = _StraightThrough.apply(x, fmt, mode, generator, grad_format)  # type: ignore[no-untyped-call]
    assert isinstance(rounded, Tensor)
    return rounded


def ulp(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Unit in the last place: the distance of the numbers of `fmt` around `x`, `2^(max(floor(log2|x|), emin) - p + 1)`.

    Args:
        x: any shape, float32 or float64.
        fmt: the format; its range is not looked at above, so that errors of what overflowed have a unit too.
    Returns:
        a tensor like `x`; infinity at infinities, NaN at NaN.
    Raises:
        DTypeError: `x` is neither float32 nor float64, or cannot hold the format.
    """
    check_dtype("x", x, torch.float32, torch.float64)
    _check_container(x, fmt)
    return torch.where(torch.isnan(x), x, _spacing(x, fmt))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: FloatFormat, mode: Mode, generator: torch.Generator | None, grad_format: FloatFormat | None
    ) -> Tensor:
        ctx.grad_format = grad_format
        return _round(x, fmt, mode, generator)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0] if ctx.grad_format is None else _round(grads[0], ctx.grad_format, "rne", None)
        return grad, None, None, None, None


_CONTAINERS = {torch.float32: FP32, torch.float64: FP64}
_EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}
# where torch converts in one rounding it is faster, and the same
_NATIVE = {
    (torch.float32, BF16): torch.bfloat16,
    (torch.float32, FP16): torch.float16,
    (torch.float64, FP32): torch.float32,
}


def _check_container(x: Tensor, fmt: FloatFormat | None) -> None:
    container = _CONTAINERS[x.dtype]
    if fmt and (fmt.p > container.p or fmt.emax > container.emax or fmt.emin < container.emin):
        raise DTypeError(f"x is {container.name}, which cannot hold every number of {fmt.name}; give x.double()")


def _round(x: Tensor, fmt: FloatFormat, mode: Mode, generator: torch.Generator | None) -> Tensor:
    x = x.detach()
    if fmt == _CONTAINERS[x.dtype]:
        return x
    native = _NATIVE.get((x.dtype, fmt)) if mode == "rne" else None
    if native is not None:
        return x.to(native).to(x.dtype)
    spacing = _spacing(x, fmt)
    rounded = _to_integer(x / spacing, mode, generator).mul_(spacing)  # both products are exact: the spacing is 2^n
    return _finish(x, rounded, fmt, mode)


def _spacing(x: Tensor, fmt: FloatFormat) -> Tensor:
    integer, mask = _EXPONENT_BITS[x.dtype]
    power = x.detach().contiguous().view(integer).bitwise_and(mask).view(x.dtype)  # 2^floor(log2|x|), 0 below the container
    return power.clamp_(min=2.0**fmt.emin).mul_(2.0 ** (1 - fmt.p))


def _to_integer(steps: Tensor, mode: Mode, generator: torch.Generator | None) -> Tensor:
    """Round |steps| < 2^p to integers; every comparison is of exact differences."""
    if mode == "rne":
        return steps.round_()
    if mode == "up":
        return steps.ceil_()
    if mode == "down":
        return steps.floor_()
    whole = steps.trunc()
    if mode == "rtz":
        return whole
    rest = (steps - whole).abs_()
    if mode == "rna":
        away = rest >= 0.5
    else:
        away = torch.rand(steps.shape, dtype=steps.dtype, device=steps.device, generator=generator) < rest
    return whole + torch.copysign(away.to(steps.dtype), steps)


def _finish(x: Tensor, rounded: Tensor, fmt: FloatFormat, mode: Mode) -> Tensor:
    """What lies outside the range, and what is no number."""
    if not fmt.subnormals:
        rounded = torch.where(rounded.abs() < 2.0**fmt.emin, torch.copysign(torch.zeros_like(x), x), rounded)
    over = torch.isinf(x) if mode == "rtz" else rounded.abs() > fmt.max
    if mode in ("up", "down"):  # one side stops at the largest number
        over = torch.isinf(x) | (over & ((x > 0) if mode == "up" else (x < 0)))
    limit = torch.full_like(x, fmt.max)
    beyond = limit if fmt.saturate else torch.full_like(x, torch.inf if fmt.has_inf else torch.nan)
    rounded = torch.where(over | torch.isinf(x), torch.copysign(beyond, x), rounded.clamp_(-fmt.max, fmt.max))
    return torch.where(torch.isnan(x), x, rounded)
