"""Device functions: constants and elementary functions that compiled kernels and the interpreter share."""

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "tanh"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, float32, within a few units in the last place (libdevice does not exist in the interpreter)."""
    a = tl.abs(x)
    t = tl.exp2(-2.0 * LOG2E * a)
    large = (1.0 - t) / (1.0 + t)
    # near zero 1 - t cancels: the series, its next term below 1e-8 of the result
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 + y * (-1382 / 155925)))))
    return tl.where(a < 0.25, x * series, tl.where(x < 0, -large, large))
