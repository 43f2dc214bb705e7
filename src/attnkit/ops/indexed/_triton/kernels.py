"""The kernel of a counting sort of rows by sequence, run twice: it counts, and when counts are summed up it places.

Rows come in the order of their positions, so that a row's place is the number of rows in earlier sequences and of earlier rows
in its own. A tile holds the queries and the keys of BLOCK_R / SHARE positions and BLOCK_H key heads; both sides end at the same
position. Row r of a tile is query head r % SHARE of those that share a key head, which keeps the queries of a sequence in their
order; SHARE is a power of two, and what is beyond the heads there are is masked. Keys are the rows of share 0.

Four groups are counted in the bytes of one number of 32 bits, which is enough for 255 rows. Counts of sequences stand by (batch
element, key head, group, tile), behind them those of dropped rows by blocks of BLOCK_F rows of all heads; first queries, then
keys. The sums are of all counts before one.
"""

import triton
import triton.language as tl

__all__ = ["order"]


@triton.jit
def _groups(
    group, keep, batch, token, head, there, num_groups,
    stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh,
):  # fmt: skip
    """The groups of rows, int32; -1 where one is dropped or not there."""
    batch, token, head = batch.to(tl.int64), token.to(tl.int64), head.to(tl.int64)
    found = tl.where(there, 0, -1)
    if group is not None:
        value = tl.load(group + batch * stride_gb + token * stride_gt + head * stride_gh, mask=there, other=-1)
        found = tl.where((value >= 0) & (value < num_groups), value, -1).to(tl.int32)
    if keep is not None:
        kept = tl.load(keep + batch * stride_kb + token * stride_kt + head * stride_kh, mask=there, other=0)
        found = tl.where(kept != 0, found, -1)
    return found


