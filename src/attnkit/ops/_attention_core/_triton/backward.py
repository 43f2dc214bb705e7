"""Backward kernels: `bwd_dq` (by query tile; also what `bwd_dkdv` wants to know of rows), `bwd_dkdv` (by key tile). No
atomics: a run repeats bit by bit. Probabilities are recomputed from the forward's scores and LSE."""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LOG2E
from attnkit.ops._attention_core._triton.steps import (
    PARTS,
    alpha_end,
    alpha_step,
    is_entmax,
    load_bias,
    load_pair,
    load_tile,
    norm_factor,
    rows_at,
    score_gradient,
    scores,
    seen,
    softcap_slope,
)
from attnkit.ops._attention_core._triton.tiles import (
    cut,
    key_bounds,
    key_tile,
    live_rows,
    load_span,
    locate,
    place,
)

__all__ = ["bwd_dkdv", "bwd_dq"]


@triton.jit
def _row_constants(known, b_d_out, at, o_row, m_row, m_q, heads, width_v, NORM: tl.constexpr, EVEN: tl.constexpr):
    """lse in base-2 logarithms (entmax: tau as it is) and delta = sum(d_out * (out + rest)) - d_lse of rows of one head.

    Without `out` delta is -d_lse alone. Rows that saw nothing get +inf: their probabilities come out as 0. Of entmax `out` is
    sum(u V) / sum(u). The rows lie at + o_row * heads in contiguous [B, T, H]; what is added up is read of m_q only.
    """
    out, rest, lse, d_lse = known
    ENTMAX: tl.constexpr = is_entmax(NORM)
    p_row = at + o_row * heads
    b_lse = tl.load(lse + p_row, mask=m_row, other=float("inf") if ENTMAX else float("-inf"))
    b_delta = tl.zeros_like(b_lse)
    if out is not None:
        o_dv = tl.arange(0, b_d_out.shape[1])
        b_out = load_tile(out + at * width_v, o_row, heads * width_v, o_dv, m_q, width_v, True, EVEN).to(tl.float32)
        if rest is not None:
            b_out += load_tile(rest + at * width_v, o_row, heads * width_v, o_dv, m_q, width_v, True, EVEN).to(tl.float32)
        b_delta = tl.sum(b_out * b_d_out.to(tl.float32), 1)
    if d_lse is not None:
        b_delta -= tl.load(d_lse + p_row, mask=m_row, other=0.0).to(tl.float32)
    if not ENTMAX:
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    return b_lse, b_delta


