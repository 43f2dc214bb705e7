"""Attention of rows that carry a group and a position, and its two front ends: dropped rows, and hash buckets."""

from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.indexed.backends import BACKENDS
from attnkit.ops.indexed.call import IndexedCall, prepare, prepare_hash, prepare_qk

__all__ = ["hash_sparse_attention", "indexed_attention", "qk_sparse_attention"]


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    *,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    num_groups: int | None = None,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    causal: str | None = "inclusive",
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within groups, ordered by positions: a query sees the kept keys of its group that are not behind it.

    Exact for that pattern. Rows are sorted by group and position, and attention runs over ranges of sorted keys: its work is
    that of the pairs that are seen, up to whole tiles. Heads may differ in everything. A group may hold any rows, so packed
    sequences, buckets, documents and pruned heads are all groups.

    Args:
        q: [B, T, H, D], any strides.
        k: [B, S, Hkv, D]; H is a multiple of Hkv, and query head h uses key head h // (H / Hkv).
        v: [B, S, Hkv, Dv].
        q_pos: int32 or int64 (values of 32 bits), [T], [B, T] or [B, T, H], in any order; None: row i stands on i + S - T.
        k_pos: [S], [B, S] or [B, S, Hkv]; None: key j stands on j.
        q_group, k_group: int32 or int64, shaped as the positions; None: one group. A row with a group below 0 is dropped.
        num_groups: groups are numbered below it; on the CPU that is checked, elsewhere rows with larger numbers are dropped.
            None reads the largest number, which waits for a GPU; give it there, and under torch.compile.
        q_keep, k_keep: bool, shaped as the positions; False drops a row: a dropped query gives 0 and has no gradient, a dropped
            key is never read and has a gradient of 0. None: all are kept.
        causal: "inclusive": a query sees keys at positions up to its own; "strict": below its own; None: its whole group.
        scale: of the scores; None means 1/sqrt(D).
        softcap: c > 0 caps scaled scores smoothly, c * tanh(s / c).
        return_lse: also return the log-sum-exp; gradients flow through it.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv]; with return_lse also lse [B, T, H], natural logarithm, float32 (float64 with float64 inputs). Rows
        that see no key give 0 and -inf.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        UnsupportedError: a head width outside 16..256, or 2^31 rows over all heads.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: 2 * pairs * (D + Dv) operations for the pairs that are seen, over all heads, and ordering the rows: on
        a GPU, without positions and in up to 64 groups, rows are counted twice; otherwise there are two sorts. Memory is linear
        in T and S: the order of the rows; on the CPU also copies of q, k, v and out in that order.
    Source: Pagliardini et al. 2023 (arXiv:2306.01160); sorted ranges instead of scanned tiles are our own.

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    >>> documents = torch.tensor([0, 1, 0, 1, 1, 0])  # need not be contiguous
    >>> ops.indexed_attention(q, k, v, None, None, q_group=documents, k_group=documents, num_groups=2).shape
    torch.Size([1, 6, 2, 16])
    """
    call = prepare(
        q,
        k,
        v,
        q_pos,
        k_pos,
        q_group=q_group,
        k_group=k_group,
        num_groups=num_groups,
        q_keep=q_keep,
        k_keep=k_keep,
        causal=causal,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
    )
    return _run("indexed_attention", backend, call)


def qk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries and keys that each head keeps; the work is that of the pairs which are left.

    Args:
        q, k, v: [B, T, H, D], [B, S, Hkv, D] and [B, S, Hkv, Dv], as in `indexed_attention`.
        q_keep: bool [B, T, H] (or [T], [B, T]); a dropped query gives 0 and has no gradient.
        k_keep: bool [B, S, Hkv] (or [S], [B, S]); a dropped key is never read and has a gradient of 0.
        causal: query i sees the kept keys j <= i + S - T.
        scale, return_lse, backend: as in `indexed_attention`.
    Returns:
        out [B, T, H, Dv], and lse [B, T, H] with return_lse; 0 and -inf for dropped queries and those that see no key.
    Raises:
        The same as `indexed_attention`.
    Complexity: 2 * pairs * (D + Dv) operations; with shares a and b kept at random, a * b of dense attention's.
    Source: QK-sparse attention of Pagliardini et al. 2023 (arXiv:2306.01160).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    >>> q_keep, k_keep = torch.rand(2, 1, 6, 2) < 0.5
    >>> bool((ops.qk_sparse_attention(q, k, v, q_keep, k_keep)[~q_keep] == 0).all())
    True
    """
    call = prepare_qk(q, k, v, q_keep, k_keep, causal=causal, scale=scale, return_lse=return_lse)
    return _run("qk_sparse_attention", backend, call)


def hash_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bucket: Tensor,
    k_bucket: Tensor,
    *,
    num_buckets: int | None = None,
    self_attend: bool = True,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention within buckets: a query sees the earlier keys of its own bucket, all of them, whatever their number.

    Args:
        q, k, v: [B, T, H, D], [B, S, Hkv, D] and [B, S, Hkv, Dv], as in `indexed_attention`; query i stands on key i + S - T.
        q_bucket: int32 or int64 [B, T, H] (or [T], [B, T]), 0 .. num_buckets - 1; several rounds as [P, B, T, H]. Rows below 0
            are dropped.
        k_bucket: [B, S, Hkv] (or [S], [B, S]), or [P, B, S, Hkv].
        num_buckets: as `num_groups` of `indexed_attention`.
        self_attend: whether a query sees the key it stands on. False is Reformer's rule: the first token of a bucket sees
            nothing, and its output is 0.
        q_keep, k_keep: rows to drop, padding for one, as in `indexed_attention`.
        scale, return_lse, backend: as in `indexed_attention`.
    Returns:
        out [B, T, H, Dv], and lse [B, T, H] with return_lse. Of several rounds the results are merged by their LSE: a key that
        shares a bucket with a query in n rounds counts n times.
    Raises:
        The same as `indexed_attention`.
    Complexity: 2 * pairs * (D + Dv) operations a round; with buckets of equal size, 1 / num_buckets of dense attention's.
    Source: hash-sparse attention of Pagliardini et al. 2023 (arXiv:2306.01160); Kitaev et al. 2020 (arXiv:2001.04451).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    >>> bucket = torch.randint(0, 4, (1, 6, 2))
    >>> ops.hash_sparse_attention(q, k, v, bucket, bucket, num_buckets=4).shape
    torch.Size([1, 6, 2, 16])
    """
    call = prepare_hash(
        q,
        k,
        v,
        q_bucket,
        k_bucket,
        num_buckets=num_buckets,
        self_attend=self_attend,
        q_keep=q_keep,
        k_keep=k_keep,
        scale=scale,
        return_lse=return_lse,
    )
    return _run("hash_sparse_attention", backend, call)


def _run(name: str, backend: str, call: IndexedCall) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = choose(name, BACKENDS, backend, call).run(call)
    return (out, lse) if call.base.return_lse else out
