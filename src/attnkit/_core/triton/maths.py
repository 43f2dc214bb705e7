"""Device functions: constants and elementary functions that compiled kernels and the interpreter share."""

import triton
import triton.language as tl

from attnkit._core.triton import interpreted

__all__ = ["LN2", "LOG2E", "rounded_to", "tanh"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(interpreted())
_ROUND_BF16 = tl.constexpr("""{
    .reg .b32 both;
    cvt.rn.bf16x2.f32 both, $3, $2;
    shl.b32 $0, both, 16;
    and.b32 $1, both, 0xffff0000;
}""")
_ROUND_FP16 = tl.constexpr("""{
    .reg .b32 both;
    .reg .b16 low, high;
    cvt.rn.f16x2.f32 both, $3, $2;
    mov.b32 {low, high}, both;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
}""")


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


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """x, float32, rounded to a 16-bit type and still float32, each element where it is.

    Casting there and back says the same, but the compiler takes the way back from the layout of a matrix unit's operand,
    through shared memory: a row sum of it made attention's forward pass 1.3x slower, this 1.1x (H200, width 128).
    """
    if dtype == tl.float32:
        return x
    elif _INTERPRETED:
        return x.to(dtype).to(tl.float32)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_ROUND_BF16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_ROUND_FP16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
