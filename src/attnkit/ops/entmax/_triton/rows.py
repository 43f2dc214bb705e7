"""Entmax of the rows of a matrix: a program finds the thresholds of a few rows and writes their probabilities.

`KIND` is "1.5", "2" or "general" (an alpha a row). A row is held on chip where it fits one tile (`SHORT`), else it is read
again in each pass. Thresholds are searched as in `attnkit.ops.entmax.solver`: as places, by the same updates. A row stops
where an update no longer moves it, so that it does not depend on the rows of its tile.
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2, expm1, log2_1p

__all__ = ["entmax_bwd", "entmax_fwd"]

_EPS = tl.constexpr(1.1920929e-07)
_TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def load_tile(p, o_row, m_row, stride, start, n, other, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N] of a matrix whose last dimension is contiguous, float32."""
    o_col = start + tl.arange(0, BLOCK_N)
    mask = m_row[:, None] & (o_col < n)[None, :]
    return tl.load(p + o_row[:, None] * stride + o_col[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def relative(z, shift):
    """z - shift; NaN and +inf, whose rows are NaN in the end, take no part."""
    return tl.where((z != z) | (z == float("inf")), float("-inf"), z - shift)


@triton.jit
def powers(v, place, gap, KIND: tl.constexpr):
    """u^r, u^(r - 1), u^(r - 2), 0 outside the support; v [rows, n], place and gap = alpha - 1 [rows]."""
    if KIND == "1.5":
        u = tl.maximum(v - place[:, None], 0.0)
        return u * u, u, tl.where(u > 0, 1.0, 0.0)
    elif KIND == "2":
        u = tl.maximum(v - place[:, None], 0.0)
        return u, tl.where(u > 0, 1.0, 0.0), tl.zeros_like(u)
    else:
        w = v - place[:, None]
        near = (gap < 0.25)[:, None]
        inside = tl.where(near, w > -1.0, w > 0.0)
        safe = tl.where(inside, w, 1.0)
        log_u = tl.where(near, log2_1p(safe), tl.log2(tl.where(near, 1.0, safe)))
        r = (1.0 / gap)[:, None]
        first, second, third = tl.exp2(r * log_u), tl.exp2((r - 1.0) * log_u), tl.exp2((r - 2.0) * log_u)
        return tl.where(inside, first, 0.0), tl.where(inside, second, 0.0), tl.where(inside, third, 0.0)


@triton.jit
def update(place, low, high, a0, a1, a2, gap, KIND: tl.constexpr):
    """One step of the bracketed search: the next place and the new bounds."""
    excess = a0 - 1.0
    rising = excess >= 0
    slope = tl.maximum(a1, _TINY)
    if KIND == "1.5":
        root = tl.sqrt(a0)
        tangent = place + root * excess / ((root + 1.0) * slope)
    elif KIND == "2":
        tangent = place + excess / slope
    else:
        tangent = place - a0 * expm1(-gap * LN2 * log2_1p(tl.maximum(excess, -1.0 + 1e-7))) / slope
    low = tl.minimum(tl.maximum(low, tangent), high)
    high = tl.maximum(tl.where(rising, high, tl.minimum(high, place)), low)
    if KIND == "1.5":
        inner = a1 * a1 - a2 * excess
        guess = place + excess / (slope + tl.sqrt(tl.maximum(inner, 0.0)))
        real = inner >= 0
        high = tl.where(rising & real, tl.maximum(tl.minimum(high, guess), low), high)
        low = tl.where(rising | (inner < 0), low, tl.minimum(tl.maximum(low, guess), high))
    elif KIND == "2":
        guess, real = tangent, slope > 0
    else:
        r = 1.0 / gap
        curve = 2.0 * r * a1 * a1 - (r - 1.0) * excess * a2
        real = curve > 0
        guess = place + 2.0 * excess * a1 / tl.where(real, curve, 1.0)
    fallback = tl.where(rising, low, 0.5 * (low + high))
    return tl.where(real & (guess >= low) & (guess <= high), guess, fallback), low, high


@triton.jit
def entmax_fwd(
    x, gaps, prob, rows, n, stride_x, stride_prob, shared_gap, max_updates,
    KIND: tl.constexpr, SHORT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities of BLOCK_R rows; a gap is alpha - 1, `shared_gap` where all rows have it."""
    o_row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_row = o_row < rows
    if KIND == "general":
        gap = tl.load(gaps + o_row, mask=m_row, other=1.0)
    else:
        gap = tl.zeros([BLOCK_R], tl.float32) + shared_gap
    scale = gap[:, None]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_R], tl.float32)
    broken = tl.zeros([BLOCK_R], tl.int32)  # entries that are NaN or +inf
    first = load_tile(x, o_row, m_row, stride_x, 0, n, float("-inf"), BLOCK_N) * scale
    for start in range(0, n, BLOCK_N):
        if SHORT:
            z = first
        else:
            z = load_tile(x, o_row, m_row, stride_x, start, n, float("-inf"), BLOCK_N) * scale
        wrong = (z != z) | (z == float("inf"))
        top = tl.maximum(top, tl.max(tl.where(wrong, float("-inf"), z), 1))
        count += tl.sum(tl.where(z > float("-inf"), 1.0, 0.0), 1)
        broken = tl.maximum(broken, tl.max(wrong.to(tl.int32), 1))
    empty = top == float("-inf")
    shift = tl.where(empty, 0.0, top)[:, None]
    decay = -gap * tl.log2(tl.maximum(count, 1.0))
    near = gap < 0.25
    end = tl.where(near, -1.0, 0.0)
    low = -1.0 - end
    high = tl.where(near, -expm1(LN2 * decay), -tl.exp2(decay))
    place = low
    active = ~empty & (broken == 0) & m_row
    done = 0
    moving = tl.max(active.to(tl.int32), 0)
    while (done < max_updates) & (moving > 0):
        a0, a1, a2 = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, n, BLOCK_N):
            if SHORT:
                v = relative(first, shift)
            else:
                v = relative(load_tile(x, o_row, m_row, stride_x, start, n, float("-inf"), BLOCK_N) * scale, shift)
            b0, b1, b2 = powers(v, place, gap, KIND)
            a0 += tl.sum(b0, 1)
            a1 += tl.sum(b1, 1)
            a2 += tl.sum(b2, 1)
        new, low, high = update(place, low, high, a0, a1, a2, gap, KIND)
        moved = active & (tl.abs(new - place) > 4.0 * _EPS * gap * tl.abs(new + end))
        place = tl.where(active, new, place)
        active = moved
        moving = tl.max(active.to(tl.int32), 0)
        done += 1
    for start in range(0, n, BLOCK_N):
        if SHORT:
            v = relative(first, shift)
        else:
            v = relative(load_tile(x, o_row, m_row, stride_x, start, n, float("-inf"), BLOCK_N) * scale, shift)
        p, _, _ = powers(v, place, gap, KIND)
        p = tl.where((broken > 0)[:, None], float("nan"), tl.where(empty[:, None], 0.0, p))
        o_col = start + tl.arange(0, BLOCK_N)
        mask = m_row[:, None] & (o_col < n)[None, :]
        tl.store(prob + o_row[:, None] * stride_prob + o_col[None, :], p.to(prob.dtype.element_ty), mask=mask)


@triton.jit
def gradient_factors(p, gap, KIND: tl.constexpr):
    """u = p^(2 - alpha) on the support, and log p (0 outside)."""
    outside = p == 0
    log_p = tl.log2(tl.where(outside, 1.0, p))
    if KIND == "1.5":
        u = tl.sqrt(p)
    elif KIND == "2":
        u = tl.where(p != p, p, tl.where(outside, 0.0, 1.0))
    else:
        u = tl.where(outside, 0.0, tl.exp2((1.0 - gap)[:, None] * log_p))
    return u, LN2 * log_p


@triton.jit
def entmax_bwd(
    d_prob, prob, gaps, d_x, d_alphas, rows, n, stride_d, stride_prob, stride_x,
    KIND: tl.constexpr, ALPHAS: tl.constexpr, SHORT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_R rows of scores, and with ALPHAS of their alphas."""
    o_row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_row = o_row < rows
    gap = tl.full([BLOCK_R], 0.5, tl.float32)
    if KIND == "general":
        gap = tl.load(gaps + o_row, mask=m_row, other=1.0)
    total, mean = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    extra, sum_h, d_alpha = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    first_p = load_tile(prob, o_row, m_row, stride_prob, 0, n, 0.0, BLOCK_N)
    first_g = load_tile(d_prob, o_row, m_row, stride_d, 0, n, 0.0, BLOCK_N)
    for start in range(0, n, BLOCK_N):
        if SHORT:
            p, g = first_p, first_g
        else:
            p = load_tile(prob, o_row, m_row, stride_prob, start, n, 0.0, BLOCK_N)
            g = load_tile(d_prob, o_row, m_row, stride_d, start, n, 0.0, BLOCK_N)
        g = tl.where(p == 0, 0.0, g)
        u, log_p = gradient_factors(p, gap, KIND)
        total += tl.sum(u, 1)
        mean += tl.sum(u * g, 1)
        if ALPHAS:
            extra += tl.sum(p * expm1(-gap[:, None] * log_p), 1)
            sum_h += tl.sum(p * log_p, 1)
    mean = mean / tl.where(total == 0, 1.0, total)
    log_total = LN2 * log2_1p(extra)
    for start in range(0, n, BLOCK_N):
        if SHORT:
            p, g = first_p, first_g
        else:
            p = load_tile(prob, o_row, m_row, stride_prob, start, n, 0.0, BLOCK_N)
            g = load_tile(d_prob, o_row, m_row, stride_d, start, n, 0.0, BLOCK_N)
        g = tl.where(p == 0, 0.0, g)
        u, log_p = gradient_factors(p, gap, KIND)
        d = tl.where(p == 0, 0.0, u * (g - mean[:, None]))
        if ALPHAS:  # see `gradients` in attnkit.ops.entmax.rows
            apart = -p * expm1(-gap[:, None] * log_p - log_total[:, None])
            slope = apart / gap[:, None] - p * log_p + (p - apart) * sum_h[:, None]
            d_alpha += tl.sum(g * slope, 1)
        o_col = start + tl.arange(0, BLOCK_N)
        mask = m_row[:, None] & (o_col < n)[None, :]
        tl.store(d_x + o_row[:, None] * stride_x + o_col[None, :], d.to(d_x.dtype.element_ty), mask=mask)
    if ALPHAS:
        tl.store(d_alphas + o_row, d_alpha / gap, mask=m_row)
