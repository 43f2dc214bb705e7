"""One token of a recurrence: a program reads some columns of a state, writes the new ones and reads them for its queries.

Reading and writing S once is all that a step costs; gates, n and m are computed in every program of a head, and written by
the first. `GATES` is "exp" (with m), "sigmoid" or "decay" (`f` is the log decay, and there is no `i`). Columns of a tile do
not depend on how many states there are, so that neither do results.

With EARLY the next launch may begin while programs of this one still run, if it is made for that: it then waits before it
reads anything. Steps are so short that beginning one takes a tenth of its time.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attnkit._core.triton.maths import LN2, LOG2E, log2_1p
from attnkit.ops._chunkwise_core import gates

__all__ = ["step"]

LOWEST = tl.constexpr(gates.LOWEST)


@triton.jit
def logsigmoid(x):
    """log(sigmoid(x)), float32, also where x is infinite."""
    return tl.minimum(x, 0.0) - LN2 * log2_1p(tl.exp2(-LOG2E * tl.abs(x)))


@triton.jit
def larger(a, b):
    """The larger of two; NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def step(
    q, k, v, i, f, S, n, m, out, S_new, n_new, m_new,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ib, stride_ih, stride_fb, stride_fh,
    stride_Sb, stride_Sh, stride_Sd, stride_nb, stride_nh, stride_mb, stride_mh,
    heads, width, width_v, scale, eps,
    GATES: tl.constexpr, NORMALIZE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tiles = tl.cdiv(width_v, BLOCK_V)
    state = (tl.program_id(0) // tiles).to(tl.int64)  # of B * Hkv
    tile = tl.program_id(0) % tiles
    b, h = state // heads, state % heads
    o_g, o_v = tl.arange(0, BLOCK_G), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < width_v
    first = tile == 0

    log_f = tl.load(f + b * stride_fb + h * stride_fh).to(tl.float32)
    if GATES != "decay":
        log_f = logsigmoid(log_f)
    log_f = larger(log_f, LOWEST)
    put, least = 1.0, 1.0
    if GATES == "exp":
        log_i, m_old = tl.load(i + b * stride_ib + h * stride_ih).to(tl.float32), tl.load(m + b * stride_mb + h * stride_mh)
        m_now = larger(log_f + m_old, log_i)
        tl.store(m_new + state, m_now, mask=first)
        put, least = tl.exp2(LOG2E * (log_i - m_now)), tl.exp2(-LOG2E * m_now)
        log_f = log_f + m_old - m_now
    elif GATES == "sigmoid":
        put = tl.exp2(LOG2E * logsigmoid(tl.load(i + b * stride_ib + h * stride_ih).to(tl.float32)))
    keep = tl.exp2(LOG2E * log_f)

    v_row = tl.load(v + b * stride_vb + h * stride_vh + o_v, mask=m_v, other=0.0).to(tl.float32)
    S += b * stride_Sb + h * stride_Sh
    S_new += state * width * width_v
    acc, den = tl.zeros([BLOCK_G, BLOCK_V], tl.float32), tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        m_S = m_d[:, None] & m_v[None, :]
        part = tl.load(S + o_d[:, None] * stride_Sd + o_v[None, :], mask=m_S, other=0.0)
        k_put = put * tl.load(k + b * stride_kb + h * stride_kh + o_d, mask=m_d, other=0.0).to(tl.float32)
        part = keep * part + k_put[:, None] * v_row[None, :]
        tl.store(S_new + o_d[:, None] * width_v + o_v[None, :], part, mask=m_S)
        if NORMALIZE:
            n_part = keep * tl.load(n + b * stride_nb + h * stride_nh + o_d, mask=m_d, other=0.0) + k_put
            tl.store(n_new + state * width + o_d, n_part, mask=m_d & first)
        for g in range(GROUP):
            q_row = tl.load(q + b * stride_qb + (h * GROUP + g) * stride_qh + o_d, mask=m_d, other=0.0)
            q_row = scale * q_row.to(tl.float32)
            acc += tl.where((o_g == g)[:, None], tl.sum(q_row[:, None] * part, 0)[None, :], 0.0)
            if NORMALIZE:
                den += tl.where(o_g == g, tl.sum(q_row * n_part, 0), 0.0)
    if NORMALIZE:
        acc = acc / (larger(tl.abs(den), least) + eps)[:, None]
    rows = (state * GROUP + o_g)[:, None] * width_v
    tl.store(out + rows + o_v[None, :], acc.to(out.dtype.element_ty), mask=(o_g < GROUP)[:, None] & m_v[None, :])
