"""Device functions: which rows a tile holds, where they stand, and which keys (or queries) it walks over.

The same rules as `Plan`, without host work. Four kinds of rows (`ROWS`):

    "dense"      tile t of batch element b holds rows t * BLOCK ...; row i stands on key i + S - T.
    "packed"     tiles never cross sequences. Sequence s starts at tile cu[s] // BLOCK + s, which leaves it room for
                 ceil(length / BLOCK) tiles whatever the lengths are; tiles beyond its rows do nothing. Rows behind the last
                 boundary form one more sequence without a counterpart.
    "positions"  dense tiles whose rows stand on given keys, in any order.
    "indexed"    packed tiles whose rows stand on given keys, rising within a sequence. A row that stands before its
                 sequence's first key sees nothing. Where such tiles lie and what they walk over takes several searches, one
                 after another: the kernel `spans` does that for all tiles together.
"""

import triton
import triton.language as tl

__all__ = ["cut", "key_bounds", "key_tile", "live_rows", "load_span", "locate", "place", "spans"]


_NEAR = tl.constexpr(512)  # values around a guess, looked at together


@triton.jit
def _count_below(cu, i, hi, tile, BLOCK: tl.constexpr):
    first = tl.load(cu + i, mask=i < hi, other=0) // BLOCK + i
    return tl.sum(((i < hi) & (first < tile)).to(tl.int32))


@triton.jit
def _search(cu, hi, guess, tile, BLOCK: tl.constexpr):
    """The first i in [0, hi) whose sequence's first tile is not below `tile`, hi if there is none.

    A program can do nothing else before it knows, and a step is a load and a sum over threads: the first looks near a guess,
    where i lies as a rule, and each further one leaves one part of 128.
    """
    hi = tl.cast(hi, tl.int32)  # a 1 comes as a constant, which a loop cannot change
    start = tl.maximum(tl.minimum(guess, hi - _NEAR), 0)
    near = _count_below(cu, start + tl.arange(0, _NEAR), hi, tile, BLOCK)
    lo = tl.where(near > 0, start + near, 0)
    hi = tl.where(near < _NEAR, start + near, hi)
    while lo < hi:
        step = tl.cdiv(hi - lo, 128)
        below = _count_below(cu, lo + step * tl.arange(0, 128), hi, tile, BLOCK)
        hi = tl.minimum(hi, lo + below * step)
        lo += tl.maximum((below - 1) * step + 1, 0)
    return lo


