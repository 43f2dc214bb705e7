"""Forward kernels: `fwd` walks a tile of query rows over its keys, `combine` merges the parts where the keys were split."""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2, LOG2E
from attnkit.ops._attention_core._triton.steps import load_bias, load_tile, scores, seen, softmax_step
from attnkit.ops._attention_core._triton.tiles import cut, key_bounds, locate, place

__all__ = ["combine", "fwd"]


@triton.jit
def _walk(
    start, stop, limit, b_q, o_pos, m, total, rounded, acc, k, v, key_bias, stride_ks, stride_vs, stride_bs,
    scale, left, right, softcap, width, width_v,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start, start + BLOCK_N ... below stop; MASKED: some lie at `limit` or beyond, or some rows do not see some."""
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for first in tl.range(start, stop, BLOCK_N):
        m_key = first + o_n < limit
        step = tl.cast(first, tl.int64)
        b_k = load_tile(k + step * stride_ks, o_n, stride_ks, o_d, m_key, width, MASKED, EVEN)
        b_bias = None
        if BIAS:
            b_bias = load_bias(key_bias + step * stride_bs, o_n, stride_bs, m_key)
            b_k = tl.where((b_bias > float("-inf"))[:, None], b_k, 0.0)
        t = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        t, c = scores(t, b_bias[None, :] if BIAS else None, scale, softcap, SOFTCAP, BIAS)
        if MASKED:
            see = seen(o_pos[:, None], (first + o_n)[None, :], left, right, WINDOW) & m_key[None, :]
            t = tl.where(see, t, float("-inf"))
        b_v = load_tile(v + step * stride_vs, o_n, stride_vs, o_dv, m_key, width_v, MASKED, EVEN)
        if BIAS:
            b_v = tl.where((b_bias > float("-inf"))[:, None], b_v, 0.0)  # 0 * NaN is NaN
        m, total, rounded, acc = softmax_step(t, c, b_v, m, total, rounded, acc, MASKED or BIAS, NORM, PRECISION)
    return m, total, rounded, acc


@triton.jit
def fwd(
    q, k, v, sinks, key_bias, cu_q, cu_k, q_pos, out, rest, lse,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bb, stride_bs, stride_bh, stride_pb,
    batch, num_q, num_k, heads, num_seqs, num_tiles, kv_group, scale, left, right, softcap, width, width_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head (or of the GROUP heads that share a key head), over one part of its keys.

    Writes out [B, T, H, Dv] and the natural-log lse [B, T, H]; `rest` (or None) gets what rounding took from out. With SPLIT
    out has a dimension for the parts in front, each normalised over its own keys, and lse, [2, parts, B, T, H], gets their
    maxima in base-2 logarithms and their sums: an LSE of 10 in float32 knows the weight of its part to 5e-7 only.
    Grid: (tiles * heads / GROUP * B, parts); tiles with more keys come first, since later positions see more.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    tile = num_tiles - 1 - pid % num_tiles
    head = (pid // num_tiles) % (heads // GROUP) * GROUP
    i_b = pid // (num_tiles * (heads // GROUP))
    kv_head = head // kv_group
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    first, end, k_start, k_end = locate(tile, cu_q, cu_k, num_seqs, num_q, num_k, TOKENS, ROWS)
    if first >= end:
        return
    o_m, o_d, o_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    o_t, o_h = o_m // GROUP, o_m % GROUP
    m_row = (o_t < TOKENS) & (first + o_t < end)
    o_pos, low, high = place(q_pos, i_b * stride_pb, first, end, k_end - end, o_t, m_row, TOKENS, ROWS)
    lo, full_lo, full_hi, hi = key_bounds(low, high, k_start, k_end, left, right, WINDOW)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        lo = tl.minimum(lo + part * share, hi)
        hi = tl.minimum(lo + share, hi)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(full_hi, hi)

    i_b, head, kv_head = i_b.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    q += i_b * stride_qb + head * stride_qh + first.to(tl.int64) * stride_qt
    p_q = q + (o_t * stride_qt + o_h.to(tl.int64) * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (EVEN | (o_d < width))[None, :], other=0.0)
    k += i_b * stride_kb + kv_head * stride_kh
    v += i_b * stride_vb + kv_head * stride_vh
    if BIAS:
        key_bias += i_b * stride_bb + kv_head * stride_bh
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # one more key, its value zero; counted in the first part
        sink = tl.load(sinks + head + o_h, mask=o_t < TOKENS, other=0.0).to(tl.float32) * LOG2E
        m = tl.where(part == 0, sink, m)
        total = tl.where(part == 0, 1.0, total)
    rounded = total
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    head_end, body_end = cut(lo, full_lo, full_hi, hi, BLOCK_N, WINDOW)
    if WINDOW:
        m, total, rounded, acc = _walk(
            lo, tl.minimum(head_end, hi), hi, b_q, o_pos, m, total, rounded, acc, k, v, key_bias,
            stride_ks, stride_vs, stride_bs, scale, left, right, softcap, width, width_v,
            BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
        )  # fmt: skip
    m, total, rounded, acc = _walk(
        head_end, body_end, hi, b_q, o_pos, m, total, rounded, acc, k, v, key_bias, stride_ks, stride_vs, stride_bs,
        scale, left, right, softcap, width, width_v,
        BLOCK_N, BLOCK_D, BLOCK_DV, False, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
    )  # fmt: skip
    m, total, rounded, acc = _walk(
        body_end, hi, hi, b_q, o_pos, m, total, rounded, acc, k, v, key_bias, stride_ks, stride_vs, stride_bs,
        scale, left, right, softcap, width, width_v,
        BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
    )  # fmt: skip

    nothing = total == 0  # NaN is something
    total = tl.where(nothing, 1.0, total)
    acc = acc / (total if NORM == "softmax" else tl.where(nothing, 1.0, rounded))[:, None]
    row = (part * batch + i_b) * num_q + first
    p_row = row * heads + head + o_t * heads + o_h
    if SPLIT:
        tl.store(lse + p_row, tl.where(nothing, float("-inf"), m), mask=m_row)
        sums = lse + tl.num_programs(1).to(tl.int64) * batch * num_q * heads
        tl.store(sums + p_row, tl.where(nothing, 0.0, total), mask=m_row)
    else:
        tl.store(lse + p_row, tl.where(nothing, float("-inf"), m + tl.log2(total)) * LN2, mask=m_row)
    p_out = p_row[:, None] * width_v + o_dv[None, :]
    m_out = m_row[:, None] & (EVEN | (o_dv < width_v))[None, :]
    b_out = acc.to(out.dtype.element_ty)
    tl.store(out + p_out, b_out, mask=m_out)
    if rest is not None:
        tl.store(rest + p_out, (acc - b_out.to(tl.float32)).to(rest.dtype.element_ty), mask=m_out)


@triton.jit
def combine(
    part_out, part_max, part_sum, out, rest, lse, rows, parts, width_v, BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """Merge the parts of one row in a fixed order: outputs [parts, rows, Dv], maxima and sums [parts, rows] -> out and lse.

    `rest` (or None) gets what rounding took from out.
    """
    row = tl.program_id(0).to(tl.int64)
    o_p, o_dv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DV)
    top = float("-inf")
    for first in range(0, parts, BLOCK_P):
        b_max = tl.load(part_max + (first + o_p) * rows + row, mask=first + o_p < parts, other=float("-inf"))
        top = tl.maximum(top, tl.max(b_max, 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, parts, BLOCK_P):
        m_part = first + o_p < parts
        p_part = (first + o_p) * rows + row
        b_max = tl.load(part_max + p_part, mask=m_part, other=float("-inf"))
        weight = tl.load(part_sum + p_part, mask=m_part, other=0.0) * tl.exp2(b_max - safe)
        b_out = tl.load(
            part_out + p_part[:, None] * width_v + o_dv[None, :], mask=m_part[:, None] & (o_dv < width_v)[None, :], other=0.0
        )
        total += tl.sum(weight, 0)
        acc += tl.sum(weight[:, None] * b_out, 0)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total
    b_out = acc.to(out.dtype.element_ty)
    tl.store(out + row * width_v + o_dv, b_out, mask=o_dv < width_v)
    if rest is not None:
        tl.store(rest + row * width_v + o_dv, (acc - b_out.to(tl.float32)).to(rest.dtype.element_ty), mask=o_dv < width_v)
    tl.store(lse + row, tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN2))
