"""Device functions: what happens to one tile of scores. Every kernel of the core calls these, so that the forward and the
backward pass see the same scores.

Scores live in the norm's own units: t = factor * (softcap(scale * q . k) + bias). For the softmax the factor is log2(e), for
alpha-entmax alpha - 1 (Peters et al. 2019, arXiv:1905.05702; the solver is that of docs/entmax.md).
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LOG2E, rounded_to, tanh

__all__ = [
    "TOLERANCE",
    "entmax_refine",
    "entmax_start",
    "entmax_step",
    "load_bias",
    "load_tile",
    "norm_factor",
    "raised_max",
    "rows_at",
    "score_gradient",
    "scores",
    "seen",
    "softcap_slope",
    "softmax_end",
    "softmax_start",
    "softmax_step",
]

BINS, BITS = tl.constexpr(4), tl.constexpr(16)  # of the scores less than 1 below a row's maximum
TOLERANCE = tl.constexpr(1e-3)  # of sum(p); the step after it squares what is off
BETA = tl.constexpr(4.0)  # how far a tied maximum moves; Qiu and Yao 2025 (arXiv:2510.04212) use 2 to 8


@triton.jit
def rows_at(rows, first, o_row, row_mask, MASKED: tl.constexpr):
    """Where the rows first + o_row lie, as (a, b) with a + b the row: they follow each other, or `rows` says where."""
    if rows is None:
        return tl.cast(first, tl.int64), o_row
    elif MASKED:
        return 0, tl.load(rows + first + o_row, mask=row_mask, other=0).to(tl.int64)
    else:
        return 0, tl.load(rows + first + o_row).to(tl.int64)


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
def scores(s, bias, scale, softcap, factor, SOFTCAP: tl.constexpr, BIAS: tl.constexpr):
    """Products s = q . k -> (t, c): the scores in the norm's units are c * t with c > 0.

    The plain form leaves the factor to the exponential, where it costs nothing (one fused multiply-add).
    """
    c = scale * factor
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * factor)
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
    return tl.where(ties > 1, away, top)  # -inf stays where it is


@triton.jit
def softmax_start(m, total, acc, NORM: tl.constexpr):
    """The state of a pass: maxima, sums of probabilities, output. NORM "consistent" and "dynamic_max" have three more: sums of
    the probabilities as they were rounded, the output of the last tile, and what it will scale that of those before it by."""
    if NORM == "softmax":
        return m, total, acc
    else:
        return m, total, acc, total, tl.zeros_like(acc), tl.full(m.shape, 1.0, tl.float32)


@triton.jit
def softmax_step(t, c, v, state, GUARD: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Take a tile of scores c * t [rows, keys] and its values into the state. GUARD: a row may have seen nothing yet.

    Matrix units truncate what they add up. Where sums have to be close each tile is a product of its own, added to the output
    when the next tile comes, so that nobody waits for it; sums of rows come last, while the product is under way. (The same
    sums as a product with ones were measured: they make the forward pass 1.5x slower.)
    """
    if NORM == "softmax":
        m, total, acc = state
    else:
        m, total, acc, rounded, own, beta = state
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
    if NORM == "softmax":
        total = total * alpha + tl.sum(p, 1)
        return m_new, total, tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    else:
        acc = acc * beta[:, None] + own
        own = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        rounded = rounded * alpha + tl.sum(rounded_to(p, v.dtype), 1)
        return m_new, total * alpha + tl.sum(p, 1), acc, rounded, own, alpha


@triton.jit
def softmax_end(state, NORM: tl.constexpr):
    """Maxima, sums, outputs, and what these are to be divided by."""
    if NORM == "softmax":
        m, total, acc = state
        return m, total, acc, total
    else:
        m, total, acc, rounded, own, beta = state
        return m, total, acc * beta[:, None] + own, rounded


@triton.jit
def norm_factor(gaps, head, NORM: tl.constexpr):
    """What scores are multiplied by before the norm sees them."""
    if NORM == "entmax15":
        return 0.5
    elif NORM == "sparsemax":
        return 1.0
    elif NORM == "entmax":
        return tl.load(gaps + head)
    else:
        return LOG2E


@triton.jit
def entmax_pair(z, tau, factor, NORM: tl.constexpr):
    """p = [z - tau]+^(1 / factor), and u = p^(2 - alpha), its derivative by the score; both 0 off the support."""
    x = tl.maximum(z - tau, 0.0)
    if NORM == "entmax15":
        return x * x, x
    elif NORM == "sparsemax":
        return x, tl.where(x > 0, 1.0, 0.0)
    else:
        log = tl.log2(tl.where(x > 0, x, 1.0))
        p = tl.exp2(log / factor)
        return tl.where(x > 0, p, 0.0), tl.where(x > 0, tl.exp2(log * ((1.0 - factor) / factor)), 0.0)