@triton.jit
def locate(tile, cu, cu_other, num_seqs, length, length_other, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """First row of a tile, end of its rows' sequence, and the counterpart's range: (first, end, start_other, end_other).

    A tile whose first row is not below the end holds nothing.
    """
    if ROWS == "packed":
        used = (tl.load(cu + num_seqs) // BLOCK + num_seqs + 1).to(tl.float32)
        guess = (tile * (num_seqs / used)).to(tl.int32) - _NEAR // 2  # as if sequences were equally long
        i_seq = _search(cu, num_seqs + 1, guess, tile + 1, BLOCK) - 1
        extra = i_seq == num_seqs  # rows behind the last boundary
        begin = tl.load(cu + i_seq)
        end = tl.load(cu + i_seq + 1, mask=i_seq < num_seqs, other=0)
        first = begin + (tile - begin // BLOCK - i_seq) * BLOCK
        start_other = tl.load(cu_other + i_seq)
        end_other = tl.load(cu_other + i_seq + 1, mask=i_seq < num_seqs, other=0)
        return first, tl.where(extra, length, end), start_other, tl.where(extra, start_other, end_other)
    else:
        return tile * BLOCK, length, 0, length_other


@triton.jit
def key_bounds(low, high, start, end, left, right, WINDOW: tl.constexpr):
    """Key rows lo, full_lo, full_hi, hi for rows standing on low..high: each is seen by some row in [lo, hi), and by
    every row in [full_lo, full_hi)."""
    lo = start
    full_lo = start
    if WINDOW:
        lo = tl.minimum(tl.maximum(low - left, start), end)
        full_lo = tl.maximum(high - left, lo)
    hi = tl.maximum(tl.minimum(high + right + 1, end), lo)
    full_hi = tl.minimum(low + right + 1, hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_bounds(low, high, start, end, shift, left, right, WINDOW: tl.constexpr):
    """The same for the rows that see the keys low..high, where row i stands on key i + shift."""
    lo = tl.minimum(tl.maximum(low - right - shift, start), end)
    full_lo = tl.maximum(high - right - shift, lo)
    hi = end
    full_hi = end
    if WINDOW:
        hi = tl.maximum(tl.minimum(high + left - shift + 1, end), lo)
        full_hi = tl.minimum(low + left - shift + 1, hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def place(q_pos, offset, first, end, shift, o_row, m_row, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The key rows that the rows first + o_row stand on, and the lowest and highest of those that m_row keeps."""
    if ROWS == "positions":
        o_pos = tl.load(q_pos + offset + first + o_row, mask=m_row, other=0)
        low = tl.min(tl.where(m_row, o_pos, 1 << 30))
        high = tl.max(tl.where(m_row, o_pos, -(1 << 30)))
    else:
        o_pos = first + shift + o_row
        low = first + shift
        high = tl.minimum(first + BLOCK, end) - 1 + shift
    return o_pos, low, high


@triton.jit
def cut(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Steps of BLOCK over [lo, hi): masked up to the first cut, unmasked up to the second, masked again to the end."""
    head_end = lo
    if WINDOW:
        head_end = lo + tl.cdiv(full_lo - lo, BLOCK) * BLOCK
    return head_end, head_end + tl.maximum(full_hi - head_end, 0) // BLOCK * BLOCK


@triton.jit
def _search_each(values, lo, hi, bound, BLOCK: tl.constexpr):
    """For every element the first i in [lo, hi) with values[i] >= bound, hi if there is none.

    With BLOCK, values are boundaries of sequences and what is compared is the first tile of each.
    """
    longest = tl.max(hi - lo)
    while longest > 0:  # a search by halves
        middle = lo + (hi - lo) // 2
        open = lo < hi
        value = tl.load(values + middle, mask=open, other=0)
        if BLOCK:
            value = value // BLOCK + middle
        below = open & (value < bound)
        lo = tl.where(below, middle + 1, lo)
        hi = tl.where(open & (below == 0), middle, hi)
        longest = longest // 2
    return lo


@triton.jit
def spans(
    cu, cu_other, q_pos, found, num_seqs, num_tiles, length, left, right,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of "indexed" tiles in the order in which they run: found [num_tiles, 6] gets the first row, the end of its sequence, and
    of the other side the bounds lo, full_lo, full_hi, hi of `key_bounds` or, with KEYS, of `query_bounds`.

    Tiles of queries run from the last one, which sees the most keys, and those of keys from the first. In between, evenly, come
    those of rows behind the last boundary, which only write zeros: their waits cost nothing beside others' products. A tile
    with first >= end holds nothing.
    Grid: (blocks of BLOCK_T tiles,).
    """
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_tile = i < num_tiles
    used = tl.load(cu + num_seqs) // BLOCK + num_seqs
    idle = (num_tiles - used).to(tl.int64)
    behind = (i * idle // num_tiles).to(tl.int32)  # idle ones that ran before
    busy = i - behind
    if not KEYS:
        busy = used - 1 - busy
    tile = tl.where((i + 1) * idle // num_tiles > behind, used + behind, busy)
    none = tl.zeros_like(tile)
    i_seq = _search_each(cu, none, none + num_seqs + 1, tile + 1, BLOCK) - 1
    inner = i_seq < num_seqs
    begin = tl.load(cu + i_seq, mask=m_tile, other=0)
    end = tl.load(cu + i_seq + 1, mask=m_tile & inner, other=0)
    start_other = tl.load(cu_other + i_seq, mask=m_tile, other=0)
    end_other = tl.load(cu_other + i_seq + 1, mask=m_tile & inner, other=0)
    first = begin + (tile - begin // BLOCK - i_seq) * BLOCK
    end = tl.where(inner, end, length)
    end_other = tl.where(inner, end_other, start_other)
    last = tl.minimum(first + BLOCK, end) - 1
    some = m_tile & (first <= last)
    if KEYS:
        lo = _search_each(q_pos, start_other, end_other, first - right, 0)
        full_lo = _search_each(q_pos, lo, end_other, last - right, 0)
        hi = end_other
        full_hi = end_other
        if WINDOW:
            hi = _search_each(q_pos, lo, end_other, last + left + 1, 0)
            full_hi = _search_each(q_pos, lo, hi, first + left + 1, 0)
    else:
        low = tl.load(q_pos + first, mask=some, other=0)
        high = tl.load(q_pos + last, mask=some, other=0)
        lo, full_lo, full_hi, hi = key_bounds(low, high, start_other, end_other, left, right, WINDOW)
    found += i * 6
    tl.store(found, first, mask=m_tile)
    tl.store(found + 1, end, mask=m_tile)
    tl.store(found + 2, lo, mask=m_tile)
    tl.store(found + 3, full_lo, mask=m_tile)
    tl.store(found + 4, full_hi, mask=m_tile)
    tl.store(found + 5, hi, mask=m_tile)


@triton.jit
def load_span(found, i):
    """What `spans` found for the i-th tile: first, end, lo, full_lo, full_hi, hi."""
    found += i * 6
    return tl.load(found), tl.load(found + 1), tl.load(found + 2), tl.load(found + 3), tl.load(found + 4), tl.load(found + 5)


@triton.jit
def rows_near(q_pos, num_q, low, high, left, right, WINDOW: tl.constexpr):
    """The shortest run of rows that holds every row which sees one of the keys low..high, in whatever order rows stand."""
    lo = num_q
    hi = 0
    for first in range(0, num_q, 1024):
        row = first + tl.arange(0, 1024)
        m_row = row < num_q
        o_pos = tl.load(q_pos + row, mask=m_row, other=0)
        near = m_row & (o_pos + right >= low)
        if WINDOW:
            near = near & (o_pos - left <= high)
        lo = tl.minimum(lo, tl.min(tl.where(near, row, num_q)))
        hi = tl.maximum(hi, tl.max(tl.where(near, row + 1, 0)))
    return lo, tl.maximum(hi, lo)


@triton.jit
def key_tile(
    tile, cu_k, cu_q, q_pos, offset, spans, num_seqs, num_k, num_q, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """First key of a tile and end of its sequence, what its queries stand further on than their own number (unless q_pos says
    where they stand), and which of them it walks over: lo, full_lo, full_hi, hi."""
    shift = 0
    if ROWS == "indexed":
        first, end, lo, full_lo, full_hi, hi = load_span(spans, tile)
    else:  # keys are the rows here: their sequences lead, those of queries are the counterpart
        first, end, q_start, q_end = locate(
            tile, cu_k, cu_q, num_seqs, num_k, num_q, BLOCK_N, "dense" if ROWS == "positions" else ROWS
        )
        shift = end - q_end
        last = tl.minimum(first + BLOCK_N, end) - 1
        if ROWS == "positions":
            lo, hi = rows_near(q_pos + offset, num_q, first, last, left, right, WINDOW)
            full_lo, full_hi = hi, hi
        else:
            lo, full_lo, full_hi, hi = query_bounds(first, last, q_start, q_end, shift, left, right, WINDOW)
        if ROWS == "dense":
            lo = lo // BLOCK_M * BLOCK_M
    return first, end, shift, lo, full_lo, full_hi, hi


@triton.jit
def _listed(p_list, key, mask, capacity):
    """Which of the lists [n] of falling keys, each after its length, hold one key; those behind the mask do not."""
    low = tl.zeros(mask.shape, tl.int32)
    high = tl.load(p_list, mask=mask, other=0)
    while capacity > 0:  # a search by halves
        middle = (low + high) // 2
        open = low < high
        below = open & (tl.load(p_list + 1 + middle, mask=open, other=0) > key)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
        capacity = capacity // 2
    inside = mask & (low < tl.load(p_list, mask=mask, other=0))
    return inside & (tl.load(p_list + 1 + low, mask=inside, other=-1) == key)


@triton.jit
def live_rows(
    lists, stride, row_tiles, live, start, stop, key, shift, right, num_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of the tiles of rows start, start + BLOCK_M ... below stop, write to `live` those that have the keys from `key` on in
    their list, or among those that their forward pass saw behind a mask; returns how many. The lists of the tiles of rows lie
    in falling order.
    """
    count = 0
    for chunk in range(0, tl.cdiv(stop - start, BLOCK_M), 128):
        row = start + (chunk + tl.arange(0, 128)) * BLOCK_M
        m_row = row < stop
        found = key + BLOCK_N > num_k  # the last keys, which are never on a list
        tile = tl.minimum(row // BLOCK_M, row_tiles - 1)
        p_list = lists + (row_tiles - 1 - tile).to(tl.int64) * stride
        found = found | _listed(p_list, key, m_row, num_k // BLOCK_N + 1)
        found = found | (key >= (tile * BLOCK_M + shift + right + 1) // BLOCK_N * BLOCK_N)
        found = (found & m_row).to(tl.int32)
        tl.store(live + count + tl.cumsum(found, 0) - found, row, mask=found > 0)
        count += tl.sum(found)
    return count
