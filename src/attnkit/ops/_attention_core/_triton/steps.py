"""Device functions: what happens to one tile of scores. Every kernel of the core calls these, so that the forward and the
backward pass see the same scores.

Scores live in the domain of base-2 logarithms: t = log2(e) * (softcap(scale * q . k) + bias).
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LOG2E, rounded_to, tanh

__all__ = [
    "load_bias",
    "load_tile",
    "raised_max",
    "score_gradient",
    "scores",
    "seen",
    "softcap_slope",
    "softmax_step",
]

BETA = tl.constexpr(4.0)  # how far a tied maximum moves; Qiu and Yao 2025 (arXiv:2510.04212) use 2 to 8


@triton.jit
def load_tile(base, o_row, stride, o_col, row_mask, width, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """[rows, columns] at base + o_row * stride + o_col; zeros where row_mask (if MASKED) or the width (unless EVEN) says."""
    p = base + o_row[:, None] * stride + o_col[None, :]
    if EVEN:
        if MASKED:
            return tl.load(p, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(p)
    else:
        if MASKED:
            return tl.load(p, mask=row_mask[:, None] & (o_col < width)[None, :], other=0.0)
        else:
            return tl.load(p, mask=(o_col < width)[None, :], other=0.0)


@triton.jit
def load_bias(base, o_key, stride, mask):
    """Key bias of a tile in base-2 logarithms, -inf where a key is masked or outside."""
    return tl.load(base + o_key * stride, mask=mask, other=float("-inf")).to(tl.float32) * LOG2E


@triton.jit
def seen(o_pos, o_key, left, right, WINDOW: tl.constexpr):
    """Whether rows standing on o_pos see the keys o_key; the two arguments broadcast."""
    see = o_key <= o_pos + right
    if WINDOW:
        see = see & (o_key >= o_pos - left)
    return see


@triton.jit
def scores(s, bias, scale, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr):
    """Products s = q . k -> (t, c): the scores in base-2 logarithms are c * t with c > 0.

    The plain form leaves the factor to the exponential, where it costs nothing (one fused multiply-add).
    """
    c = scale * LOG2E
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        c = 1.0
    if BIAS:
        s = s * c + bias
        c = 1.0
    return s, c


@triton.jit
def raised_max(top, ties, CAP: tl.constexpr):
    """The maximum of a tile (base-2 logarithms), moved away from the scores where several keys share it.

    Their probabilities are then no powers of two, and sums of values do not sit on rounding ties. Where the maximum is 0 it
    moves by one nat; CAP bounds the move, so that probabilities stay above what the operand's format can hold.
    """
    away = tl.where(top > 0, tl.minimum(BETA * top, top + CAP), tl.minimum(0.0, top + CAP))
    away = tl.where(tl.abs(top) < 1e-6, LOG2E, away)
    return tl.where((ties > 1) & (top > float("-inf")), away, top)


@triton.jit
def softmax_step(t, c, v, m, total, rounded, acc, GUARD: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Take a tile of scores c * t [rows, keys] and its values into each row's running maximum, sums and output.

    GUARD: a row may have seen nothing yet. NORM "consistent" and "dynamic_max" also sum the probabilities as they were
    rounded. (A product with ones on the matrix units was measured: it makes the forward pass 1.5x slower.)
    """
    top = tl.max(t, 1)
    if NORM == "dynamic_max":
        ties = tl.sum(tl.where(t == top[:, None], 1.0, 0.0), 1)
        m_new = tl.maximum(m, raised_max(top * c, ties, 8.0 if v.dtype == tl.float16 else 30 * LOG2E))
    else:
        m_new = tl.maximum(m, top * c)
    top = m_new
    if GUARD:
        top = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - (-inf) would be NaN
    p = tl.exp2(t * c - top[:, None])
    alpha = tl.exp2(m - top)
    total = total * alpha + tl.sum(p, 1)
    if NORM != "softmax":
        p = rounded_to(p, v.dtype)
        rounded = rounded * alpha + tl.sum(p, 1)
    p = p.to(v.dtype)
    if NORM == "softmax":
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
    else:  # matrix units truncate sums: tiles are added up outside them (as an fma, or the compiler would join the two again)
        own = tl.dot(p, v, input_precision=PRECISION)
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), own)
    return m_new, total, rounded, acc


@triton.jit
def score_gradient(t, c, lse2, dp, delta):
    """Probabilities and the gradient of the scores before the softmax: p = exp(s - lse), ds = p * (dp - delta)."""
    p = tl.exp2(t * c - lse2)
    return p, p * (dp - delta)


@triton.jit
def softcap_slope(s, scale, softcap):
    """Derivative of the softcap at products s = q . k."""
    y = tanh(s * (scale / softcap))
    return 1.0 - y * y
