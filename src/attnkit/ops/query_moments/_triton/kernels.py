"""The kernel of query moments: one read of the queries, turned back and multiplied in registers."""

import triton
import triton.language as tl

__all__ = ["gather"]


@triton.jit
def channels(o_p, TURNS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of each pair: those that turn together, and behind them those that stay, as they come."""
    first, second = o_p, o_p + HALF
    if TURNS > 0 and INTERLEAVED:
        first = tl.where(o_p < TURNS, 2 * o_p, o_p + TURNS)
        second = tl.where(o_p < TURNS, 2 * o_p + 1, second)
    elif TURNS > 0 and TURNS < HALF:
        first = tl.where(o_p < TURNS, o_p, o_p + TURNS)
        second = tl.where(o_p < TURNS, o_p + TURNS, second)
    return first, second


@triton.jit
def levels(shift, o_p, first, second, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """The shift of both channels of each pair."""
    one = tl.load(shift + first, mask=o_p < HALF, other=0.0)
    two = tl.load(shift + second, mask=(o_p < HALF) & (second < WIDTH), other=0.0)
    return one, two


@triton.jit
def centred(
    q, cos, sin, o_n, there, o_p, first, second, one, two, stride_qt,
    SHIFTED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Both channels of some pairs of some queries of a head, turned back, less their shifts (one, two); 0 elsewhere."""
    p_q = q + o_n[:, None] * stride_qt
    m_p = o_p < HALF
    x = tl.load(p_q + first[None, :], mask=there[:, None] & m_p[None, :], other=0.0).to(tl.float32)
    y = tl.load(p_q + second[None, :], mask=there[:, None] & (m_p & (second < WIDTH))[None, :], other=0.0).to(tl.float32)
    if TURNS > 0:
        o_a = o_n[:, None] * TURNS + o_p[None, :]
        m_a = there[:, None] & (o_p < TURNS)[None, :]
        c = tl.load(cos + o_a, mask=m_a, other=1.0)
        s = tl.load(sin + o_a, mask=m_a, other=0.0)
        x, y = x * c + y * s, y * c - x * s
    if SHIFTED:
        x = tl.where(there[:, None], x - one[None, :], 0.0)
        y = tl.where(there[:, None], y - two[None, :], 0.0)
    return x, y


@triton.jit
def gather(
    q, cos, sin, taken, shift, sums, products,
    num_tokens, heads, stride_qb, stride_qt, stride_qh, stride_ab,
    INTERLEAVED: tl.constexpr, SHIFTED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, TURNS: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums [parts, B, H, D] and products [parts, B, H, D, D] of PART tokens of a head, for two blocks of BLOCK_P pairs.

    What is stored is P with products = (P + P^T) / 2. With SPLIT each x is the sum of two of 16 bits, a + r, which keep 17 bits of
    it, and P = a^T (a + 2 r) leaves out r^T r, 2^-18 of the whole; otherwise x is of 16 bits already, or of 32.
    """
    HALF: tl.constexpr = (WIDTH + 1) // 2
    BLOCKS: tl.constexpr = (HALF + BLOCK_P - 1) // BLOCK_P
    row = tl.program_id(0).to(tl.int64)  # batch and head
    part = tl.program_id(1)
    batch, head = row // heads, row % heads
    o_l = (tl.program_id(2) // BLOCKS) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_r = (tl.program_id(2) % BLOCKS) * BLOCK_P + tl.arange(0, BLOCK_P)
    left1, left2 = channels(o_l, TURNS, HALF, INTERLEAVED)
    right1, right2 = channels(o_r, TURNS, HALF, INTERLEAVED)
    level_l1, level_l2, level_r1, level_r2 = 0.0, 0.0, 0.0, 0.0
    if SHIFTED:
        level_l1, level_l2 = levels(shift + row * WIDTH, o_l, left1, left2, WIDTH, HALF)
        level_r1, level_r2 = levels(shift + row * WIDTH, o_r, right1, right2, WIDTH, HALF)
    q += batch * stride_qb + head * stride_qh
    if TURNS > 0:
        cos += batch * stride_ab
        sin += batch * stride_ab
    sum1 = tl.zeros([BLOCK_P], tl.float32)
    sum2 = tl.zeros([BLOCK_P], tl.float32)
    p11 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    p12 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    p21 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    p22 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, num_tokens), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        there = o_n < num_tokens
        if taken is not None:
            there = tl.load(taken + batch * num_tokens + o_n, mask=there, other=0) != 0
        x, y = centred(q, cos, sin, o_n, there, o_r, right1, right2, level_r1, level_r2, stride_qt, SHIFTED, WIDTH, HALF, TURNS)
        u, v = x, y
        if BLOCKS > 1:
            u, v = centred(q, cos, sin, o_n, there, o_l, left1, left2, level_l1, level_l2, stride_qt, SHIFTED, WIDTH, HALF, TURNS)
        sum1 += tl.sum(x, 0)
        sum2 += tl.sum(y, 0)
        kind = tl.bfloat16 if SPLIT else q.dtype.element_ty  # bfloat16 holds whatever float32 holds, float16 does not
        high_u, high_v = tl.trans(u.to(kind)), tl.trans(v.to(kind))
        high_x, high_y = x.to(kind), y.to(kind)
        p11 = tl.dot(high_u, high_x, p11, input_precision=PRECISION)
        p12 = tl.dot(high_u, high_y, p12, input_precision=PRECISION)
        p21 = tl.dot(high_v, high_x, p21, input_precision=PRECISION)
        p22 = tl.dot(high_v, high_y, p22, input_precision=PRECISION)
        if SPLIT:
            rest_x = (2 * (x - high_x.to(tl.float32))).to(kind)
            rest_y = (2 * (y - high_y.to(tl.float32))).to(kind)
            p11 = tl.dot(high_u, rest_x, p11)
            p12 = tl.dot(high_u, rest_y, p12)
            p21 = tl.dot(high_v, rest_x, p21)
            p22 = tl.dot(high_v, rest_y, p22)
    own = part * tl.num_programs(0).to(tl.int64) + row
    m_l1, m_r1 = o_l < HALF, o_r < HALF
    m_l2, m_r2 = m_l1 & (left2 < WIDTH), m_r1 & (right2 < WIDTH)
    if tl.program_id(2) < BLOCKS:
        tl.store(sums + own * WIDTH + right1, sum1, mask=m_r1)
        tl.store(sums + own * WIDTH + right2, sum2, mask=m_r2)
    p_o = products + own * WIDTH * WIDTH
    tl.store(p_o + left1[:, None] * WIDTH + right1[None, :], p11, mask=m_l1[:, None] & m_r1[None, :])
    tl.store(p_o + left1[:, None] * WIDTH + right2[None, :], p12, mask=m_l1[:, None] & m_r2[None, :])
    tl.store(p_o + left2[:, None] * WIDTH + right1[None, :], p21, mask=m_l2[:, None] & m_r1[None, :])
    tl.store(p_o + left2[:, None] * WIDTH + right2[None, :], p22, mask=m_l2[:, None] & m_r2[None, :])
