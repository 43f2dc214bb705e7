"""The kernel of query moments: one read of the queries, turned back and multiplied on the spot."""

import triton
import triton.language as tl

__all__ = ["gather"]


@triton.jit
def channels(block, WIDTH: tl.constexpr, TURNS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D] channels, the two of a pair side by side; channels that stay may be paired in any way. From WIDTH on: none."""
    HALF: tl.constexpr = (WIDTH + 1) // 2
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = o_d
    if not INTERLEAVED:
        pair, second = o_d // 2, o_d % 2
        channel = tl.where(pair < TURNS, pair + second * TURNS, pair + tl.where(second == 1, HALF, TURNS))
        channel = tl.where(pair < HALF, channel, WIDTH)
    return channel


@triton.jit
def turned_back(
    q, cos, sin, inside, block, stride_qt,
    WIDTH: tl.constexpr, TURNS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_D] of a tile of queries in float32, in the order of `channels`; 0 where there is nothing."""
    HALF: tl.constexpr = (WIDTH + 1) // 2
    BLOCK_P: tl.constexpr = BLOCK_D // 2
    o_n, o_p = tl.arange(0, BLOCK_N), block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_q = q + (o_n * stride_qt)[:, None]
    m_n = inside[:, None]
    if INTERLEAVED:  # one load of whole lines
        o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        both = tl.load(p_q + o_d[None, :], mask=m_n & (o_d < WIDTH)[None, :], other=0.0)
        x, y = tl.split(tl.reshape(both, [BLOCK_N, BLOCK_P, 2]))
    else:
        first, second = o_p, o_p + HALF
        if TURNS > 0 and TURNS < HALF:
            first, second = tl.where(o_p < TURNS, o_p, o_p + TURNS), tl.where(o_p < TURNS, o_p + TURNS, second)
        m_p = o_p < HALF
        x = tl.load(p_q + first[None, :], mask=m_n & m_p[None, :], other=0.0)
        y = tl.load(p_q + second[None, :], mask=m_n & (m_p & (second < WIDTH))[None, :], other=0.0)
    x, y = x.to(tl.float32), y.to(tl.float32)
    if TURNS > 0:
        o_a = (o_n * TURNS)[:, None] + o_p[None, :]
        m_a = m_n & (o_p < TURNS)[None, :]
        c = tl.load(cos + o_a, mask=m_a, other=1.0)
        s = tl.load(sin + o_a, mask=m_a, other=0.0)
        x, y = x * c + y * s, y * c - x * s
    return tl.reshape(tl.join(x, y), [BLOCK_N, BLOCK_D])


@triton.jit
def gather(
    q, cos, sin, taken, shift, sums, products,
    num_tokens, heads, length, stride_qb, stride_qt, stride_qh, stride_ab,
    INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, TURNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums [parts, B, H, D] and products [parts, B, H, D, D] of `length` tokens of a head, for two blocks of BLOCK_D channels.

    What is stored is P with products = P + P^T. With SPLIT each x is the sum of two of 16 bits, a + r, that keep 17 bits of it:
    P = a^T (a / 2 + r) leaves out r^T r, 2^-18 of the whole; otherwise x is of 16 bits already, or of 32.
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0).to(tl.int64)  # batch and head
    part = tl.program_id(1)
    batch, head = row // heads, row % heads
    left, right = tl.program_id(2) // BLOCKS, tl.program_id(2) % BLOCKS
    o_l = channels(left, WIDTH, TURNS, INTERLEAVED, BLOCK_D)
    o_r = channels(right, WIDTH, TURNS, INTERLEAVED, BLOCK_D)
    q += batch * stride_qb + head * stride_qh
    level_l = tl.zeros([BLOCK_D], tl.float32)
    level_r = level_l
    if shift is not None:
        level_l = tl.load(shift + row * WIDTH + o_l, mask=o_l < WIDTH, other=0.0)
        level_r = tl.load(shift + row * WIDTH + o_r, mask=o_r < WIDTH, other=0.0)
    total = tl.zeros([BLOCK_D], tl.float32)
    product = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for start in range(part * length, tl.minimum(part * length + length, num_tokens), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        inside = o_n < num_tokens
        kept = inside
        if taken is not None:  # not in the masks of other loads, which would wait for it
            kept = tl.load(taken + batch * num_tokens + o_n, mask=inside, other=0) != 0
        first = tl.cast(start, tl.int64)
        p_q, p_c, p_s = q + first * stride_qt, cos, sin
        if TURNS > 0:
            p_c, p_s = cos + batch * stride_ab + first * TURNS, sin + batch * stride_ab + first * TURNS
        x = turned_back(p_q, p_c, p_s, inside, right, stride_qt, WIDTH, TURNS, INTERLEAVED, BLOCK_N, BLOCK_D)
        x = tl.where(kept[:, None], x - level_r[None, :], 0.0)
        u = x
        if BLOCKS > 1:
            u = turned_back(p_q, p_c, p_s, inside, left, stride_qt, WIDTH, TURNS, INTERLEAVED, BLOCK_N, BLOCK_D)
            u = tl.where(kept[:, None], u - level_l[None, :], 0.0)
        total += tl.sum(x, 0)
        if SPLIT:  # bfloat16 holds whatever float32 holds, float16 does not
            high = x.to(tl.bfloat16)
            rest = (2 * (x - high.to(tl.float32))).to(tl.bfloat16)  # twice: both are halved at the end
            other = tl.trans(u.to(tl.bfloat16))
            product = tl.dot(other, high, product)
            product = tl.dot(other, rest, product)
        else:
            kind = q.dtype.element_ty
            product = tl.dot(tl.trans(u.to(kind)), x.to(kind), product, input_precision=PRECISION)
    own = part * tl.num_programs(0).to(tl.int64) + row
    if left == 0:
        tl.store(sums + own * WIDTH + o_r, total, mask=o_r < WIDTH)
    p_o = products + own * WIDTH * WIDTH + o_l[:, None] * WIDTH + o_r[None, :]
    tl.store(p_o, product / 2, mask=(o_l < WIDTH)[:, None] & (o_r < WIDTH)[None, :])