@triton.jit
def _rows(tile, kv_head, num_rows, end, heads, kv_heads, BLOCK_R: tl.constexpr, SHARE: tl.constexpr):
    """Tokens [R, 1] and heads [R, H] of a tile, and which of them there are; the last token stands at `end` - 1."""
    o_r = tl.arange(0, BLOCK_R)[:, None]
    token = tile * (BLOCK_R // SHARE) + o_r // SHARE + num_rows - end
    shared = heads // kv_heads
    there = (token >= 0) & (token < num_rows) & (o_r % SHARE < shared) & (kv_head < kv_heads)[None, :]
    return token, kv_head[None, :] * shared + o_r % SHARE, there


@triton.jit
def _marks(group, BLOCK_W: tl.constexpr):
    """[R, H] -> [R, H, BLOCK_W]: 1 in byte group % 4 of word group // 4. Sums over rows are counts of each group."""
    own = tl.arange(0, BLOCK_W)[None, None, :] == (group >> 2)[:, :, None]
    return tl.where(own, (1 << ((group & 3) * 8))[:, :, None], 0)


@triton.jit
def _of_group(sums, group, BLOCK_W: tl.constexpr):
    """[R, H]: of sums [R, H, BLOCK_W] of marks the byte of each row's group."""
    own = tl.arange(0, BLOCK_W)[None, None, :] == (group >> 2)[:, :, None]
    return (tl.sum(tl.where(own, sums, 0), 2) >> ((group & 3) * 8)) & 255


@triton.jit
def _order_dropped(
    group, keep, block, batch, num_rows, heads, num_groups,
    stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh,
    counts, surplus, rows, pos, last, PLACE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Count or place the dropped ones of a block of rows, which are numbered over [B, N, heads]."""
    row = block * BLOCK_F + tl.arange(0, BLOCK_F)
    there = row < batch * num_rows * heads
    token = row // heads
    found = _groups(
        group, keep, token // num_rows, token % num_rows, row % heads, there, num_groups,
        stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh,
    )  # fmt: skip
    dropped = there & (found < 0)
    if PLACE:
        at = tl.load(counts + block) + tl.cumsum(dropped.to(tl.int32), 0) - surplus - 1
        tl.store(rows + at, row, mask=dropped)
        if pos is not None:
            tl.store(pos + at, last, mask=dropped)
    else:
        tl.store(counts + 1 + block, tl.sum(dropped.to(tl.int32)))


@triton.jit
def order(
    q_group, q_keep, k_group, k_keep, counts, queries, keys, cu_q, cu_k, q_pos,
    batch, num_q, num_k, heads, kv_heads, num_groups, tiles, q_blocks,
    stride_qgb, stride_qgt, stride_qgh, stride_qkb, stride_qkt, stride_qkh,
    stride_kgb, stride_kgt, stride_kgh, stride_kkb, stride_kkt, stride_kkh,
    PLACE: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    BLOCK_R: tl.constexpr, SHARE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write `counts` behind a leading 0, or with PLACE read their sums and write an `Order`.

    Programs: one for each tile, then one for each block of queries that may be dropped, then for those of keys.
    """
    pid = tl.program_id(0)
    head_blocks = tl.cdiv(kv_heads, BLOCK_H)
    dropped_q = batch * kv_heads * num_groups * tiles  # where counts of dropped queries begin
    first_k = dropped_q + q_blocks
    dropped_k = first_k + dropped_q
    rows_q = batch * num_q * heads  # which sums over counts of keys hold too
    block = pid - batch * tiles * head_blocks
    if block < 0:
        tile = pid // head_blocks % tiles
        b = pid // head_blocks // tiles
        kv_head = pid % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        end = tl.maximum(num_q, num_k)
        token, head, there = _rows(tile, kv_head, num_q, end, heads, kv_heads, BLOCK_R, SHARE)
        group = _groups(
            q_group, q_keep, b, token, head, there, num_groups,
            stride_qgb, stride_qgt, stride_qgh, stride_qkb, stride_qkt, stride_qkh,
        )  # fmt: skip
        # a key that its own position does not see stands one further on
        token_k, head_k, there = _rows(tile, kv_head, num_k, end + STRICT, kv_heads, kv_heads, BLOCK_R, SHARE)
        group_k = _groups(
            k_group, k_keep, b, token_k, head_k, there, num_groups,
            stride_kgb, stride_kgt, stride_kgh, stride_kkb, stride_kkt, stride_kkh,
        )  # fmt: skip
        marks, marks_k = _marks(group, BLOCK_W), _marks(group_k, BLOCK_W)
        sequence = (b * kv_heads + kv_head) * num_groups
        if PLACE:
            marks, marks_k = tl.cumsum(marks, 0), tl.cumsum(marks_k, 0)
            m_q, m_k = group >= 0, group_k >= 0
            p_q = counts + (sequence[None, :] + group) * tiles + tile
            at = tl.load(p_q, mask=m_q, other=0) + _of_group(marks, group, BLOCK_W) - 1
            if CAUSAL:
                seen = tl.load(p_q + first_k, mask=m_q, other=0) + _of_group(marks_k, group, BLOCK_W)
            else:
                seen = tl.load(p_q + first_k + tiles - tile, mask=m_q, other=0)
            tl.store(queries + at, (b * num_q + token) * heads + head, mask=m_q)
            tl.store(q_pos + at, seen - rows_q - 1, mask=m_q)
            p_k = counts + first_k + (sequence[None, :] + group_k) * tiles + tile
            at = tl.load(p_k, mask=m_k, other=0) + _of_group(marks_k, group_k, BLOCK_W) - rows_q - 1
            tl.store(keys + at, (b * num_k + token_k) * kv_heads + head_k, mask=m_k)
            if tile == 0:
                o_g = tl.arange(0, 4 * BLOCK_W)[None, :]
                seq = sequence[:, None] + o_g
                m_s = (kv_head < kv_heads)[:, None] & (o_g < num_groups)
                tl.store(cu_q + seq, tl.load(counts + seq * tiles, mask=m_s, other=0), mask=m_s)
                tl.store(cu_k + seq, tl.load(counts + first_k + seq * tiles, mask=m_s, other=0) - rows_q, mask=m_s)
            if pid == 0:
                last = batch * kv_heads * num_groups
                tl.store(cu_q + last, tl.load(counts + dropped_q))
                tl.store(cu_k + last, tl.load(counts + dropped_k) - rows_q)
        else:
            o_f = tl.arange(0, 4)[None, None, :]
            o_g = tl.arange(0, BLOCK_W)[None, :, None] * 4 + o_f
            m_s = (kv_head < kv_heads)[:, None, None] & (o_g < num_groups)
            p_c = counts + 1 + (sequence[:, None, None] + o_g) * tiles + tile
            tl.store(p_c, (tl.sum(marks, 0)[:, :, None] >> (o_f * 8)) & 255, mask=m_s)
            tl.store(p_c + first_k, (tl.sum(marks_k, 0)[:, :, None] >> (o_f * 8)) & 255, mask=m_s)
            if pid == 0:
                tl.store(counts, 0)
    elif block < q_blocks:
        seen_at_most = batch * num_k * kv_heads
        if PLACE and STRICT:
            seen_at_most = tl.load(counts + dropped_k) - rows_q
        _order_dropped(
            q_group, q_keep, block, batch, num_q, heads, num_groups,
            stride_qgb, stride_qgt, stride_qgh, stride_qkb, stride_qkt, stride_qkh,
            counts + dropped_q, 0, queries, q_pos, seen_at_most - 1, PLACE, BLOCK_F,
        )  # fmt: skip
    else:
        _order_dropped(
            k_group, k_keep, block - q_blocks, batch, num_k, kv_heads, num_groups,
            stride_kgb, stride_kgt, stride_kgh, stride_kkb, stride_kkt, stride_kkh,
            counts + dropped_k, rows_q, keys, None, 0, PLACE, BLOCK_F,
        )  # fmt: skip
