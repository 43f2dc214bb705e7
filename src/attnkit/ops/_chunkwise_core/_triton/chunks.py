"""Device functions that the kernels share: where a chunk lies, tiles of rows, what is left of one row at another.

Sums of log decays are in base-2 logarithms, from the first row of the chunk on, each as two float32 numbers, hi + lo: after one
large decay the sums are large and their differences small. col_hi and col_lo are the same sum less the logarithm of the row's
weight.
"""

import triton
import triton.language as tl

from attnkit._core.triton.maths import LN2

__all__ = ["between", "least", "load_rows", "locate", "put_weight", "tile_at"]


@triton.jit
def locate(chunk, chunk_start, chunk_len, each, length, BLOCK_L: tl.constexpr):
    """Batch, first row in it, rows, and first row of all, of a chunk; without tables, of sequences of one length."""
    if chunk_start is None:
        batch = (chunk // each).to(tl.int64)
        first = (chunk % each * BLOCK_L).to(tl.int64)
        return batch, first, tl.minimum(length - first, BLOCK_L).to(tl.int32), batch * length + first
    else:
        first = tl.load(chunk_start + chunk)
        return first * 0, first, tl.load(chunk_len + chunk).to(tl.int32), first


@triton.jit
def tile_at(x, o_row, o_col, stride_row, m_row, m_col):
    """[rows, columns] of x, 0 where masked."""
    return tl.load(x + o_row[:, None] * stride_row + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def load_rows(hi, lo, o_row, m_row):
    """Both parts of a sum of log decays for some rows, 0 where masked."""
    return tl.load(hi + o_row, mask=m_row, other=0.0), tl.load(lo + o_row, mask=m_row, other=0.0)


@triton.jit
def between(hi_i, lo_i, col_hi, col_lo, see, dtype: tl.constexpr):
    """exp(b_i - b_j + a_j) where row i sees row j, else 0; arguments broadcast. `dtype` is what will be multiplied."""
    high, low = hi_i - col_hi, lo_i - col_lo
    t = tl.where(see, high + low, float("-inf"))
    weight = tl.exp2(t)
    if dtype == tl.float32:  # what the sum lost is a part of the result
        some = t > float("-inf")
        lost = tl.where(some, low, 0.0) - (tl.where(some, t, 0.0) - tl.where(some, high, 0.0))
        weight += weight * (LN2 * lost)
    return weight


@triton.jit
def least(m):
    """exp(-m) for m of any size: what float32 would lose of m's product with log2(e) is a part of the result."""
    y = m.to(tl.float64) * -1.4426950408889634
    whole = tl.floor(y)
    return tl.exp2(whole.to(tl.float32)) * tl.exp2((y - whole).to(tl.float32))


@triton.jit
def put_weight(end_hi, end_lo, col_hi, col_lo, m_row):
    """exp(e - b_j + a_j), what is left at the end of the chunk of what a row puts in; 0 where masked."""
    return tl.exp2(tl.where(m_row, (end_hi - col_hi) + (end_lo - col_lo), float("-inf")))
