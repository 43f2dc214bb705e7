"""Device functions: what happens to one tile of scores. Every kernel of the core calls these, so that the forward and the
backward pass see the same scores.

Scores live in the norm's own units: t = factor * (softcap(scale * q . k) + bias). For the softmax the factor is log2(e), for
alpha-entmax alpha - 1 (Peters et al. 2019, arXiv:1905.05702; the solver is that of docs/entmax.md).
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2, LOG2E, rounded_to, tanh

__all__ = [
    "LISTED",
    "MOST_STEPS",
    "PARTS",
    "alpha_end",
    "alpha_step",
    "entmax_end",
    "entmax_refine",
    "entmax_start",
    "entmax_step",
    "is_entmax",
    "load_bias",
    "load_pair",
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

FAR, NEAR = tl.constexpr(0.8), tl.constexpr(0.4)  # below the maximum: where the search for tau begins
LISTED = tl.constexpr(32)  # tiles of keys whose marks fit a number
MOST_STEPS = tl.constexpr(13)  # of that search
PARTS = tl.constexpr(8)  # of a row whose sums are kept apart, which spares threads from talking to each other
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
def load_pair(p_a, p_b, mask, MASKED: tl.constexpr):
    """The numbers of a row at p_a and p_b, [rows] each; 0 where mask (if MASKED) says.

    Loaded as one tensor: one of fewer numbers than threads gets the layout of its use from Triton, in which each thread
    fetches all its numbers by itself. In the keys' backward pass that was half of a step's instructions.
    """
    p = tl.where(tl.arange(0, 2)[None, :] == 0, p_a[:, None], p_b[:, None])
    if MASKED:
        return tl.split(tl.load(p, mask=mask[:, None], other=0))
    else:
        return tl.split(tl.load(p))


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
    away = tl.minimum(tl.maximum(BETA * top, 0.0), top + CAP)
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
def _parts(x):
    return tl.reshape(x, [x.shape[0], x.shape[1] // PARTS, PARTS])


@triton.jit
def _tied_max(t):
    """Maxima of rows, and how many keys share each. Every thread counts against the maximum of its own part of a row while it
    waits for the row's."""
    parts = _parts(t)
    tops = tl.max(parts, 1)
    ties = tl.sum(tl.where(parts == tops[:, None, :], 1.0, 0.0), 1)
    top = tl.max(tops, 1)
    return top, tl.sum(tl.where(tops == top[:, None], ties, 0.0), 1)


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
    if NORM == "dynamic_max":
        top, ties = _tied_max(t)
        m_new = tl.maximum(m, raised_max(top * c, ties, 8.0 if v.dtype == tl.float16 else 30 * LOG2E))
    else:
        m_new = tl.maximum(m, tl.max(t, 1) * c)
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


