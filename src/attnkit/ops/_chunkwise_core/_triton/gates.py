"""Kernels over gates alone: sums of log decays inside chunks, and the running maximum of exponential gates. Float64 inside."""

import triton
import triton.language as tl

from attnkit.ops._chunkwise_core._triton.chunks import locate

__all__ = ["apply_units", "chunk_maxima", "chunk_sums", "running_maxima", "scan_maxima"]


@triton.jit
def chunk_sums(
    decay, gain, hi, lo, col_hi, col_lo, end_hi, end_lo, chunk_start, chunk_len,
    stride_db, stride_dt, stride_dh, stride_gb, stride_gt, stride_gh,
    num_rows, each, length, heads, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """hi, lo, col_hi and col_lo [Hkv, R] of decays and gains, and the sums of whole chunks [C, Hkv].

    Grid: (blocks of heads * C,).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BLOCK_H)
    chunk = pid // blocks
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    o_l, o_h = tl.arange(0, BLOCK_L), (pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_h = o_h < heads
    mask = (o_l < count)[:, None] & m_h[None, :]
    o_decay = batch * stride_db + (first + o_l)[:, None] * stride_dt + o_h[None, :] * stride_dh
    b_decay = tl.load(decay + o_decay, mask=mask, other=0.0).to(tl.float64) * 1.4426950408889634
    b = tl.cumsum(b_decay, 0)
    b_hi = b.to(tl.float32)
    b_lo = (b - b_hi.to(tl.float64)).to(tl.float32)
    p_row = o_h[None, :] * num_rows + row + o_l[:, None]
    tl.store(hi + p_row, b_hi, mask=mask)
    tl.store(lo + p_row, b_lo, mask=mask)
    if gain is not None:
        o_gain = batch * stride_gb + (first + o_l)[:, None] * stride_gt + o_h[None, :] * stride_gh
        b -= tl.load(gain + o_gain, mask=mask, other=0.0).to(tl.float64) * 1.4426950408889634
        b_hi = b.to(tl.float32)
        tl.store(col_hi + p_row, b_hi, mask=mask)
        closed = b == float("inf")
        rest = tl.where(closed, 0.0, b) - tl.where(closed, 0.0, b_hi).to(tl.float64)
        tl.store(col_lo + p_row, rest.to(tl.float32), mask=mask)
    total = tl.sum(b_decay, 0)
    t_hi = total.to(tl.float32)
    p_end = chunk.to(tl.int64) * heads + o_h
    tl.store(end_hi + p_end, t_hi, mask=m_h)
    tl.store(end_lo + p_end, (total - t_hi.to(tl.float64)).to(tl.float32), mask=m_h)


@triton.jit
def _higher(top, place, top_2, place_2):
    above = top_2 > top
    return tl.where(above, top_2, top), tl.where(above, place_2, place)


@triton.jit
def _then(total, top, place, total_2, top_2, place_2):
    """One stretch of rows after another: the sum of its log decays, the maximum it ends with, and the row that is from."""
    kept = top + total_2
    above = top_2 > kept
    return total + total_2, tl.where(above, top_2, kept), tl.where(above, place_2, place)


@triton.jit
def _rows_of_gates(log_f, i, batch, first, o_l, o_h, mask, stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih):
    """Sums of log decays of the rows of a chunk, and log weights relative to them, float64 [rows, heads]."""
    o_f = batch * stride_fb + (first + o_l)[:, None] * stride_ft + o_h[None, :] * stride_fh
    o_i = batch * stride_ib + (first + o_l)[:, None] * stride_it + o_h[None, :] * stride_ih
    b_f = tl.load(log_f + o_f, mask=mask, other=0.0).to(tl.float64)
    sums = tl.cumsum(b_f, 0)
    return tl.sum(b_f, 0), sums, tl.load(i + o_i, mask=mask, other=float("-inf")).to(tl.float64) - sums


@triton.jit
def chunk_maxima(
    log_f, i, whole, best, place, chunk_start, chunk_len,
    stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih, each, length, heads,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What each chunk does to the running maximum: [C, H] float64 `whole` is added to it, `best` is the least it ends with.

    `place` is the row that `best` comes from. Grid: (blocks of heads * C,).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BLOCK_H)
    chunk = pid // blocks
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    o_l, o_h = tl.arange(0, BLOCK_L), (pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_h = o_h < heads
    total, _, top = _rows_of_gates(
        log_f, i, batch, first, o_l, o_h, (o_l < count)[:, None] & m_h[None, :],
        stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih,
    )  # fmt: skip
    p_chunk = chunk.to(tl.int64) * heads + o_h
    tl.store(whole + p_chunk, total, mask=m_h)
    tl.store(best + p_chunk, tl.max(top, 0) + total, mask=m_h)
    tl.store(place + p_chunk, row + tl.argmax(top, 0), mask=m_h)


@triton.jit
def scan_maxima(whole, best, place, m0, m_last, first_chunk, each, heads, BLOCK_C: tl.constexpr):
    """`best` and `place` [C, H] become the running maximum after each chunk and the row it comes from, -1 for m0.

    m_last [N, H] float32 is the last of them. Grid: (N * H,).
    """
    pid = tl.program_id(0).to(tl.int64)
    head, seq = pid % heads, pid // heads
    if first_chunk is None:
        start, stop = seq * each, seq * each + each
    else:
        start, stop = tl.load(first_chunk + seq), tl.load(first_chunk + seq + 1)
    carried = tl.zeros([], tl.float64)
    if m0 is not None:
        carried += tl.load(m0 + pid).to(tl.float64)
    origin = tl.full([], -1, tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    for first in tl.range(start, stop, BLOCK_C):
        mask = first + o_c < stop
        p_chunk = (first + o_c) * heads + head
        b_whole = tl.load(whole + p_chunk, mask=mask, other=0.0)
        b_best = tl.load(best + p_chunk, mask=mask, other=float("-inf"))
        b_place = tl.load(place + p_chunk, mask=mask, other=-1)
        total, top, row = tl.associative_scan((b_whole, b_best, b_place), 0, _then)
        kept = total + carried
        row = tl.where(top > kept, row, origin)
        top = tl.maximum(top, kept)
        tl.store(best + p_chunk, top, mask=mask)
        tl.store(place + p_chunk, row, mask=mask)
        carried = tl.sum(tl.where(o_c == BLOCK_C - 1, top, 0.0), 0)
        origin = tl.sum(tl.where(o_c == BLOCK_C - 1, row, 0), 0)
    tl.store(m_last + pid, carried.to(tl.float32))


@triton.jit
def running_maxima(
    log_f, i, best, place, m0, m, source, chunk_seq, chunk_start, chunk_len, first_chunk,
    stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih, each, length, heads,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """m and `source` [R, H], contiguous, from the maxima after each chunk. Grid: (blocks of heads * C,)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BLOCK_H)
    chunk = pid // blocks
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    if count <= 0:
        return
    o_l, o_h = tl.arange(0, BLOCK_L), (pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_h = o_h < heads
    mask = (o_l < count)[:, None] & m_h[None, :]
    _, sums, top = _rows_of_gates(
        log_f, i, batch, first, o_l, o_h, mask, stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih
    )
    rows = (row + o_l)[:, None] + tl.zeros([1, BLOCK_H], tl.int64)
    top, rows = tl.associative_scan((top, rows), 0, _higher)
    seq, opens = batch, first == 0
    if chunk_seq is not None:
        seq = tl.load(chunk_seq + chunk)
        opens = chunk == tl.load(first_chunk + seq)
    p_chunk = chunk.to(tl.int64) * heads + o_h
    m_before = m_h & (opens == 0)
    before = tl.load(best + p_chunk - heads, mask=m_before, other=0.0)
    origin = tl.load(place + p_chunk - heads, mask=m_before, other=-1)
    if m0 is not None:
        before += tl.load(m0 + seq * heads + o_h, mask=m_h & opens, other=0.0).to(tl.float64)
    above = top > before[None, :]
    b_m = sums + tl.where(above, top, before[None, :])
    # the last row as the scan over chunks has it, to the last bit, since that is what the next chunk begins with
    b_m = tl.where((o_l == count - 1)[:, None], tl.load(best + p_chunk, mask=m_h, other=0.0)[None, :], b_m)
    p_row = (row + o_l)[:, None] * heads + o_h[None, :]
    tl.store(m + p_row, b_m.to(tl.float32), mask=mask)
    tl.store(source + p_row, tl.where(above, rows, origin[None, :]), mask=mask)


@triton.jit
def apply_units(
    log_f, i, m, m0, decay, gain, chunk_seq, chunk_start, chunk_len,
    stride_fb, stride_ft, stride_fh, stride_ib, stride_it, stride_ih, each, length, heads, num_seqs,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Log decays and log weights in units of exp(m), [R, H] contiguous. Grid: (blocks of heads * C,)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BLOCK_H)
    chunk = pid // blocks
    batch, first, count, row = locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L)
    o_l, o_h = tl.arange(0, BLOCK_L), (pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    mask = (o_l < count)[:, None] & (o_h < heads)[None, :]
    p_row = (row + o_l)[:, None] * heads + o_h[None, :]
    opens = first == 0
    seq = batch
    if chunk_seq is not None:
        seq = tl.minimum(tl.load(chunk_seq + chunk), num_seqs - 1)
        opens = (chunk == 0) | (tl.load(chunk_seq + tl.maximum(chunk - 1, 0)) != seq)
    inside = ((o_l > 0) | (opens == 0))[:, None]
    previous = tl.load(m + p_row - heads, mask=mask & inside, other=0.0)
    if m0 is not None:
        previous += tl.load(m0 + seq * heads + o_h[None, :] + o_l[:, None] * 0, mask=mask & (inside == 0), other=0.0)
    b_m = tl.load(m + p_row, mask=mask, other=0.0).to(tl.float64)
    o_f = batch * stride_fb + (first + o_l)[:, None] * stride_ft + o_h[None, :] * stride_fh
    o_i = batch * stride_ib + (first + o_l)[:, None] * stride_it + o_h[None, :] * stride_ih
    b_f = tl.load(log_f + o_f, mask=mask, other=0.0).to(tl.float64)
    b_i = tl.load(i + o_i, mask=mask, other=0.0).to(tl.float64)
    tl.store(decay + p_row, (b_f + previous.to(tl.float64) - b_m).to(tl.float32), mask=mask)
    tl.store(gain + p_row, (b_i - b_m).to(tl.float32), mask=mask)
