"""Forward kernels: `fwd` walks a tile of query rows over its keys, `combine` merges the parts where the keys were split."""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2, LOG2E
from attnkit.ops._attention_core._triton.steps import (
    LISTED,
    MOST_STEPS,
    PARTS,
    entmax_end,
    entmax_refine,
    entmax_start,
    entmax_step,
    is_entmax,
    load_bias,
    load_tile,
    norm_factor,
    rows_at,
    scores,
    seen,
    softmax_end,
    softmax_start,
    softmax_step,
)
from attnkit.ops._attention_core._triton.tiles import cut, key_bounds, load_span, locate, place

__all__ = ["combine", "fwd"]


@triton.jit
def _visit(
    first, limit, b_q, o_pos, state, known, keys, rules,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys first .. first + BLOCK_N; MASKED: some lie at `limit` or beyond, or some rows do not see some.

    Returns the state of the pass, and where (`entmax_step`) a later pass of entmax has to come back.
    """
    k, v, key_bias, k_rows, stride_ks, stride_vs, stride_bs = keys
    scale, factor, left, right, softcap, width, width_v = rules
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_key = first + o_n < limit
    step, o_row = rows_at(k_rows, first, o_n, m_key, MASKED)
    b_k = load_tile(k + step * stride_ks, o_row, stride_ks, o_d, m_key, width, MASKED, EVEN)
    b_bias = None
    if BIAS:
        b_bias = load_bias(key_bias + step * stride_bs, o_row, stride_bs, m_key)
        b_k = tl.where((b_bias > float("-inf"))[:, None], b_k, 0.0)
    t = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    t, t_scale = scores(t, b_bias[None, :] if BIAS else None, scale, softcap, factor, SOFTCAP, BIAS)
    if MASKED:
        see = seen(o_pos[:, None], (first + o_n)[None, :], left, right, WINDOW) & m_key[None, :]
        t = tl.where(see, t, float("-inf"))
    b_v = None
    if STEP == "softmax" or STEP == "out":
        b_v = load_tile(v + step * stride_vs, o_row, stride_vs, o_dv, m_key, width_v, MASKED, EVEN)
        if BIAS:
            b_v = tl.where((b_bias > float("-inf"))[:, None], b_v, 0.0)  # 0 * NaN is NaN
    live = True
    if STEP == "softmax":
        state = softmax_step(t, t_scale, b_v, state, MASKED or BIAS, NORM, PRECISION)
    else:
        state, live = entmax_step(t, t_scale, b_v, state, known, factor, STEP, NORM, PRECISION)
    return state, live


@triton.jit
def _walk(
    start, stop, limit, b_q, o_pos, state, known, keys, rules,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start, start + BLOCK_N ... below stop."""
    for first in tl.range(start, stop, BLOCK_N):
        state, _ = _visit(
            first, limit, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, MASKED, WINDOW, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
    return state


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _keep(tiles, kept, firsts, marks):
    """Append to a list those of the LISTED tiles that a row (or a part of one) has marked; returns how long it is now."""
    if len(marks.shape) == 2:
        marks = tl.reduce(marks, 1, _either)
    chosen = (tl.reduce(marks, 0, _either) >> tl.arange(0, LISTED)) & 1
    tl.store(tiles + kept + tl.cumsum(chosen, 0) - chosen, firsts, mask=chosen > 0)
    return kept + tl.sum(chosen)


@triton.jit
def _walk_live(
    tiles, count, start, limit, b_q, o_pos, state, known, keys, rules, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The `count` tiles of keys on a list, which keeps those that a later pass has to visit; the first pass begins it with
    the last keys, near which maxima are found more often, and "two" leaves it as it is.

    Threads mark tiles in bits, and talk about them after LISTED tiles only: at every tile it would cost as much as a product.
    """
    kept = 0
    o_tile = tl.arange(0, LISTED)
    firsts = tl.zeros([LISTED], tl.int32)
    if STEP == "max":
        marks = tl.zeros([BLOCK_M], tl.int32)
    else:
        marks = tl.zeros([BLOCK_M, PARTS], tl.int32)
    for i in tl.range(0, count):
        if STEP == "max":
            first = start + (count - 1 - i) * BLOCK_N
        else:
            first = tl.load(tiles + i)
        state, live = _visit(
            first, limit, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, False, False, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
        if STEP != "two":
            place = tl.cast(i, tl.int32) % LISTED
            marks |= tl.where(live, tl.cast(1, tl.int32) << place, 0)
            firsts = tl.where(o_tile == place, first, firsts)
            if (place == LISTED - 1) | (i == count - 1):
                kept = _keep(tiles, kept, firsts, marks)
                marks = tl.zeros_like(marks)
    return state, count if STEP == "two" else kept


@triton.jit
def _sweep(
    span, tiles, count, b_q, o_pos, state, known, keys, rules,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every key that the tile sees, once: those at the ends of the span behind a mask, others by the list if there is one.

    Entmax begins with the keys next to the rows: how high a maximum is known early decides how short the first list is.
    """
    lo, head_end, body_end, hi = span
    if STEP != "softmax":
        state = _walk(
            body_end, hi, hi, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
    if WINDOW:
        state = _walk(
            lo, tl.minimum(head_end, hi), hi, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
    if tiles is None:
        state = _walk(
            head_end, body_end, hi, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, False, WINDOW, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
    else:
        state, count = _walk_live(
            tiles, count, head_end, hi, b_q, o_pos, state, known, keys, rules,
            b_q.shape[0], BLOCK_N, BLOCK_D, BLOCK_DV, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # the next pass reads what this one has written
    if STEP == "softmax":
        state = _walk(
            body_end, hi, hi, b_q, o_pos, state, known, keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, True, WINDOW, SOFTCAP, BIAS, STEP, NORM, EVEN, PRECISION,
        )  # fmt: skip
    return state, count


@triton.jit
def _softmax_rows(
    span, b_q, o_pos, sink, keys, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output rows, their maxima in base-2 logarithms (-inf where nothing is seen) and sums. `sink`: one more key's logits."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sink is not None:
        m = sink
        total = tl.where(sink > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    state, _ = _sweep(
        span, None, 0, b_q, o_pos, softmax_start(m, total, acc, NORM), None, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, "softmax", NORM, EVEN, PRECISION,
    )  # fmt: skip
    m, total, acc, divisor = softmax_end(state, NORM)
    nothing = total == 0  # NaN is something
    acc = acc / tl.where(nothing, 1.0, divisor)[:, None]
    return acc, tl.where(nothing, float("-inf"), m), total


@triton.jit
def _entmax_tau(
    span, tiles, b_q, o_pos, n_refine, keys, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tau but for one more step (+inf where nothing is seen).

    It is updated n_refine - 1 times at least, and until it is close. `tiles` (or None) is where the list of the tiles of keys
    that may be in the support goes, after their number.
    """
    factor = rules[1]
    # of sum(p), before two more steps that about square what is off
    TOLERANCE: tl.constexpr = 1e-3 if b_q.dtype == tl.float32 else (0.3 if NORM == "entmax15" else 0.03)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    count = (span[2] - span[1]) // BLOCK_N
    state, count = _sweep(
        span, tiles, count, b_q, o_pos, (m,), None, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, "max", NORM, EVEN, PRECISION,
    )  # fmt: skip
    nothing = state[0] == float("-inf")
    m = tl.where(nothing, 0.0, state[0])
    zeros = tl.zeros([BLOCK_M, PARTS], tl.float32)
    state, count = _sweep(
        span, tiles, count, b_q, o_pos, (zeros, zeros, zeros, zeros), m, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, "two", NORM, EVEN, PRECISION,
    )  # fmt: skip
    tau, low, high = entmax_start(m, state, factor)
    off = 1.0
    step = 1  # the last pass makes one, too
    least = 0.0
    while ((off > TOLERANCE) | (step < n_refine)) & (step < MOST_STEPS):
        sums, count = _sweep(
            span, tiles, count, b_q, o_pos, (zeros, zeros, zeros), (tau, least), keys, rules,
            BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, "sums", NORM, EVEN, PRECISION,
        )  # fmt: skip
        tau, low, high, error = entmax_refine(tau, low, high, sums, factor, NORM)
        off = tl.max(tl.where(nothing, 0.0, error))
        step += 1
        least = -1.0  # only the first tau is sure to be below the root
    if tiles is not None:
        tl.store(tiles - 1, count)
    return tl.where(nothing, float("inf"), tau)


@triton.jit
def _entmax_rows(
    span, tiles, room, b_q, o_pos, tau, keys, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output rows, tau, and sum(u V) / sum(u), which the backward pass needs, from the tau of `_entmax_tau`; the list of
    tiles, if there is one, keeps those in the support, and zeros up to its `room`: what leaves an operator has to repeat."""
    zeros = tl.zeros([BLOCK_M, PARTS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    count = 0
    if tiles is not None:
        count = tl.load(tiles - 1)
    state, count = _sweep(
        span, tiles, count, b_q, o_pos, (zeros, zeros, acc, acc), tau, keys, rules,
        BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, "out", NORM, EVEN, PRECISION,
    )  # fmt: skip
    if tiles is not None:
        tl.store(tiles - 1, count)
        for behind in range(count, room, 128):
            o_tile = behind + tl.arange(0, 128)
            tl.store(tiles + o_tile, 0, mask=o_tile < room)
    return entmax_end(tau, state, rules[1])


@triton.jit
def _write(acc, other, out, rest, p_row, m_row, width_v, BLOCK_DV: tl.constexpr, EVEN: tl.constexpr):
    """Rows `acc` to out and, unless it is None, `other` to rest, at the rows p_row that m_row keeps."""
    o_dv = tl.arange(0, BLOCK_DV)
    p_out = p_row[:, None] * width_v + o_dv[None, :]
    m_out = m_row[:, None] & (EVEN | (o_dv < width_v))[None, :]
    tl.store(out + p_out, acc.to(out.dtype.element_ty), mask=m_out)
    if rest is not None:
        tl.store(rest + p_out, other.to(rest.dtype.element_ty), mask=m_out)


@triton.jit
def fwd(
    q, k, v, sinks, gaps, key_bias, cu_q, cu_k, q_pos, spans, q_rows, k_rows, out, rest, lse, tiles,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bb, stride_bs, stride_bh, stride_pb,
    batch, num_q, num_k, heads, num_seqs, num_tiles, kv_group, scale, left, right, softcap, width, width_v,
    n_refine, stride_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head (or of the GROUP heads that share a key head), over one part of its keys.

    With one of entmax's NORMs lse gets tau, in units of (alpha - 1) * score, and `rest` (or None) sum(u V) / sum(u). They take
    two launches, the first of which has no `out` and only looks for tau: without sums of values in their registers more
    programs share a multiprocessor, and the search is most of the work.

    Writes out [B, T, H, Dv] and the natural-log lse [B, T, H]; `rest` (or None) gets what rounding took from out. With SPLIT
    out has a dimension for the parts in front, each normalised over its own keys, and lse, [2, parts, B, T, H], gets their
    maxima in base-2 logarithms and their sums: an LSE of 10 in float32 knows the weight of its part to 5e-7 only.
    Grid: (tiles * heads / GROUP * B, parts); tiles with more keys come first, since later positions see more.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    head = (pid // num_tiles) % (heads // GROUP) * GROUP
    i_b = pid // (num_tiles * (heads // GROUP))
    kv_head = head // kv_group
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    if ROWS == "indexed":
        first, end, lo, full_lo, full_hi, hi = load_span(spans, pid % num_tiles)
    else:
        tile = num_tiles - 1 - pid % num_tiles
        first, end, k_start, k_end = locate(tile, cu_q, cu_k, num_seqs, num_q, num_k, TOKENS, ROWS)
    if first >= end:
        return
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    o_t, o_h = o_m // GROUP, o_m % GROUP
    m_row = (o_t < TOKENS) & (first + o_t < end)
    i_b, head, kv_head = i_b.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    if q_rows is not None and EVEN:  # rows are contiguous
        stride_qt, stride_ks, stride_vs = BLOCK_D, BLOCK_D, BLOCK_DV
    # loads first, which take as long as finding the bounds
    step, o_row = rows_at(q_rows, first, o_t, m_row, True)
    q += i_b * stride_qb + head * stride_qh + step * stride_qt
    p_q = q + (o_row * stride_qt + o_h.to(tl.int64) * stride_qh)[:, None] + o_d[None, :]
    m_q = m_row
    if ROWS == "indexed":
        m_q = m_row & (lo < hi)  # no row is fetched for nothing
    b_q = tl.load(p_q, mask=m_q[:, None] & (EVEN | (o_d < width))[None, :], other=0.0)
    if ROWS == "indexed":
        o_pos = tl.load(q_pos + first + o_t, mask=m_row, other=0)
    else:
        o_pos, low, high = place(q_pos, i_b * stride_pb, first, end, k_end - end, o_t, m_row, TOKENS, ROWS)
        lo, full_lo, full_hi, hi = key_bounds(low, high, k_start, k_end, left, right, WINDOW)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        lo = tl.minimum(lo + part * share, hi)
        hi = tl.minimum(lo + share, hi)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(full_hi, hi)
    k += i_b * stride_kb + kv_head * stride_kh
    v += i_b * stride_vb + kv_head * stride_vh
    if BIAS:
        key_bias += i_b * stride_bb + kv_head * stride_bh
    head_end, body_end = cut(lo, full_lo, full_hi, hi, BLOCK_N, WINDOW)
    span = (lo, head_end, body_end, hi)
    keys = (k, v, key_bias, k_rows, stride_ks, stride_vs, stride_bs)
    rules = (scale, norm_factor(gaps, head, NORM), left, right, softcap, width, width_v)
    if is_entmax(NORM):
        p_row = (i_b * num_q + step) * heads + head + o_row * heads + o_h
        if tiles is not None:
            tiles += pid.to(tl.int64) * stride_tiles + 1
        if out is None:
            tau = _entmax_tau(
                span, tiles, b_q, o_pos, n_refine, keys, rules,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
            )  # fmt: skip
            tl.store(lse + p_row, tau, mask=m_row)
        else:
            tau = tl.load(lse + p_row, mask=m_row, other=float("inf"))
            acc, tau, other = _entmax_rows(
                span, tiles, stride_tiles - 1, b_q, o_pos, tau, keys, rules,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
            )  # fmt: skip
            _write(acc, other, out, rest, p_row, m_row, width_v, BLOCK_DV, EVEN)
            tl.store(lse + p_row, tau, mask=m_row)
    else:
        sink = None
        if sinks is not None:  # one more key, its value zero; counted in the first part
            sink = tl.load(sinks + head + o_h, mask=o_t < TOKENS, other=0.0).to(tl.float32) * LOG2E
            sink = tl.where(part == 0, sink, float("-inf"))
        acc, m, total = _softmax_rows(
            span, b_q, o_pos, sink, keys, rules,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, WINDOW, SOFTCAP, BIAS, NORM, EVEN, PRECISION,
        )  # fmt: skip
        p_row = ((part * batch + i_b) * num_q + step) * heads + head + o_row * heads + o_h
        _write(acc, acc - acc.to(out.dtype.element_ty).to(tl.float32), out, rest, p_row, m_row, width_v, BLOCK_DV, EVEN)
        if SPLIT:
            tl.store(lse + p_row, m, mask=m_row)
            tl.store(lse + tl.num_programs(1).to(tl.int64) * batch * num_q * heads + p_row, total, mask=m_row)
        else:
            tl.store(lse + p_row, (m + tl.log2(tl.where(total == 0, 1.0, total))) * LN2, mask=m_row)


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
