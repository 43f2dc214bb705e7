"""The walk over chunks: states before each of them, and backwards their gradients. No atomics."""

import triton
import triton.language as tl

from attnkit.ops._chunkwise_core._triton.chunks import load_rows, put_weight, tile_at

__all__ = ["merge", "walk"]


@triton.jit
def walk(
    x, y, hi, lo, col_hi, col_lo, end_hi, end_lo, ratio, delta, start, start_n, states, rest, sums, last, last_n, left,
    other, other_n, passing, cu_rows, first_chunk,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, num_rows, num_chunks, each, length, heads, group,
    segments, width, width_v, scale,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_K, BLOCK_V] of a head's state through the chunks of a segment of a sequence.

    Forward x is k, y is v, and `states` [C, Hkv, D, Dv] gets the state before each chunk. REVERSE: x is q, y the gradient of
    outputs, `ratio` and `delta` [H, R] what the normaliser makes of it, and `states` gets the gradient of the state after each
    chunk, `rest` (or None) what rounding takes from it; `passing` [tiles, C, Hkv] the sum of its products with `other`, the
    state before.
    `start` and `last` [N segments, Hkv, D, Dv] float32 are the tile at both ends, `left` [N segments, Hkv] what decays leave.
    The same with n [.., D] for `sums`, `start_n`, `last_n`, `other_n`. Grid: (tiles of Dv * tiles of D * Hkv * segments * N,).
    """
    pid = tl.program_id(0)
    tiles_v, tiles_k = tl.cdiv(width_v, BLOCK_V), tl.cdiv(width, BLOCK_K)
    i_v, i_k = pid % tiles_v, pid // tiles_v % tiles_k
    head = (pid // (tiles_v * tiles_k) % heads).to(tl.int64)
    piece = (pid // (tiles_v * tiles_k) // heads).to(tl.int64)
    seq, segment = piece // segments, (piece % segments).to(tl.int32)
    if cu_rows is None:
        batch, row_0, chunk_0, rows, chunks = seq, seq * length, seq * each, length, each
        base = row_0 * 0
    else:
        batch, row_0, chunk_0 = seq * 0, tl.load(cu_rows + seq), tl.load(first_chunk + seq)
        rows, chunks = (
            (tl.load(cu_rows + seq + 1) - row_0).to(tl.int32),
            (tl.load(first_chunk + seq + 1) - chunk_0).to(tl.int32),
        )
        base = row_0
    a_piece = tl.cdiv(chunks, segments)
    begin = tl.minimum(segment * a_piece, chunks)
    count = tl.minimum(begin + a_piece, chunks) - begin

    o_k, o_v, o_r = i_k * BLOCK_K + tl.arange(0, BLOCK_K), i_v * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    m_k, m_v = o_k < width, o_v < width_v
    o_state = o_k[:, None] * width_v + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    p_piece = piece * heads + head
    acc, acc_n = tl.zeros([BLOCK_K, BLOCK_V], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    if start is not None:
        acc = tl.load(start + p_piece * width * width_v + o_state, mask=m_state, other=0.0)
        if NORM:
            acc_n = tl.load(start_n + p_piece * width + o_k, mask=m_k, other=0.0)
    x += batch * stride_xb + base * stride_xt + head * group * stride_xh
    y += batch * stride_yb + base * stride_yt + head * group * stride_yh
    p_gate = head * num_rows + row_0
    kept = 1.0
    SUBS: tl.constexpr = BLOCK_L // BLOCK_R
    ENTRY: tl.constexpr = SUBS - 1 if REVERSE else 0
    for t in tl.range(0, count * SUBS * group):
        g = t % group
        step = t // group
        if REVERSE:
            step = count * SUBS - 1 - step
        enters = (step % SUBS == ENTRY) & (g == 0)
        chunk = begin + step // SUBS
        p_chunk = (chunk_0 + chunk) * heads + head
        b_end_hi, b_end_lo = tl.load(end_hi + p_chunk), tl.load(end_lo + p_chunk)
        total = tl.where(enters, tl.exp2(b_end_hi) * tl.exp2(b_end_lo), 1.0)
        o_row = (step + begin * SUBS) * BLOCK_R + o_r
        m_row = o_row < rows
        b_x = tile_at(x + g * stride_xh, o_row.to(tl.int64), o_k, stride_xt, m_row, m_k)
        b_y = tile_at(y + g * stride_yh, o_row.to(tl.int64), o_v, stride_yt, m_row, m_v)
        if enters:
            if states is not None:
                b_state = acc.to(states.dtype.element_ty)
                tl.store(states + p_chunk * width * width_v + o_state, b_state, mask=m_state)
                if rest is not None:
                    b_rest = acc - b_state.to(tl.float32)
                    tl.store(rest + p_chunk * width * width_v + o_state, b_rest.to(rest.dtype.element_ty), mask=m_state)
                if NORM and i_v == 0:
                    tl.store(sums + p_chunk * width + o_k, acc_n, mask=m_k)
            if passing is not None:
                b_other = tl.load(other + p_chunk * width * width_v + o_state, mask=m_state, other=0.0)
                passed = tl.sum(tl.sum(acc * b_other, 1), 0)
                if NORM and i_v == 0:
                    passed += tl.sum(acc_n * tl.load(other_n + p_chunk * width + o_k, mask=m_k, other=0.0), 0)
                tl.store(passing + (i_k * tiles_v + i_v).to(tl.int64) * num_chunks * heads + p_chunk, passed)
        if REVERSE:
            b_hi, b_lo = load_rows(hi + p_gate, lo + p_gate, o_row, m_row)
            faded = tl.where(m_row, tl.exp2(b_hi) * tl.exp2(b_lo) * scale, 0.0)
            weight = faded
            if NORM:
                p_own = (head * group + g) * num_rows + row_0
                b_ratio, b_delta = load_rows(ratio + p_own, delta + p_own, o_row, m_row)
                weight = faded * b_ratio
            b_xw = b_x.to(tl.float32) * weight[:, None]
            if NORM:  # rounded as in the product below: both sums make one small difference in the gradients of gates
                own = b_delta / tl.where(b_ratio > 0, b_ratio, 1.0)  # neither where 1 over a denominator is nothing
                acc_n = acc_n * total + tl.sum(b_xw.to(b_y.dtype).to(tl.float32) * own[:, None], 0)
        else:
            b_hi, b_lo = load_rows(col_hi + p_gate, col_lo + p_gate, o_row, m_row)
            b_xw = b_x.to(tl.float32) * put_weight(b_end_hi, b_end_lo, b_hi, b_lo, m_row)[:, None]
            if NORM:
                acc_n = acc_n * total + tl.sum(b_xw, 0)
        kept *= total
        acc = tl.dot(tl.trans(b_xw.to(b_y.dtype)), b_y, acc * total, input_precision=PRECISION)
    if last is not None:
        tl.store(last + p_piece * width * width_v + o_state, acc, mask=m_state)
        if NORM and i_v == 0:
            tl.store(last_n + p_piece * width + o_k, acc_n, mask=m_k)
    if left is not None and pid % (tiles_v * tiles_k) == 0:
        tl.store(left + p_piece, kept)


@triton.jit
def merge(start, totals, left, before, last, heads, segments, size, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """What there is before each segment, `before` [N, segments, Hkv, size], and in the end, from what each of them adds.

    Grid: (blocks of size * Hkv * N,).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    o = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    head, seq = pid // blocks % heads, (pid // blocks // heads).to(tl.int64)
    mask = o < size
    acc = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        acc = tl.load(start + (seq * heads + head) * size + o, mask=mask, other=0.0)
    for step in tl.range(0, segments):
        segment = segments - 1 - step if REVERSE else step
        p_piece = (seq * segments + segment) * heads + head
        tl.store(before + p_piece * size + o, acc, mask=mask)
        acc = acc * tl.load(left + p_piece) + tl.load(totals + p_piece * size + o, mask=mask, other=0.0)
    tl.store(last + (seq * heads + head) * size + o, acc, mask=mask)
