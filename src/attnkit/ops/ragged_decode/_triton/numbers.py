"""Device functions: codes of a page as numbers that matrix units take.

A code becomes its place in the range of its channel or token, a fraction f that 16 bits hold exactly: (code - half) / levels
for integers, in [-1/2, 1/2), and the number / 256 for fp8. A key or value is then f * (levels * scale) + (zero + half * scale),
and both factors go to the other operand of the product. Bits are moved, never converted one by one: eight codes of 4 bits cost
eleven instructions.
"""

import triton
import triton.language as tl

from attnkit._core.triton import interpreted

__all__ = ["fractions", "fractions4", "half_of", "levels_of"]

_INTERPRETED = tl.constexpr(interpreted())
# Four bytes ($2, $4) -> four numbers. A byte becomes the mantissa of a number of known exponent, from which one multiply-add
# makes the fraction; a bf16 mantissa has 7 bits, so that the eighth chooses what is subtracted.
_INT8_BF16 = tl.constexpr("""{
    .reg .b32 low, top, a, b, c;
    mov.b32 c, 0xbf80bf80;
    and.b32 low, $2, 0x7f7f7f7f;
    not.b32 top, $2;
    and.b32 top, top, 0x80808080;
    prmt.b32 a, low, 0x3f3f3f3f, 0x4140;
    prmt.b32 b, top, 0x3f3f3f3f, 0x4140;
    fma.rn.bf16x2 $0, b, c, a;
    prmt.b32 a, low, 0x3f3f3f3f, 0x4342;
    prmt.b32 b, top, 0x3f3f3f3f, 0x4342;
    fma.rn.bf16x2 $1, b, c, a;
}""")
_INT8_FP16 = tl.constexpr("""{
    .reg .b32 a, c, d;
    mov.b32 c, 0x1c001c00;
    mov.b32 d, 0xc480c480;
    prmt.b32 a, $2, 0x64646464, 0x4140;
    fma.rn.f16x2 $0, a, c, d;
    prmt.b32 a, $2, 0x64646464, 0x4342;
    fma.rn.f16x2 $1, a, c, d;
}""")
_FP8_BF16 = tl.constexpr("""{
    .reg .b32 a, sign, c, d;
    mov.b32 c, 0x77807780;
    mov.b32 d, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    and.b32 sign, a, 0x80008000;
    shr.u32 a, a, 4;
    and.b32 a, a, 0x07f007f0;
    or.b32 a, a, sign;
    fma.rn.bf16x2 $0, a, c, d;
    prmt.b32 a, $2, 0, 0x3424;
    and.b32 sign, a, 0x80008000;
    shr.u32 a, a, 4;
    and.b32 a, a, 0x07f007f0;
    or.b32 a, a, sign;
    fma.rn.bf16x2 $1, a, c, d;
}""")
_FP8_FP16 = tl.constexpr("""{
    .reg .b32 a, sign;
    prmt.b32 a, $2, 0, 0x1404;
    and.b32 sign, a, 0x80008000;
    shr.u32 a, a, 1;
    and.b32 a, a, 0x3f803f80;
    or.b32 $0, a, sign;
    prmt.b32 a, $2, 0, 0x3424;
    and.b32 sign, a, 0x80008000;
    shr.u32 a, a, 1;
    and.b32 a, a, 0x3f803f80;
    or.b32 $1, a, sign;
}""")
_INT4 = """{
    .reg .b32 low, high, a, c, d;
    mov.b32 c, TIMES;
    mov.b32 d, PLUS;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 a, low, EXPONENT, 0x4140;
    fma.rn.TYPE $0, a, c, d;
    prmt.b32 a, low, EXPONENT, 0x4342;
    fma.rn.TYPE $1, a, c, d;
    prmt.b32 a, high, EXPONENT, 0x4140;
    fma.rn.TYPE $2, a, c, d;
    prmt.b32 a, high, EXPONENT, 0x4342;
    fma.rn.TYPE $3, a, c, d;
}"""


def _int4(number: str, exponent: str, times: str, plus: str) -> str:
    return _INT4.replace("TYPE", number).replace("EXPONENT", exponent).replace("TIMES", times).replace("PLUS", plus)


_INT4_BF16 = tl.constexpr(_int4("bf16x2", "0x43434343", "0x3d803d80", "0xc108c108"))  # (128 + code) / 16 - 8.5
_INT4_FP16 = tl.constexpr(_int4("f16x2", "0x64646464", "0x2c002c00", "0xd408d408"))  # (1024 + code) / 16 - 64.5


@triton.jit
def levels_of(CODE: tl.constexpr):
    """How many scales a fraction of 1 is."""
    return 16.0 if CODE == "int4" else 256.0


@triton.jit
def half_of(CODE: tl.constexpr):
    """The code whose fraction is 0."""
    return 8.0 if CODE == "int4" else (128.0 if CODE == "int8" else 0.0)


@triton.jit
def fractions(codes, CODE: tl.constexpr, dtype: tl.constexpr):
    """Fractions of codes of 8 bits, "int8" or "fp8", in `dtype`."""
    if dtype == tl.float32 or _INTERPRETED:
        if CODE == "int8":
            return ((codes.to(tl.float32) - 128.0) * (1 / 256)).to(dtype)
        else:
            bits = codes.to(tl.uint32)
            bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
            return (bits.to(tl.float32, bitcast=True) * 2.0**112).to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _INT8_BF16 if CODE == "int8" else _FP8_BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _INT8_FP16 if CODE == "int8" else _FP8_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def fractions4(codes, dtype: tl.constexpr):
    """Fractions of the codes in the low and in the high half of each byte."""
    if dtype == tl.float32 or _INTERPRETED:
        low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        return ((low - 8.0) * (1 / 16)).to(dtype), ((high - 8.0) * (1 / 16)).to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _INT4_BF16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _INT4_FP16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
