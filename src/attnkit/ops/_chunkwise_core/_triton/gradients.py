"""The kernels of the backward pass besides the walk: of queries, keys, values and gates. Each program writes a tile of its own:
a run repeats bit by bit."""

import triton
import triton.language as tl

from attnkit.ops._chunkwise_core._triton.chunks import between, least, load_rows, locate, put_weight, tile_at

__all__ = ["d_gates", "d_keys", "d_queries", "d_values"]


@triton.jit
def _visit_keys(
    start, count, o_m, m_row, b_q, b_hi, b_lo, k, v, d_out, col_hi, col_lo,
    stride_kt, stride_vt, stride_gt, width, width_v, scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the keys start .. start + BLOCK_M: themselves, their scores, weights, and products of values and gradients."""
    o_n, o_d, o_v = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_key = o_n < count
    d_prob = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start_v in tl.range(0, width_v, BLOCK_V):
        m_v = start_v + o_v < width_v
        b_d_out = tile_at(d_out, o_m, start_v + o_v, stride_gt, m_row, m_v)
        b_v = tile_at(v, o_n, start_v + o_v, stride_vt, m_key, m_v)
        d_prob = tl.dot(b_d_out, tl.trans(b_v), d_prob, input_precision=PRECISION)
    b_k = tile_at(k, o_n, o_d, stride_kt, m_key, o_d < width)
    b_col_hi, b_col_lo = load_rows(col_hi, col_lo, o_n, m_key)
    see = (o_m[:, None] >= o_n[None, :]) & m_row[:, None]
    weight = between(b_hi[:, None], b_lo[:, None], b_col_hi[None, :], b_col_lo[None, :], see, b_q.dtype) * scale
    return b_k, tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), weight, d_prob


@triton.jit
def d_queries(
    q, k, v, d_out, den, m, hi, lo, col_hi, col_lo, states, sums, d_q, crossing, ratio, delta, unit, chunk_start, chunk_len,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, num_rows, each, length, heads, group, width, width_v, scale, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of d_q, contiguous [R, H, D], and of `crossing` [H, R] (or None): what comes to each row from rows and states
    before it.

    NORM: also 1 / denominator, the gradient of q . n, and that of the unit, each [H, R]; den [R, H] and m [R, Hkv] (or None)
    are contiguous. Grid: (tiles of rows * H * C,).
    """
    pid = tl.program_id(0)
    TILES: tl.constexpr = BLOCK_L // BLOCK_M
    i_m = pid % TILES
    head = (pid // TILES % heads).to(tl.int64)
    chunk = pid // TILES // heads
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    if i_m * BLOCK_M >= count:
        return
    kv_head = head // group
    kv_heads = heads // group
    o_m, o_d, o_v = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_row, m_d = o_m < count, o_d < width
    d_out += batch * stride_gb + first * stride_gt + head * stride_gh
    p_state = chunk.to(tl.int64) * kv_heads + kv_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, width_v, BLOCK_V):
        m_v = start + o_v < width_v
        b_d_out = tile_at(d_out, o_m, start + o_v, stride_gt, m_row, m_v)
        b_state = tile_at(states + p_state * width * width_v, o_d, start + o_v, width_v, m_d, m_v)
        acc = tl.dot(b_d_out, tl.trans(b_state), acc, input_precision=PRECISION)
    p_gate = kv_head * num_rows + row
    b_hi, b_lo = load_rows(hi + p_gate, lo + p_gate, o_m, m_row)
    col_hi += p_gate
    col_lo += p_gate
    b_q = tile_at(q + batch * stride_qb + first * stride_qt + head * stride_qh, o_m, o_d, stride_qt, m_row, m_d)
    k += batch * stride_kb + first * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + first * stride_vt + kv_head * stride_vh
    acc *= (tl.exp2(b_hi) * tl.exp2(b_lo) * scale)[:, None]
    b_crossing = tl.sum(b_q.to(tl.float32) * acc, 1)
    stop = tl.minimum((i_m + 1) * BLOCK_M, count)
    p_row = head * num_rows + row + o_m
    b_ratio, b_delta = 1.0, 0.0
    if NORM:
        size = b_crossing
        for start in tl.range(0, stop, BLOCK_M):
            _, score, weight, d_prob = _visit_keys(
                start, count, o_m, m_row, b_q, b_hi, b_lo, k, v, d_out, col_hi, col_lo,
                stride_kt, stride_vt, stride_gt, width, width_v, scale, BLOCK_M, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
            size += tl.sum(score * weight * d_prob, 1)
        b_den = tl.load(den + (row + o_m) * heads + head, mask=m_row, other=1.0)
        low = 1.0
        if m is not None:
            low = least(tl.load(m + (row + o_m) * kv_heads + kv_head, mask=m_row, other=0.0))
        whole = tl.maximum(tl.abs(b_den), low) + eps
        b_ratio = 1.0 / whole
        share = size * b_ratio * b_ratio  # size / whole is what the numerator's gradient and itself make
        b_delta = tl.where(tl.abs(b_den) > low, tl.where(b_den > 0, -share, share), 0.0)
        tl.store(ratio + p_row, b_ratio, mask=m_row)
        tl.store(delta + p_row, b_delta, mask=m_row)
        tl.store(unit + p_row, -eps * share, mask=m_row)
        b_n = tl.load(sums + p_state * width + o_d, mask=m_d, other=0.0)
        faded = tl.exp2(b_hi) * tl.exp2(b_lo) * scale
        acc = acc * b_ratio[:, None] + (b_delta * faded)[:, None] * b_n[None, :]
        b_crossing = tl.sum(b_q.to(tl.float32) * acc, 1)
        b_ratio, b_delta = b_ratio[:, None], b_delta[:, None]
    for start in tl.range(0, stop, BLOCK_M):
        b_k, score, weight, d_prob = _visit_keys(
            start, count, o_m, m_row, b_q, b_hi, b_lo, k, v, d_out, col_hi, col_lo,
            stride_kt, stride_vt, stride_gt, width, width_v, scale, BLOCK_M, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        d_score = (d_prob * b_ratio + b_delta) * weight
        if crossing is not None:
            before = o_m[:, None] > (start + tl.arange(0, BLOCK_M))[None, :]
            b_crossing += tl.sum(tl.where(before, score * d_score, 0.0), 1)
        acc = tl.dot(d_score.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    if crossing is not None:
        tl.store(crossing + p_row, b_crossing, mask=m_row)
    p_d_q = ((row + o_m) * heads + head) * width
    tl.store(d_q + p_d_q[:, None] + o_d[None, :], acc.to(d_q.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


@triton.jit
def d_keys(
    q, k, v, d_out, hi, lo, col_hi, col_lo, end_hi, end_lo, ratio, delta, d_states, rest, d_sums, d_k, crossed, own, put,
    chunk_start, chunk_len,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, num_rows, each, length, heads, group, width, width_v, scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of d_k, contiguous [R, Hkv, D], and of three [Hkv, R] (or None): what goes from each row to later rows of its
    chunk, to itself, and to later chunks.

    `d_states` and `d_sums` are the gradients of S and n after each chunk; `rest` (or None) is what rounding took from the
    first: `put` is a small difference of what comes of both. Scores are computed transposed, [keys, rows].
    Grid: (tiles of rows * Hkv * C,).
    """
    pid = tl.program_id(0)
    TILES: tl.constexpr = BLOCK_L // BLOCK_M
    i_n = pid % TILES
    kv_heads = heads // group
    kv_head = (pid // TILES % kv_heads).to(tl.int64)
    chunk = pid // TILES // kv_heads
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    if i_n * BLOCK_M >= count:
        return
    o_n, o_d, o_v = i_n * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_key, m_d = o_n < count, o_d < width
    v += batch * stride_vb + first * stride_vt + kv_head * stride_vh
    p_state = chunk.to(tl.int64) * kv_heads + kv_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, width_v, BLOCK_V):
        m_v = start + o_v < width_v
        b_v = tile_at(v, o_n, start + o_v, stride_vt, m_key, m_v)
        b_state = tile_at(d_states + p_state * width * width_v, o_d, start + o_v, width_v, m_d, m_v)
        acc = tl.dot(b_v, tl.trans(b_state), acc, input_precision=PRECISION)
        if rest is not None:
            b_rest = tile_at(rest + p_state * width * width_v, o_d, start + o_v, width_v, m_d, m_v)
            acc = tl.dot(b_v, tl.trans(b_rest), acc, input_precision=PRECISION)
    if NORM:
        acc += tl.load(d_sums + p_state * width + o_d, mask=m_d, other=0.0)[None, :]
    p_gate = kv_head * num_rows + row
    b_col_hi, b_col_lo = load_rows(col_hi + p_gate, col_lo + p_gate, o_n, m_key)
    acc *= put_weight(tl.load(end_hi + p_state), tl.load(end_lo + p_state), b_col_hi, b_col_lo, m_key)[:, None]
    b_k = tile_at(k + batch * stride_kb + first * stride_kt + kv_head * stride_kh, o_n, o_d, stride_kt, m_key, m_d)
    if put is not None:
        tl.store(put + p_gate + o_n, tl.sum(b_k.to(tl.float32) * acc, 1), mask=m_key)
    b_crossed, b_own = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for g in tl.range(0, group):
        head = kv_head * group + g
        p_q = q + batch * stride_qb + first * stride_qt + head * stride_qh
        p_d_out = d_out + batch * stride_gb + first * stride_gt + head * stride_gh
        p_row = head * num_rows + row
        for start in tl.range(i_n * BLOCK_M, count, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_row = o_m < count
            d_prob = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
            for start_v in tl.range(0, width_v, BLOCK_V):
                m_v = start_v + o_v < width_v
                b_v = tile_at(v, o_n, start_v + o_v, stride_vt, m_key, m_v)
                b_d_out = tile_at(p_d_out, o_m, start_v + o_v, stride_gt, m_row, m_v)
                d_prob = tl.dot(b_v, tl.trans(b_d_out), d_prob, input_precision=PRECISION)
            b_q = tile_at(p_q, o_m, o_d, stride_qt, m_row, m_d)
            b_hi_m, b_lo_m = load_rows(hi + p_gate, lo + p_gate, o_m, m_row)
            see = (o_m[None, :] >= o_n[:, None]) & m_row[None, :]
            weight = between(b_hi_m[None, :], b_lo_m[None, :], b_col_hi[:, None], b_col_lo[:, None], see, b_q.dtype)
            if NORM:
                b_ratio, b_delta = load_rows(ratio + p_row, delta + p_row, o_m, m_row)
                d_prob = d_prob * b_ratio[None, :] + b_delta[None, :]
            d_score = d_prob * (weight * scale)
            if put is not None:
                share = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * d_score
                b_crossed += tl.sum(tl.where(o_m[None, :] > o_n[:, None], share, 0.0), 1)
                b_own += tl.sum(tl.where(o_m[None, :] == o_n[:, None], share, 0.0), 1)
            acc = tl.dot(d_score.to(b_q.dtype), b_q, acc, input_precision=PRECISION)
    if put is not None:
        tl.store(crossed + p_gate + o_n, b_crossed, mask=m_key)
        tl.store(own + p_gate + o_n, b_own, mask=m_key)
    p_d_k = ((row + o_n) * kv_heads + kv_head) * width
    tl.store(d_k + p_d_k[:, None] + o_d[None, :], acc.to(d_k.dtype.element_ty), mask=m_key[:, None] & m_d[None, :])


@triton.jit
def d_values(
    q, k, d_out, hi, lo, col_hi, col_lo, end_hi, end_lo, ratio, d_states, d_v, chunk_start, chunk_len,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh,
    num_rows, each, length, heads, group, width, width_v, scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of d_v, contiguous [R, Hkv, Dv]. Grid: (tiles of Dv * tiles of rows * Hkv * C,)."""
    pid = tl.program_id(0)
    tiles_v = tl.cdiv(width_v, BLOCK_V)
    TILES: tl.constexpr = BLOCK_L // BLOCK_M
    i_v, i_n = pid % tiles_v, pid // tiles_v % TILES
    kv_heads = heads // group
    kv_head = (pid // tiles_v // TILES % kv_heads).to(tl.int64)
    chunk = pid // tiles_v // TILES // kv_heads
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    if i_n * BLOCK_M >= count:
        return
    o_n, o_d, o_v = i_n * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_key, m_d, m_v = o_n < count, o_d < width, o_v < width_v
    b_k = tile_at(k + batch * stride_kb + first * stride_kt + kv_head * stride_kh, o_n, o_d, stride_kt, m_key, m_d)
    p_state = chunk.to(tl.int64) * kv_heads + kv_head
    b_state = tile_at(d_states + p_state * width * width_v, o_d, o_v, width_v, m_d, m_v)
    p_gate = kv_head * num_rows + row
    b_col_hi, b_col_lo = load_rows(col_hi + p_gate, col_lo + p_gate, o_n, m_key)
    after = put_weight(tl.load(end_hi + p_state), tl.load(end_lo + p_state), b_col_hi, b_col_lo, m_key)
    acc = tl.dot(b_k, b_state, input_precision=PRECISION) * after[:, None]
    for g in tl.range(0, group):
        head = kv_head * group + g
        p_q = q + batch * stride_qb + first * stride_qt + head * stride_qh
        p_d_out = d_out + batch * stride_gb + first * stride_gt + head * stride_gh
        for start in tl.range(i_n * BLOCK_M, count, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_row = o_m < count
            b_q = tile_at(p_q, o_m, o_d, stride_qt, m_row, m_d)
            b_d_out = tile_at(p_d_out, o_m, o_v, stride_gt, m_row, m_v)
            b_hi_m, b_lo_m = load_rows(hi + p_gate, lo + p_gate, o_m, m_row)
            see = (o_m[None, :] >= o_n[:, None]) & m_row[None, :]
            weight = between(b_hi_m[None, :], b_lo_m[None, :], b_col_hi[:, None], b_col_lo[:, None], see, b_q.dtype)
            prob = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (weight * scale)
            if NORM:
                prob *= tl.load(ratio + head * num_rows + row + o_m, mask=m_row, other=0.0)[None, :]
            acc = tl.dot(prob.to(b_d_out.dtype), b_d_out, acc, input_precision=PRECISION)
    p_d_v = ((row + o_n) * kv_heads + kv_head) * width_v
    tl.store(d_v + p_d_v[:, None] + o_v[None, :], acc.to(d_v.dtype.element_ty), mask=m_key[:, None] & m_v[None, :])


@triton.jit
def d_gates(
    crossing, crossed, own, put, unit, passing, end_hi, end_lo, d_decay, d_gain, d_m, chunk_start, chunk_len,
    num_rows, num_chunks, each, length, heads, group, tiles, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """d_decay, d_gain and, where there is `unit` [H, R], d_m, all [R, Hkv].

    The first is what passes each row, summed inside its chunk from what crosses it.

    `passing` [tiles, C, Hkv] is what passes the whole chunk but for its decay. Grid: (blocks of heads * C,).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BLOCK_H)
    chunk = pid // blocks
    _, _, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    o_l, o_h = tl.arange(0, BLOCK_L), (pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_h = o_h < heads
    mask = (o_l < count)[:, None] & m_h[None, :]
    p_row = o_h[None, :] * num_rows + row + o_l[:, None]
    b_crossed = tl.load(crossed + p_row, mask=mask, other=0.0)
    b_put = tl.load(put + p_row, mask=mask, other=0.0)
    b_crossing = -b_crossed
    b_unit = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    for g in tl.range(0, group):
        p_own = (o_h[None, :] * group + g) * num_rows + row + o_l[:, None]
        b_crossing += tl.load(crossing + p_own, mask=mask, other=0.0)
        if unit is not None:
            b_unit += tl.load(unit + p_own, mask=mask, other=0.0)
    b_passing = tl.zeros([BLOCK_H], tl.float32)
    p_chunk = chunk.to(tl.int64) * heads + o_h
    passing += p_chunk
    for _ in tl.range(0, tiles):
        b_passing += tl.load(passing, mask=m_h, other=0.0)
        passing += num_chunks * heads
    total = tl.exp2(tl.load(end_hi + p_chunk, mask=m_h, other=0.0) + tl.load(end_lo + p_chunk, mask=m_h, other=0.0))
    through = b_passing * total
    b_decay = tl.cumsum(b_crossing, 0, reverse=True) + through[None, :] + tl.cumsum(b_put, 0) - b_put
    p_out = (row + o_l)[:, None] * heads + o_h[None, :]
    tl.store(d_decay + p_out, b_decay, mask=mask)
    tl.store(d_gain + p_out, b_crossed + tl.load(own + p_row, mask=mask, other=0.0) + b_put, mask=mask)
    if unit is not None:
        tl.store(d_m + p_out, b_unit, mask=mask)