@triton.constexpr_function
def is_entmax(norm):
    """Whether a row's constant is tau, not an LSE."""
    return norm in ("entmax15", "sparsemax", "entmax")


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
def entmax_step(t, c, v, state, known, factor, STEP: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Take a tile of scores z = c * t [rows, keys] into the state of a pass of entmax, given what those before it found:

    "max"   (maximum,).
    "two"   sums of p and of u for tau = maximum - FAR, and for tau = maximum - NEAR; known: the maximum.
    "sums"  sums of p, of u and of the support; known: tau, and what the sum of u of a part has to be above to be live.
    "out"   sums of p, of u, of p V and of u V; known: tau.

    Sums of rows are in PARTS. Also which rows ("max") or parts may hold something of the support in this tile: a score less
    than 1 below the maximum so far, or above tau; "two" does not look.
    """
    if STEP == "max":
        top = tl.max(t, 1) * c
        m = tl.maximum(state[0], top)
        return (m,), top > m - 1
    elif STEP == "two":
        p_far, u_far, p_near, u_near = state
        p, u = entmax_pair(t * c, known[:, None] - FAR, factor, NORM)
        p_far, u_far = p_far + tl.sum(_parts(p), 1), u_far + tl.sum(_parts(u), 1)
        p, u = entmax_pair(t * c, known[:, None] - NEAR, factor, NORM)
        return (p_far, u_far, p_near + tl.sum(_parts(p), 1), u_near + tl.sum(_parts(u), 1)), True
    elif STEP == "sums":
        p_sum, u_sum, support = state
        p, u = entmax_pair(t * c, known[0][:, None], factor, NORM)
        own = tl.sum(_parts(u), 1)
        support += tl.sum(_parts(tl.where(u > 0, 1.0, 0.0)), 1)
        return (p_sum + tl.sum(_parts(p), 1), u_sum + own, support), own > known[1]
    else:
        p_sum, u_sum, acc, other = state
        p, u = entmax_pair(t * c, known[:, None], factor, NORM)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        other = tl.dot(u.to(v.dtype), v, other, input_precision=PRECISION)
        own = tl.sum(_parts(p), 1)
        return (p_sum + own, u_sum + tl.sum(_parts(u), 1), acc, other), own > 0


@triton.jit
def _newton(tau, p_sum, u_sum, factor):
    """A lower bound of the root from any tau: the r-norm of [z - tau]+, r = 1 / factor, falls and is convex in tau, so that
    Newton's step towards 1 ends below the root from either side."""
    norm = tl.exp2(tl.log2(tl.maximum(p_sum, 1e-30)) * (1 - factor))
    return tau + (p_sum - norm) / tl.maximum(u_sum, 1e-30)


@triton.jit
def entmax_start(m, state, factor):
    """Where the search for tau begins, (tau, low, high), from the sums of "two"."""
    p_far, u_far, p_near, u_near = state
    p_sum, nearer = tl.sum(p_far, 1), tl.sum(p_near, 1)
    low = tl.maximum(m - 1, _newton(m - FAR, p_sum, tl.sum(u_far, 1), factor))
    low = tl.maximum(low, _newton(m - NEAR, nearer, tl.sum(u_near, 1), factor))
    return low, low, tl.where(p_sum < 1, m - FAR, tl.where(nearer < 1, m - NEAR, m))


@triton.jit
def entmax_refine(tau, low, high, state, factor, NORM: tl.constexpr):
    """One step of the search: (tau, low, high, what the sum of p was off).

    For alpha = 1.5 and 2 the root over the present support is exact once the support is.
    """
    p_sum, u_sum, support = tl.sum(state[0], 1), tl.sum(state[1], 1), tl.sum(state[2], 1)
    newton = _newton(tau, p_sum, u_sum, factor)
    low = tl.maximum(low, tl.where(u_sum > 0, newton, low))
    high = tl.where(p_sum >= 1, high, tl.minimum(high, tau))
    root = newton
    f = p_sum - 1
    if NORM == "entmax15":
        root = tau + f / tl.maximum(u_sum + tl.sqrt(tl.maximum(u_sum * u_sum - support * f, 0.0)), 1e-30)
    return tl.where((root >= low) & (root <= high), root, low), low, high, tl.abs(f)


@triton.jit
def entmax_end(tau, state, factor):
    """Output, tau and sum(u V) / sum(u) from the sums of "out": one more of Newton's steps for tau, d p / d tau = -u / factor,
    and what it changes of the output."""
    p_sum, u_sum = tl.sum(state[0], 1), tl.maximum(tl.sum(state[1], 1), 1e-30)
    acc, other = state[2], state[3]
    off = tl.where(p_sum > 0, (p_sum - 1) / u_sum, 0.0)
    return acc - off[:, None] * other, tau + off * factor, other / u_sum[:, None]


@triton.jit
def score_gradient(t, c, row, dp, delta, factor, NORM: tl.constexpr):
    """Probabilities and the gradient of the scores before the norm.

    Softmax: p = exp(s - lse), ds = p * (dp - delta). Entmax: ds = u * (dp - delta). `row`: the LSE in base-2
    logarithms, or tau.
    """
    if is_entmax(NORM):
        p, u = entmax_pair(t * c, row, factor, NORM)
        return p, u * (dp - delta)
    else:
        p = tl.exp2(t * c - row)
        return p, p * (dp - delta)


@triton.jit
def alpha_step(t, c, tau, ds, dp, delta, sums, factor, NORM: tl.constexpr):
    """Take a tile into the sums over keys that `alpha_end` needs; ds as of `score_gradient`.

    With x = z - tau the derivative of a row by its alpha is sum((dp - mean) p (1 - log x)) / factor^2, where
    mean = sum(u dp) / sum(u). As u (dp - mean) adds up to nothing, p (1 - log x) may be counted from u: near alpha = 1, where
    x is near 1, all that is left is small, and factor^2 magnifies no rounding.
    """
    x = tl.maximum(t * c - tau, 0.0)
    _, u = entmax_pair(t * c, tau, factor, NORM)
    w = u * ((x - 1.0) - x * (LN2 * tl.log2(tl.where(x > 0, x, 1.0))))
    along, weight, off, total = sums
    along += tl.sum(_parts(w * (dp - delta)), 1)
    return along, weight + tl.sum(_parts(w), 1), off + tl.sum(_parts(ds), 1), total + tl.sum(_parts(u), 1)


@triton.jit
def alpha_end(sums, factor):
    """The derivative of rows by their alpha; delta, rounded where it was kept in 16 bits, becomes the mean of these sums."""
    along, weight, off, total = tl.sum(sums[0], 1), tl.sum(sums[1], 1), tl.sum(sums[2], 1), tl.sum(sums[3], 1)
    return (along - off / tl.where(total > 0, total, 1.0) * weight) / (factor * factor)


@triton.jit
def softcap_slope(s, scale, softcap):
    """Derivative of the softcap at products s = q . k."""
    y = tanh(s * (scale / softcap))
    return 1.0 - y * y
