"""Kernels of ragged decode attention: `decode` reads a piece of one head's keys and values, `combine` merges pieces.

A piece is a fixed number of tokens, whatever a head stores: long heads have more pieces, and none waits for the longest. A
program has all queries of its group as the rows of its tile, so that keys and values are read once. Pages hold `CODE` "raw",
"int8", "int4" or "fp8"; the tail is raw. With "int4" channels are in two halves everywhere, as they lie in a byte.
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2, LOG2E, tanh
from attnkit.ops.ragged_decode._triton.numbers import fractions, fractions4, half_of, levels_of

__all__ = ["combine", "decode"]


@triton.jit
def _load(base, rows, o_col, m_row, width, EVEN: tl.constexpr):
    """[rows, columns] at base + rows + o_col; zeros where m_row or the width says."""
    p = base + rows[:, None] + o_col[None, :]
    if EVEN:
        return tl.load(p, mask=m_row[:, None], other=0)
    else:
        return tl.load(p, mask=m_row[:, None] & (o_col < width)[None, :], other=0)


@triton.jit
def _row(base, o_col, width, EVEN: tl.constexpr):
    """[columns] float32 at base + o_col; zeros beyond the width."""
    if EVEN:
        return tl.load(base + o_col).to(tl.float32)
    else:
        return tl.load(base + o_col, mask=o_col < width, other=0.0).to(tl.float32)


@triton.jit
def _scaled(q, scale, zero, channels, o_col, width, CODE: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr):
    """Rows of q, float32, times what a fraction of each channel is worth, and their products with the fractions' zero."""
    worth = _row(scale + channels, o_col, width, EVEN)
    rows = (q * (worth * levels_of(CODE))[None, :]).to(dtype)
    if CODE == "fp8":
        return rows, 0.0
    else:
        middle = _row(zero + channels, o_col, width, EVEN) + worth * half_of(CODE)
        return rows, tl.sum(q * middle[None, :], 1)


