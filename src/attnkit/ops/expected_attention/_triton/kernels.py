"""Kernels of expected attention: the logits of a tile of keys for every query head of a group, and what is made of them."""

import triton
import triton.language as tl

__all__ = ["quadratic", "weigh"]


@triton.jit
def quadratic(
    x, first, second, rest, unit, scored, out, parts,
    num_keys, kv_heads, width, tiles,
    stride_xb, stride_xs, stride_xh, stride_cb, stride_ub, stride_eb, stride_es, stride_eh,
    LINEAR: tl.constexpr, SQUARE: tl.constexpr, SPLIT: tl.constexpr, SCORED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x . first + unit x . (second + rest) x for BLOCK_N rows of x [B, S, Hkv, D] and each of GROUP heads: out [B, H, S].

    The rows are read once; matrices go by, BLOCK_C columns at a time. With SPLIT a matrix is the sum of two of 16 bits; `unit`,
    a number a head, multiplies both where it is there. With SCORED rows that do not compete are -inf, and parts [B, H, tiles]
    is the LSE of each tile.
    """
    CHUNKS: tl.constexpr = BLOCK_D // BLOCK_C
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)  # batch and key head
    batch, kv_head = row // kv_heads, row % kv_heads
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < num_keys, o_d < width
    p_x = x + batch * stride_xb + kv_head * stride_xh + o_n.to(tl.int64)[:, None] * stride_xs
    keys = tl.load(p_x + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    wide = keys.to(tl.float32)
    there = m_n
    if SCORED:
        p_e = scored + batch * stride_eb + kv_head * stride_eh + o_n.to(tl.int64) * stride_es
        there = tl.load(p_e, mask=m_n, other=0) != 0
    total = tl.zeros([BLOCK_N], tl.float32)
    for step in range(GROUP * CHUNKS):
        own = kv_head * GROUP + step // CHUNKS  # the query head
        head = batch * kv_heads * GROUP + own
        o_c = (step % CHUNKS) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        if CHUNKS == 1:
            columns = wide
        else:
            columns = tl.load(p_x + o_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if SQUARE:
            o_m = batch * stride_cb + own * width * width + o_d[:, None] * width + o_c[None, :]
            m_m = m_d[:, None] & m_c[None, :]
            product = tl.dot(keys, tl.load(second + o_m, mask=m_m, other=0.0), input_precision=PRECISION)
            if SPLIT:
                product = tl.dot(keys, tl.load(rest + o_m, mask=m_m, other=0.0), product)
            if unit is not None:
                product *= tl.load(unit + batch * stride_ub + own)
        if LINEAR:
            product += tl.load(first + head * width + o_c, mask=m_c, other=0.0)[None, :]
        total = tl.where(step % CHUNKS == 0, 0.0, total) + tl.sum(product * columns, 1)
        done = step % CHUNKS == CHUNKS - 1
        logits = total
        if SCORED:
            logits = tl.where(there, total, float("-inf"))
            top = tl.max(tl.where(logits != logits, float("-inf"), logits), 0)  # a NaN comes back with the sum
            base = tl.where(top == float("-inf"), 0.0, top)
            mass = tl.sum(tl.exp(logits - base), 0)
            lse = tl.where(mass == 0, float("-inf"), base + tl.log(tl.where(mass == 0, 1.0, mass)))
            tl.store(parts + head * tiles + tile, lse, mask=done)
        tl.store(out + head * num_keys + o_n, logits, mask=m_n & done)


@triton.jit
def weigh(
    logits, parts, norms, v, scored, scores,
    num_keys, kv_heads, width, tiles, eps,
    stride_vb, stride_vs, stride_vh, stride_eb, stride_es, stride_eh,
    NORM: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scores [B, Hkv, S] of BLOCK_N keys: mean over the group of (probability + eps) times the size of the value.

    NORM is "l2" (of v), "output" (the root of norms [B, H, S]) or "none".
    """
    row = tl.program_id(1).to(tl.int64)
    batch, kv_head = row // kv_heads, row % kv_heads
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_keys
    o_p = tl.arange(0, BLOCK_P)
    score = tl.zeros([BLOCK_N], tl.float32)
    for g in range(GROUP):
        head = row * GROUP + g
        top = tl.full([BLOCK_P], float("-inf"), tl.float32)
        for start in range(0, tiles, BLOCK_P):
            part = tl.load(parts + head * tiles + start + o_p, mask=start + o_p < tiles, other=float("-inf"))
            top = tl.maximum(top, tl.where(part != part, float("-inf"), part))
        highest = tl.max(top, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, tiles, BLOCK_P):
            part = tl.load(parts + head * tiles + start + o_p, mask=start + o_p < tiles, other=float("-inf"))
            mass += tl.exp(part - base)
        whole = tl.sum(mass, 0)
        lse = base + tl.log(tl.where(whole == 0, 1.0, whole))  # of nothing where nothing competes
        own = tl.load(logits + head * num_keys + o_n, mask=m_n, other=float("-inf"))
        prob = tl.exp(own - lse) + eps
        if NORM == "output":
            prob *= tl.sqrt(tl.maximum(tl.load(norms + head * num_keys + o_n, mask=m_n, other=0.0), 0.0))
        score += prob / GROUP
    if NORM == "l2":
        o_d = tl.arange(0, BLOCK_D)
        p_v = v + batch * stride_vb + kv_head * stride_vh + o_n.to(tl.int64)[:, None] * stride_vs + o_d[None, :]
        values = tl.load(p_v, mask=m_n[:, None] & (o_d < width)[None, :], other=0.0).to(tl.float32)
        score *= tl.sqrt(tl.sum(values * values, 1))
    p_e = scored + batch * stride_eb + kv_head * stride_eh + o_n.to(tl.int64) * stride_es
    there = tl.load(p_e, mask=m_n, other=0) != 0
    tl.store(scores + row * num_keys + o_n, tl.where(there, score, float("-inf")), mask=m_n)