@triton.jit
def _visit_keys(
    first, limit, rows, o_pos, state, keys, rules,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, DELTA: tl.constexpr, SLOPES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys first .. first + BLOCK_N contribute to d_q / scale, with SLOPES also to the sums of `alpha_step`, or
    with DELTA to sum(p * dp)."""
    b_q, b_d_out, b_lse2, b_delta = rows
    k, v, key_bias, k_rows, stride_ks, stride_vs, stride_bs = keys
    scale, factor, left, right, softcap, width, width_v = rules
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_key = first + o_n < limit
    step, o_row = rows_at(k_rows, first, o_n, m_key, MASKED)
    b_k = load_tile(k + step * stride_ks, o_row, stride_ks, o_d, m_key, width, MASKED, EVEN)
    b_v = load_tile(v + step * stride_vs, o_row, stride_vs, o_dv, m_key, width_v, MASKED, EVEN)
    b_bias = None
    if BIAS:
        b_bias = load_bias(key_bias + step * stride_bs, o_row, stride_bs, m_key)
        shown = (b_bias > float("-inf"))[:, None]
        b_k, b_v = tl.where(shown, b_k, 0.0), tl.where(shown, b_v, 0.0)
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    t, c = scores(s, b_bias[None, :] if BIAS else None, scale, softcap, factor, SOFTCAP, BIAS)
    if MASKED:
        see = seen(o_pos[:, None], (first + o_n)[None, :], left, right, WINDOW) & m_key[None, :]
        t = tl.where(see, t, float("-inf"))
    dp = tl.dot(b_d_out, tl.trans(b_v), input_precision=PRECISION)
    if DELTA:
        _, p_dp = score_gradient(t, c, b_lse2[:, None], dp, 0.0, factor, NORM)
        return (state[0] + tl.sum(p_dp, 1),)
    else:
        _, ds = score_gradient(t, c, b_lse2[:, None], dp, b_delta[:, None], factor, NORM)
        if SLOPES:
            sums = alpha_step(t, c, b_lse2[:, None], ds, dp, b_delta[:, None], state[1], factor, NORM)
        if SOFTCAP:
            ds = ds * softcap_slope(s, scale, softcap)
        acc = tl.dot(ds.to(b_k.dtype), b_k, state[0], input_precision=PRECISION)
        if SLOPES:
            return acc, sums
        else:
            return (acc,)


@triton.jit
def _walk_keys(
    start, stop, limit, tiles, rows, o_pos, state, keys, rules,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, DELTA: tl.constexpr, SLOPES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys start, start + BLOCK_N ... below stop, or those of them that are on the forward pass's list, if there is one."""
    if tiles is None:
        for first in tl.range(start, stop, BLOCK_N):
            state = _visit_keys(
                first, limit, rows, o_pos, state, keys, rules,
                BLOCK_N, BLOCK_D, BLOCK_DV, MASKED, WINDOW, SOFTCAP, BIAS, NORM, DELTA, SLOPES, EVEN, PRECISION,
            )  # fmt: skip
    else:
        for i in tl.range(0, tl.load(tiles - 1)):
            state = _visit_keys(
                tl.load(tiles + i), limit, rows, o_pos, state, keys, rules,
                BLOCK_N, BLOCK_D, BLOCK_DV, MASKED, WINDOW, SOFTCAP, BIAS, NORM, DELTA, SLOPES, EVEN, PRECISION,
            )  # fmt: skip
    return state


@triton.jit
def bwd_dq(
    q, k, v, gaps, key_bias, cu_q, cu_k, q_pos, spans, q_rows, k_rows, d_out, out, rest, lse, d_lse, lse2, delta, d_q,
    to_q, to_d_out, slopes, tiles,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bb, stride_bs, stride_bh, stride_pb, stride_gb, stride_gt, stride_gh,
    num_q, num_k, heads, num_seqs, num_tiles, kv_group, scale, left, right, softcap, width, width_v,
    stride_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, DELTA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q (contiguous [B, T, H, D]) of one tile of query rows of one head; with DELTA their sum(p * dp), added to delta.

    `lse2` and `delta`, [B, H, T] in the order that kernels walk over rows, are written (`_row_constants`) where `lse` is given,
    contiguous [B, T, H] like `d_lse` (or None) and, with Dv behind, `out` and `rest` (or None); else they are read.
    `to_q` and `to_d_out` (or None), both contiguous, get the rows of q and d_out in the order of `q_rows`.
    `slopes` (or None), [B, H, T], gets the derivative of each row by the alpha of its head.

    Grid: (tiles * H * B,).
    """
    pid = tl.program_id(0)
    head = (pid // num_tiles) % heads
    i_b = pid // (num_tiles * heads)
    if ROWS == "indexed":
        first, end, lo, full_lo, full_hi, hi = load_span(spans, pid % num_tiles)
    else:
        tile = num_tiles - 1 - pid % num_tiles
        first, end, k_start, k_end = locate(tile, cu_q, cu_k, num_seqs, num_q, num_k, BLOCK_M, ROWS)
    if first >= end:
        return
    o_m, o_d, o_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_row = first + o_m < end
    kv_head = (head // kv_group).to(tl.int64)
    i_b, head = i_b.to(tl.int64), head.to(tl.int64)
    if q_rows is not None and EVEN:  # rows are contiguous
        stride_qt, stride_ks, stride_gt, stride_vs = BLOCK_D, BLOCK_D, BLOCK_DV, BLOCK_DV
    # loads first, which take as long as finding the bounds
    row, o_row = rows_at(q_rows, first, o_m, m_row, True)
    m_q = m_row
    if ROWS == "indexed":
        m_q = m_row & (lo < hi)  # no row is fetched for nothing
    b_q = load_tile(q + i_b * stride_qb + row * stride_qt + head * stride_qh, o_row, stride_qt, o_d, m_q, width, True, EVEN)
    b_d_out = load_tile(
        d_out + i_b * stride_gb + row * stride_gt + head * stride_gh, o_row, stride_gt, o_dv, m_q, width_v, True, EVEN
    )
    if to_q is not None:
        p_copy = (first.to(tl.int64) + o_m)[:, None]
        tl.store(to_q + p_copy * width + o_d[None, :], b_q, mask=m_q[:, None] & (EVEN | (o_d < width))[None, :])
        tl.store(to_d_out + p_copy * width_v + o_dv[None, :], b_d_out, mask=m_q[:, None] & (EVEN | (o_dv < width_v))[None, :])
    if ROWS == "indexed":
        o_pos = tl.load(q_pos + first + o_m, mask=m_row, other=0)
    else:
        o_pos, low, high = place(q_pos, i_b * stride_pb, first, end, k_end - end, o_m, m_row, BLOCK_M, ROWS)
        lo, full_lo, full_hi, hi = key_bounds(low, high, k_start, k_end, left, right, WINDOW)
    p_row = (i_b * heads + head) * num_q + first.to(tl.int64) + o_m
    at = (i_b * num_q + row) * heads + head
    if lse is not None:
        known = (out, rest, lse, d_lse)
        b_lse2, b_delta = _row_constants(known, b_d_out, at, o_row, m_row, m_q, heads, width_v, NORM, EVEN)
        tl.store(lse2 + p_row, b_lse2, mask=m_row)
        tl.store(delta + p_row, b_delta, mask=m_row)
    else:
        b_lse2 = tl.load(lse2 + p_row, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + p_row, mask=m_row, other=0.0)
    k += i_b * stride_kb + kv_head * stride_kh
    v += i_b * stride_vb + kv_head * stride_vh
    if BIAS:
        key_bias += i_b * stride_bb + kv_head * stride_bh
    SLOPES: tl.constexpr = slopes is not None
    if DELTA:
        state = (tl.zeros([BLOCK_M], tl.float32),)
    elif SLOPES:
        zeros = tl.zeros([BLOCK_M, PARTS], tl.float32)
        state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), (zeros, zeros, zeros, zeros))
    else:
        state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    head_end, body_end = cut(lo, full_lo, full_hi, hi, BLOCK_N, WINDOW)
    rows = (b_q, b_d_out, b_lse2, b_delta)
    keys = (k, v, key_bias, k_rows, stride_ks, stride_vs, stride_bs)
    rules = (scale, norm_factor(gaps, head, NORM), left, right, softcap, width, width_v)
    if tiles is not None:
        tiles += pid.to(tl.int64) * stride_tiles + 1
    if WINDOW:
        state = _walk_keys(
            lo, tl.minimum(head_end, hi), hi, None, rows, o_pos, state, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, NORM, DELTA, SLOPES, EVEN, PRECISION,
        )  # fmt: skip
    state = _walk_keys(
        head_end, body_end, hi, tiles, rows, o_pos, state, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, False, WINDOW, SOFTCAP, BIAS, NORM, DELTA, SLOPES, EVEN, PRECISION,
    )  # fmt: skip
    state = _walk_keys(
        body_end, hi, hi, None, rows, o_pos, state, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, NORM, DELTA, SLOPES, EVEN, PRECISION,
    )  # fmt: skip
    if DELTA:
        tl.store(delta + p_row, b_delta + state[0], mask=m_row)
    else:
        tl.store(
            d_q + at * width + (o_row * heads * width)[:, None] + o_d[None, :],
            (state[0] * scale).to(d_q.dtype.element_ty),
            mask=m_row[:, None] & (EVEN | (o_d < width))[None, :],
        )
    if SLOPES:
        tl.store(slopes + p_row, alpha_end(state[1], rules[1]), mask=m_row)


@triton.jit
def _visit_rows(
    first, end, keys, o_key, shift, d_k, d_v, d_bias, rows, rules,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the rows first .. first + BLOCK_M contribute to d_k / scale, d_v and the bias's gradient.

    Scores are computed transposed, [keys, rows]; MASKED: some rows lie at `end` or beyond, or do not see some keys.
    """
    b_k, b_v, b_bias = keys
    q, d_out, lse2, delta, q_pos, q_rows, stride_qt, stride_gt = rows
    scale, factor, left, right, softcap, width, width_v = rules
    o_m, o_d, o_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_row = first + o_m < end
    step, o_row = rows_at(q_rows, first, o_m, m_row, MASKED)
    b_q = load_tile(q + step * stride_qt, o_row, stride_qt, o_d, m_row, width, MASKED, EVEN)
    b_d_out = load_tile(d_out + step * stride_gt, o_row, stride_gt, o_dv, m_row, width_v, MASKED, EVEN)
    b_lse2, b_delta = load_pair(lse2 + first + o_m, delta + first + o_m, m_row, MASKED)
    if MASKED:
        b_lse2 = tl.where(m_row, b_lse2, float("inf"))  # rows outside: probability 0
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    t, c = scores(s, b_bias[:, None] if BIAS else None, scale, softcap, factor, SOFTCAP, BIAS)
    if MASKED:
        if ROWS == "positions" or ROWS == "indexed":
            o_pos, _ = load_pair(q_pos + first + o_m, q_pos + first + o_m, m_row, True)
        else:
            o_pos = first + o_m + shift
        see = seen(o_pos[None, :], o_key[:, None], left, right, WINDOW)  # keys outside write nothing
        t = tl.where(see, t, float("-inf"))
    dp = tl.dot(b_v, tl.trans(b_d_out), input_precision=PRECISION)
    p, ds = score_gradient(t, c, b_lse2[None, :], dp, b_delta[None, :], factor, NORM)
    d_v = tl.dot(p.to(b_d_out.dtype), b_d_out, d_v, input_precision=PRECISION)
    if BIAS:
        d_bias += tl.sum(ds, 1)
    if SOFTCAP:
        ds = ds * softcap_slope(s, scale, softcap)
    d_k = tl.dot(ds.to(b_q.dtype), b_q, d_k, input_precision=PRECISION)
    return d_k, d_v, d_bias


@triton.jit
def _walk_rows(
    span, end, live, count, keys, o_key, shift, d_k, d_v, d_bias, rows, rules,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the rows of a span (lo, head_end, body_end, hi) those in the middle or, MASKED, those at both ends, which are one
    loop because a loop is a copy of the whole step. In the middle `live` (or None) lists the `count` steps to visit."""
    lo, head_end, body_end, hi = span
    if MASKED:
        num_head = tl.cdiv(tl.minimum(head_end, hi) - lo, BLOCK_M)
        count = num_head + tl.maximum(tl.cdiv(hi - body_end, BLOCK_M), 0)
        for i in tl.range(0, count):
            first = tl.where(i < num_head, lo + i * BLOCK_M, body_end + (i - num_head) * BLOCK_M)
            d_k, d_v, d_bias = _visit_rows(
                first, end, keys, o_key, shift, d_k, d_v, d_bias, rows, rules,
                BLOCK_M, BLOCK_D, BLOCK_DV, MASKED, ROWS, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
            )  # fmt: skip
    elif live is None:
        for first in tl.range(head_end, body_end, BLOCK_M):
            d_k, d_v, d_bias = _visit_rows(
                first, end, keys, o_key, shift, d_k, d_v, d_bias, rows, rules,
                BLOCK_M, BLOCK_D, BLOCK_DV, MASKED, ROWS, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
            )  # fmt: skip
    else:
        for i in tl.range(0, count):
            # the compiler does not know what a list holds, and reads constants of rows in pairs where they are aligned
            first = tl.multiple_of(tl.load(live + i), BLOCK_M)
            d_k, d_v, d_bias = _visit_rows(
                first, end, keys, o_key, shift, d_k, d_v, d_bias, rows, rules,
                BLOCK_M, BLOCK_D, BLOCK_DV, MASKED, ROWS, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
            )  # fmt: skip
    return d_k, d_v, d_bias


@triton.jit
def bwd_dkdv(
    q, k, v, gaps, key_bias, cu_q, cu_k, q_pos, spans, q_rows, k_rows, d_out, lse2, delta, d_k, d_v, d_bias,
    tiles, live,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bb, stride_bs, stride_bh, stride_pb, stride_gb, stride_gt, stride_gh,
    batch, num_q, num_k, heads, kv_heads, num_seqs, num_tiles, kv_group, scale, left, right, softcap, width, width_v,
    stride_tiles, stride_live,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k, d_v and d_bias of one tile of keys of one key head, over some of the query heads that share it.

    Writes [parts, B, S, Hkv, D], [parts, B, S, Hkv, Dv] and [parts, B, S, Hkv]. Grid: (tiles * Hkv * B, parts), the
    query heads of a group dealt out to the parts.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    tile = pid % num_tiles
    kv_head = (pid // num_tiles) % kv_heads
    i_b = pid // (num_tiles * kv_heads)
    first, end, shift, lo, full_lo, full_hi, hi = key_tile(
        tile, cu_k, cu_q, q_pos, i_b * stride_pb, spans, num_seqs, num_k, num_q, left, right, BLOCK_M, BLOCK_N, ROWS, WINDOW
    )
    if first >= end:
        return
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    o_key = first + o_n
    m_key = o_key < end
    i_b, kv_head = i_b.to(tl.int64), kv_head.to(tl.int64)
    if k_rows is not None and EVEN:  # rows are contiguous
        stride_qt, stride_ks, stride_gt, stride_vs = BLOCK_D, BLOCK_D, BLOCK_DV, BLOCK_DV
    row, o_row = rows_at(k_rows, first, o_n, m_key, True)
    m_some = m_key
    if ROWS == "indexed":
        m_some = m_key & (lo < hi)  # no row is fetched for nothing
    b_k = load_tile(
        k + i_b * stride_kb + row * stride_ks + kv_head * stride_kh, o_row, stride_ks, o_d, m_some, width, True, EVEN
    )
    b_v = load_tile(
        v + i_b * stride_vb + row * stride_vs + kv_head * stride_vh, o_row, stride_vs, o_dv, m_some, width_v, True, EVEN
    )
    b_bias = None
    if BIAS:
        b_bias = load_bias(key_bias + i_b * stride_bb + row * stride_bs + kv_head * stride_bh, o_row, stride_bs, m_key)
        shown = (b_bias > float("-inf"))[:, None]
        b_k, b_v = tl.where(shown, b_k, 0.0), tl.where(shown, b_v, 0.0)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    acc_b = tl.zeros([BLOCK_N], tl.float32)
    if ROWS == "positions":
        q_pos += i_b * stride_pb
    per_part = kv_group // tl.num_programs(1)
    head = kv_head * kv_group + part * per_part
    head_end, body_end = cut(lo, full_lo, full_hi, hi, BLOCK_M, True)
    span = (lo, head_end, body_end, hi)
    if live is not None:
        live += (part * tl.num_programs(0) + pid).to(tl.int64) * stride_live
    count = 0
    keys = (b_k, b_v, b_bias if BIAS else m_key)  # without BIAS the third is not looked at
    for i_h in range(0, per_part):
        p_row = (i_b * heads + head + i_h) * num_q
        p_q = q + i_b * stride_qb + (head + i_h) * stride_qh
        p_d_out = d_out + i_b * stride_gb + (head + i_h) * stride_gh
        rows = (p_q, p_d_out, lse2 + p_row, delta + p_row, q_pos, q_rows, stride_qt, stride_gt)
        rules = (scale, norm_factor(gaps, head + i_h, NORM), left, right, softcap, width, width_v)
        if tiles is not None:
            row_tiles = tl.cdiv(num_q, BLOCK_M)
            lists = tiles + (i_b * heads + head + i_h) * row_tiles * stride_tiles
            tl.debug_barrier()  # nobody still reads the list of the last head
            count = live_rows(
                lists, stride_tiles, row_tiles, live, head_end, body_end, first, shift, right, num_k, BLOCK_M, BLOCK_N
            )
            tl.debug_barrier()
        acc_k, acc_v, acc_b = _walk_rows(
            span, hi, None, 0, keys, o_key, shift, acc_k, acc_v, acc_b, rows, rules,
            BLOCK_M, BLOCK_D, BLOCK_DV, True, ROWS, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
        )  # fmt: skip
        acc_k, acc_v, acc_b = _walk_rows(
            span, hi, live, count, keys, o_key, shift, acc_k, acc_v, acc_b, rows, rules,
            BLOCK_M, BLOCK_D, BLOCK_DV, False, ROWS, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
        )  # fmt: skip

    p_key = ((part * batch + i_b) * num_k + row) * kv_heads + kv_head + o_row * kv_heads
    tl.store(
        d_k + p_key[:, None] * width + o_d[None, :],
        (acc_k * scale).to(d_k.dtype.element_ty),
        mask=m_key[:, None] & (EVEN | (o_d < width))[None, :],
    )
    tl.store(
        d_v + p_key[:, None] * width_v + o_dv[None, :],
        acc_v.to(d_v.dtype.element_ty),
        mask=m_key[:, None] & (EVEN | (o_dv < width_v))[None, :],
    )
    if BIAS:
        tl.store(d_bias + p_key, acc_b, mask=m_key)