@triton.jit
def entmax_step(z, v, state, known, factor, STEP: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Take a tile of scores [rows, keys] into the state of a pass of entmax, given what is known from those before it:

    "max"   (maximum,).
    "bins"  (counts,) by BINS equal parts of what lies less than 1 below the maximum, 16 bits each; known: the maximum.
    "sums"  sums of p, of u and of the support; known: tau and a lower bound of it.
    "out"   sums of p, of u, of p V and of u V; known: tau.

    Also whether the tile may hold something of the support: a score less than 1 below the maximum so far, or above the lower
    bound of tau.
    """
    if STEP == "max":
        top = tl.max(z, 1)
        m = tl.maximum(state[0], top)
        return (m,), tl.max((top > m - 1).to(tl.int32), 0) > 0
    elif STEP == "bins":
        counts = state[0]
        place = (z - known[:, None] + 1.0) * BINS
        shift = tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(counts.dtype) * BITS
        return (counts + tl.where(place >= 0, 1 << shift, 0),), tl.max(tl.max(place, 1), 0) >= 0
    elif STEP == "sums":
        p_sum, u_sum, support = state
        tau, low = known
        p, u = entmax_pair(z, tau[:, None], factor, NORM)
        sums = (p_sum + tl.sum(p, 1), u_sum + tl.sum(u, 1), support + tl.sum(tl.where(u > 0, 1.0, 0.0), 1))
        return sums, tl.max(tl.max(z - low[:, None], 1), 0) > 0
    else:
        p_sum, u_sum, acc, other = state
        p, u = entmax_pair(z, known[:, None], factor, NORM)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        other = tl.dot(u.to(v.dtype), v, other, input_precision=PRECISION)
        return (p_sum + tl.sum(p, 1), u_sum + tl.sum(u, 1), acc, other), tl.max(tl.max(z - known[:, None], 1), 0) > 0


@triton.jit
def _root(n, s1, s2, NORM: tl.constexpr):
    """tau with sum(p) = 1 for n elements of the support that sum to s1, their squares to s2."""
    if NORM == "entmax15":
        return (s1 - tl.sqrt(tl.maximum(s1 * s1 - n * (s2 - 1), 0.0))) / n
    else:
        return (s1 - 1) / n


@triton.jit
def _take(n, s1, s2, own, edge, value, square, NORM: tl.constexpr):
    """Add `own` elements of a bin, unless the others already sum to 1 above its lower edge."""
    if NORM == "entmax15":
        own = tl.where(n * edge * edge - 2 * s1 * edge + s2 < 1, own, 0.0)
    else:
        own = tl.where(s1 - n * edge < 1, own, 0.0)
    return n + own, s1 + own * value, s2 + own * square


@triton.jit
def entmax_start(m, counts, NORM: tl.constexpr):
    """Where the search for tau begins: (tau, low, high), from the maximum and the counts of bins.

    low: every element but the maximum stands for the lower edge of its bin, which moves it by less than 1 / BINS, and tau with
    it (AdaSplash-2, arXiv:2604.15180). tau: they are spread evenly over their bins.
    """
    one = tl.full(m.shape, 1.0, tl.float32)
    n, s1, s2 = one, one, one
    n_even, s1_even, s2_even = one, one, one
    for i in tl.static_range(BINS):
        edge = (BINS - 1 - i) / BINS
        middle = edge + 0.5 / BINS
        own = tl.sum((counts >> ((BINS - 1 - i) * BITS)) & 0xFFFF, 1).to(tl.float32)
        if i == 0:
            own -= 1.0
        n, s1, s2 = _take(n, s1, s2, own, edge, edge, edge * edge, NORM)
        square = middle * middle + 1 / (12 * BINS * BINS)
        n_even, s1_even, s2_even = _take(n_even, s1_even, s2_even, own, edge, middle, square, NORM)
    low = m - 1 + _root(n, s1, s2, NORM)
    tau = m - 1 + _root(n_even, s1_even, s2_even, NORM)
    high = low + 1.0 / BINS
    return tl.minimum(tl.maximum(tau, low), high), low, high


@triton.jit
def entmax_refine(tau, low, high, sums, factor, NORM: tl.constexpr):
    """One step of the search: (tau, low, high).

    The r-norm of [z - tau]+, r = 1 / factor, falls and is convex in tau, so that Newton's step towards 1 ends below the root
    from either side. For alpha = 1.5 the root of the parabola over the present support is exact once the support is.
    """
    p_sum, u_sum, support = sums
    newton = tau + (p_sum - tl.exp2(tl.log2(tl.maximum(p_sum, 1e-30)) * (1 - factor))) / tl.maximum(u_sum, 1e-30)
    low = tl.maximum(low, tl.where(u_sum > 0, newton, low))
    high = tl.where(p_sum >= 1, high, tl.minimum(high, tau))
    root = newton
    if NORM == "entmax15":
        f = p_sum - 1
        root = tau + f / tl.maximum(u_sum + tl.sqrt(tl.maximum(u_sum * u_sum - support * f, 0.0)), 1e-30)
    return tl.where((root >= low) & (root <= high), root, low), low, high


@triton.jit
def score_gradient(t, c, row, dp, delta, factor, NORM: tl.constexpr):
    """Probabilities and the gradient of the scores before the norm.

    Softmax: p = exp(s - lse), ds = p * (dp - delta). Entmax: ds = u * (dp - delta). `row`: the LSE in base-2
    logarithms, or tau.
    """
    if NORM == "entmax15" or NORM == "sparsemax" or NORM == "entmax":
        p, u = entmax_pair(t * c, row, factor, NORM)
        return p, u * (dp - delta)
    else:
        p = tl.exp2(t * c - row)
        return p, p * (dp - delta)


@triton.jit
def softcap_slope(s, scale, softcap):
    """Derivative of the softcap at products s = q . k."""
    y = tanh(s * (scale / softcap))
    return 1.0 - y * y
