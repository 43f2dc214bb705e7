"""The kernel of outputs: what each row takes from the state before its chunk and from the rows of the chunk up to it."""

import triton
import triton.language as tl

from attnkit.ops._chunkwise_core._triton.chunks import between, least, load_rows, locate, tile_at

__all__ = ["outputs"]


@triton.jit
def outputs(
    q, k, v, hi, lo, col_hi, col_lo, m, states, sums, out, den, chunk_start, chunk_len,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    num_rows, each, length, heads, group, width, width_v, scale, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `out`, contiguous [R, H, Dv], and with NORM `den` [R, H].

    m, contiguous [R, Hkv], may be None: the least denominator is 1 then. Grid: (tiles of Dv * tiles of rows * H * C,).
    """
    pid = tl.program_id(0)
    tiles_v = tl.cdiv(width_v, BLOCK_V)
    TILES: tl.constexpr = BLOCK_L // BLOCK_M
    i_v, i_m = pid % tiles_v, pid // tiles_v % TILES
    head = (pid // tiles_v // TILES % heads).to(tl.int64)
    chunk = pid // tiles_v // TILES // heads
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    if i_m * BLOCK_M >= count:
        return
    kv_head = head // group
    o_m, o_d, o_v = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_row, m_d, m_v = o_m < count, o_d < width, o_v < width_v
    b_q = tile_at(q + batch * stride_qb + first * stride_qt + head * stride_qh, o_m, o_d, stride_qt, m_row, m_d)
    p_gate = kv_head * num_rows + row
    b_hi, b_lo = load_rows(hi + p_gate, lo + p_gate, o_m, m_row)
    faded = tl.exp2(b_hi) * tl.exp2(b_lo) * scale
    p_state = chunk.to(tl.int64) * (heads // group) + kv_head
    b_state = tile_at(states + p_state * width * width_v, o_d, o_v, width_v, m_d, m_v)
    acc = tl.dot(b_q, b_state, input_precision=PRECISION) * faded[:, None]
    b_den = tl.zeros([BLOCK_M], tl.float32)
    if NORM:
        b_n = tl.load(sums + p_state * width + o_d, mask=m_d, other=0.0)
        b_den = tl.sum(b_q.to(tl.float32) * b_n[None, :], 1) * faded
    k += batch * stride_kb + first * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + first * stride_vt + kv_head * stride_vh
    for start in tl.range(0, tl.minimum((i_m + 1) * BLOCK_M, count), BLOCK_M):
        o_n = start + tl.arange(0, BLOCK_M)
        m_key = o_n < count
        b_k = tile_at(k, o_n, o_d, stride_kt, m_key, m_d)
        b_v = tile_at(v, o_n, o_v, stride_vt, m_key, m_v)
        b_col_hi, b_col_lo = load_rows(col_hi + p_gate, col_lo + p_gate, o_n, m_key)
        see = (o_m[:, None] >= o_n[None, :]) & m_row[:, None]
        weight = between(b_hi[:, None], b_lo[:, None], b_col_hi[None, :], b_col_lo[None, :], see, b_q.dtype)
        prob = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (weight * scale)
        if NORM:
            b_den += tl.sum(prob, 1)
        acc = tl.dot(prob.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    if NORM:
        low = 1.0
        if m is not None:
            b_m = tl.load(m + (row + o_m) * (heads // group) + kv_head, mask=m_row, other=0.0)
            low = least(b_m)
        if i_v == 0:
            tl.store(den + (row + o_m) * heads + head, b_den, mask=m_row)
        acc = acc / (tl.maximum(tl.abs(b_den), low) + eps)[:, None]
    p_out = ((row + o_m) * heads + head) * width_v
    tl.store(out + p_out[:, None] + o_v[None, :], acc.to(out.dtype.element_ty), mask=m_row[:, None] & m_v[None, :])