@triton.jit
def _key_scores(
    q, q2, keys, rows, m_row, key_scale, key_zero, channels, o_d, width,
    CODE: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Products of q (its halves: q and q2) with keys, [rows of q, keys]; `channels` is where the page's scales begin."""
    b_k = _load(keys, rows, o_d, m_row, width, EVEN)
    if CODE == "raw":
        s = tl.dot(q, tl.trans(b_k), input_precision=PRECISION)
        if HALVES:
            b_k = _load(keys + width, rows, o_d, m_row, width, EVEN)
            s = tl.dot(q2, tl.trans(b_k), acc=s, input_precision=PRECISION)
        return s
    else:
        left, offset = _scaled(q, key_scale, key_zero, channels, o_d, width, CODE, EVEN, dtype)
        if HALVES:
            right, offset2 = _scaled(q2, key_scale, key_zero, channels + width, o_d, width, CODE, EVEN, dtype)
            low, high = fractions4(b_k, dtype)
            s = tl.dot(left, tl.trans(low), input_precision=PRECISION)
            s = tl.dot(right, tl.trans(high), acc=s, input_precision=PRECISION)
            return s + (offset + offset2)[:, None]
        else:
            s = tl.dot(left, tl.trans(fractions(b_k, CODE, dtype)), input_precision=PRECISION)
            if CODE == "fp8":
                return s
            else:
                return s + offset[:, None]


@triton.jit
def _add_values(
    p, fade, state, values, rows, m_row, worth, middle, o_v, width,
    CODE: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sums (acc, acc2, offset), faded, and p @ values added; `offset` is what every channel of a row has in common."""
    acc, acc2, offset = state
    b_v = _load(values, rows, o_v, m_row, width, EVEN)
    acc *= fade[:, None]
    if HALVES:
        acc2 *= fade[:, None]
    if CODE == "raw":
        offset *= fade
        acc = tl.dot(p.to(dtype), b_v, acc=acc, input_precision=PRECISION)
        if HALVES:
            b_v = _load(values + width, rows, o_v, m_row, width, EVEN)
            acc2 = tl.dot(p.to(dtype), b_v, acc=acc2, input_precision=PRECISION)
    else:
        if CODE == "fp8":
            offset *= fade
        else:
            offset = offset * fade + tl.sum(p * (middle + worth * half_of(CODE))[None, :], 1)
        b_p = (p * (worth * levels_of(CODE))[None, :]).to(dtype)
        if HALVES:
            low, high = fractions4(b_v, dtype)
            acc = tl.dot(b_p, low, acc=acc, input_precision=PRECISION)
            acc2 = tl.dot(b_p, high, acc=acc2, input_precision=PRECISION)
        else:
            acc = tl.dot(b_p, fractions(b_v, CODE, dtype), acc=acc, input_precision=PRECISION)
    return acc, acc2, offset


@triton.jit
def _walk(
    start, stop, table, pool, token_parts, channel_parts, strides, q, q2, state, rules, o_d, o_v,
    BLOCK_N: tl.constexpr, CODE: tl.constexpr, HALVES: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens start .. stop of a head, in pages of PAGE tokens that `table` names, or one after the other where it is None."""
    keys, values = pool
    value_scale, value_zero, bias = token_parts
    key_scale, key_zero = channel_parts
    stride_kn, stride_kp, stride_vn, stride_vp, stride_kc = strides
    factor, softcap, width, width_v = rules
    o_n = tl.arange(0, BLOCK_N)
    m, total, acc, acc2, offset = state
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        m_n = first + o_n < stop
        page, o_row = tl.cast(0, tl.int64), tl.cast(first, tl.int64) + o_n
        if table is not None:
            if PAGE >= BLOCK_N:
                page, o_row = tl.load(table + first // PAGE).to(tl.int64), (first % PAGE + o_n).to(tl.int64)
            else:
                page = tl.load(table + (first + o_n) // PAGE, mask=m_n, other=0).to(tl.int64)
                o_row = (o_n % PAGE).to(tl.int64)
        o_token = page * PAGE + o_row
        m_see, worth, middle = m_n, 1.0, 0.0
        if bias is not None:
            b_bias = tl.load(bias + o_token, mask=m_n, other=float("-inf"))
            m_see = b_bias > float("-inf")
        if CODE != "raw":  # numbers this small are not fetched ahead by the compiler; here the products with keys hide them
            worth = tl.load(value_scale + o_token, mask=m_see, other=0.0).to(tl.float32)
            if CODE != "fp8":
                middle = tl.load(value_zero + o_token, mask=m_see, other=0.0).to(tl.float32)
        s = _key_scores(
            q, q2, keys, page * stride_kn + o_row * stride_kp, m_n,
            key_scale, key_zero, page * stride_kc, o_d, width, CODE, HALVES, EVEN, PRECISION, dtype,
        )  # fmt: skip
        if SOFTCAP:
            t = tanh(s * (factor / softcap)) * (softcap * LOG2E)
        else:
            t = s * (factor * LOG2E)
        if bias is not None:
            t += b_bias[None, :] * LOG2E
        t = tl.where(m_see[None, :], t, float("-inf"))
        m_new = tl.maximum(m, tl.max(t, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p, fade = tl.exp2(t - shift[:, None]), tl.exp2(m - shift)
        total = total * fade + tl.sum(p, 1)
        m = m_new
        acc, acc2, offset = _add_values(
            p, fade, (acc, acc2, offset), values, page * stride_vn + o_row * stride_vp, m_see,
            worth, middle, o_v, width_v, CODE, HALVES, EVEN, PRECISION, dtype,
        )  # fmt: skip
    return m, total, acc, acc2, offset


@triton.jit
def decode(
    q, keys, values, table, lengths, tail_keys, tail_values, tail_lengths,
    key_scale, key_zero, value_scale, value_zero, bias, tail_bias, part_out, part_max, part_sum,
    stride_qb, stride_qt, stride_qh, stride_kn, stride_kp, stride_vn, stride_vp,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    rows, num_q, kv_heads, most_pages, most_tail, split, page_parts, scale, softcap, width, width_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    CODE: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part `part` of a head: `split` tokens of its pages, or, from `page_parts` on, of its tail; nothing where it has none.

    Writes sums that are not normalised, part_out [parts, B, T, H, Dv], their maxima in base-2 logarithms and their weights,
    [parts, B, T, H]. `width` and `width_v` are those of a half with "int4".
    Grid: (B * Hkv, parts, tiles of T * GROUP rows).
    """
    HALVES: tl.constexpr = CODE == "int4"
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // kv_heads, head % kv_heads
    start, length = part * split, tl.load(lengths + head)
    if tail_keys is not None:
        if part >= page_parts:
            start, length = (part - page_parts) * split, tl.load(tail_lengths + head)
    elif part >= page_parts:
        return
    if start >= length:
        return
    stop = tl.minimum(start + split, length)

    o_m, o_d, o_v = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    o_t, o_h = o_m // GROUP, h * GROUP + o_m % GROUP
    m_m = o_t < num_q
    q += b * stride_qb
    r_q = o_t.to(tl.int64) * stride_qt + o_h * stride_qh
    b_q = _load(q, r_q, o_d, m_m, width, EVEN)
    b_q2 = b_q
    acc, acc2 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if HALVES:
        b_q2 = _load(q + width, r_q, o_d, m_m, width, EVEN)
        acc2 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    nothing = tl.zeros([BLOCK_M], tl.float32)
    state = (nothing + float("-inf"), nothing, acc, acc2, nothing)
    dtype: tl.constexpr = q.dtype.element_ty
    if part < page_parts:
        if CODE == "raw":
            factor, rows_q, rows_q2 = scale, b_q, b_q2
        else:  # scales of channels come with a factor of their own in each page
            factor, rows_q, rows_q2 = 1.0, b_q.to(tl.float32) * scale, b_q2.to(tl.float32) * scale
        m, total, acc, acc2, offset = _walk(
            start, stop, table + head * most_pages, (keys, values), (value_scale, value_zero, bias), (key_scale, key_zero),
            (stride_kn, stride_kp, stride_vn, stride_vp, width * (2 if HALVES else 1)), rows_q, rows_q2, state,
            (factor, softcap, width, width_v), o_d, o_v,
            BLOCK_N, CODE, HALVES, PAGE, SOFTCAP, EVEN, PRECISION, dtype, None,
        )  # fmt: skip
    else:
        m, total, acc, acc2, offset = state
        if tail_keys is not None:
            m, total, acc, acc2, offset = _walk(
                start, stop, None, (tail_keys + b * stride_kb + h * stride_kh, tail_values + b * stride_vb + h * stride_vh),
                (None, None, None if tail_bias is None else tail_bias + head * most_tail), (None, None),
                (0, stride_kl, 0, stride_vl, 0), b_q, b_q2, state, (scale, softcap, width, width_v), o_d, o_v,
                BLOCK_N, "raw", HALVES, PAGE, SOFTCAP, EVEN, PRECISION, dtype, 1,
            )  # fmt: skip

    row = part.to(tl.int64) * rows + (b * num_q + o_t) * (kv_heads * GROUP) + o_h
    tl.store(part_max + row, m, mask=m_m)
    tl.store(part_sum + row, total, mask=m_m)
    p_out = part_out + (row * (width_v * (2 if HALVES else 1)))[:, None] + o_v[None, :]
    m_out = m_m[:, None] & (EVEN | (o_v < width_v))[None, :]
    tl.store(p_out, acc + offset[:, None], mask=m_out)
    if HALVES:
        tl.store(p_out + width_v, acc2 + offset[:, None], mask=m_out)


@triton.jit
def combine(
    part_out, part_max, part_sum, sinks, lengths, tail_lengths, out, lse,
    rows, num_q, heads, kv_heads, split, page_parts, width_v,
    BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Merge the parts that the head of a row has, in a fixed order: out [B, T, H, Dv] and the natural-log lse [B, T, H].

    Grid: (B * T * H, tiles of Dv).
    """
    row = tl.program_id(0).to(tl.int64)
    o_p, o_v = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    h = row % heads
    head = row // (num_q * heads) * kv_heads + h // (heads // kv_heads)
    used = tl.cdiv(tl.load(lengths + head), split)
    parts = used
    if tail_lengths is not None:
        parts += tl.cdiv(tl.load(tail_lengths + head), split)
    top = float("-inf")
    if sinks is not None:  # one more key, its value zero
        top = tl.load(sinks + h).to(tl.float32) * LOG2E
    sink = top
    for first in range(0, parts, BLOCK_P):
        i = first + o_p
        part = tl.where(i < used, i, i - used + page_parts).to(tl.int64)
        top = tl.maximum(top, tl.max(tl.load(part_max + part * rows + row, mask=i < parts, other=float("-inf")), 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(sink - shift)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, parts, BLOCK_P):
        i = first + o_p
        part = tl.where(i < used, i, i - used + page_parts).to(tl.int64) * rows + row
        weight = tl.exp2(tl.load(part_max + part, mask=i < parts, other=float("-inf")) - shift)
        total += tl.sum(weight * tl.load(part_sum + part, mask=i < parts, other=0.0), 0)
        m_out = (i < parts)[:, None] & (o_v < width_v)[None, :]
        b_out = tl.load(part_out + part[:, None] * width_v + o_v[None, :], mask=m_out, other=0.0)
        acc += tl.sum(weight[:, None] * b_out, 0)
    nothing = total == 0  # NaN is something
    total = tl.where(nothing, 1.0, total)
    tl.store(out + row * width_v + o_v, (acc / total).to(out.dtype.element_ty), mask=o_v < width_v)
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(nothing, float("-inf"), (shift + tl.log2(total)) * LN2))
