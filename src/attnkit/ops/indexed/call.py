"""The prepared call of the indexed operators: inputs of attention, and who may see whom."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import check_choice, check_dtype, dims
from attnkit._core.errors import OptionError, ShapeError, UnsupportedError
from attnkit.ops.attention.call import AttentionCall
from attnkit.ops.attention.call import prepare as prepare_attention

__all__ = ["IndexedCall", "Side", "prepare", "prepare_hash", "prepare_qk"]

CAUSAL = ("inclusive", "strict", None)
_INTS = (torch.int32, torch.int64)
_INT32 = torch.iinfo(torch.int32)


@dataclass
class Side:
    """What is known of the rows of queries, or of keys; None stands for what is the same for all.

    Attributes:
        pos: [N], [B, N] or [B, N, heads], or None: row i of queries stands on i + S - T, row j of keys on j.
        groups: of each round, shaped as positions, or None: one group.
        keep: bool, shaped as positions, or None: all.
    """

    pos: Tensor | None
    groups: tuple[Tensor, ...] | None
    keep: Tensor | None


@dataclass
class IndexedCall:
    """Checked arguments. A query sees a key of its own head (or group of heads) when both are kept, in one group, in order.

    Attributes:
        base: the call of dense attention over the same tensors.
        queries, keys: their rows.
        num_groups: groups are 0 .. num_groups - 1, and rows with another number are dropped.
        causal: "inclusive" (a key's position is at most the query's), "strict" (below it) or None.
    """

    base: AttentionCall
    queries: Side
    keys: Side
    num_groups: int
    causal: str | None

    @property
    def rounds(self) -> int:
        """How often rows are grouped."""
        return 1 if self.queries.groups is None else len(self.queries.groups)


def prepare(
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
) -> IndexedCall:
    """Check the arguments of `indexed_attention` (its docstring says what is raised)."""
    groups = None if q_group is None else (q_group,), None if k_group is None else (k_group,)
    queries, keys = Side(q_pos, groups[0], q_keep), Side(k_pos, groups[1], k_keep)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "return_lse": return_lse}
    return _checked(q, k, v, queries, keys, num_groups, causal, "group", "num_groups", options)


def prepare_qk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> IndexedCall:
    """Check the arguments of `qk_sparse_attention`."""
    options: dict[str, Any] = {"scale": scale, "return_lse": return_lse}
    order = "inclusive" if causal else None
    return _checked(q, k, v, Side(None, None, q_keep), Side(None, None, k_keep), None, order, "group", "num_groups", options)


def prepare_hash(
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
) -> IndexedCall:
    """Check the arguments of `hash_sparse_attention`."""
    rounds = tuple(tuple(t) if t.dim() == 4 else (t,) for t in (q_bucket, k_bucket))
    if len(rounds[0]) != len(rounds[1]) or not rounds[0]:
        raise ShapeError(
            f"q_bucket has {len(rounds[0])} rounds and k_bucket has {len(rounds[1])}; both need as many, 1 or more"
        )
    queries, keys = Side(None, rounds[0], q_keep), Side(None, rounds[1], k_keep)
    options: dict[str, Any] = {"scale": scale, "return_lse": return_lse}
    order = "inclusive" if self_attend else "strict"
    return _checked(q, k, v, queries, keys, num_buckets, order, "bucket", "num_buckets", options)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Side,
    keys: Side,
    num_groups: int | None,
    causal: str | None,
    noun: str,
    count: str,
    options: dict[str, Any],
) -> IndexedCall:
    if q.dim() != 4:
        raise ShapeError(f"q has shape {tuple(q.shape)}; expected [B, T, H, D]: packed sequences are groups here")
    base = prepare_attention(q, k, v, **options)
    check_choice("causal", causal, CAUSAL)
    if max(q[..., 0].numel(), k[..., 0].numel()) >= 2**31 - 1:
        raise UnsupportedError(
            f"q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)} have 2^31 rows or more over all heads"
        )
    for side, name, tensor, pattern in ((queries, "q", q, "B T H"), (keys, "k", k, "B S Hkv")):
        if side.pos is not None:
            _check_rows(f"{name}_pos", side.pos, tensor, pattern, *_INTS)
            _check_range(f"{name}_pos", side.pos, _INT32.min, _INT32.max, "they are kept in 32 bits")
        if side.keep is not None:
            _check_rows(f"{name}_keep", side.keep, tensor, pattern, torch.bool)
        for group in side.groups or ():
            _check_rows(f"{name}_{noun}", group, tensor, pattern, *_INTS)
    if (queries.groups is None) != (keys.groups is None):
        missing = f"q_{noun}" if queries.groups is None else f"k_{noun}"
        raise OptionError(f"{missing} is missing; queries and keys are grouped together or not at all")
    groups = _count_groups(queries, keys, num_groups, noun, count)
    if k.shape[0] * k.shape[2] * groups >= 2**31 - 1:
        raise UnsupportedError(
            f"{count}={groups} in {k.shape[0]} batch elements of {k.shape[2]} key heads are 2^31 groups or more"
        )
    return IndexedCall(base, queries, keys, groups, causal)


def _check_rows(name: str, tensor: Tensor, of: Tensor, pattern: str, *dtypes: torch.dtype) -> None:
    check_dtype(name, tensor, *dtypes)
    letters = {1: pattern.split()[1], 2: " ".join(pattern.split()[:2])}.get(tensor.dim(), pattern)
    dims(**{name[0]: (of, f"{pattern} D"), name: (tensor, letters)})
    if tensor.device != of.device:
        raise OptionError(f"{name} is on {tensor.device} but {name[0]} is on {of.device}; move one of them")


def _check_range(name: str, tensor: Tensor, low: int, high: int, why: str) -> None:
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or not tensor.numel():
        return  # reading values would wait for the device, or break the graph
    lowest, highest = int(tensor.min()), int(tensor.max())
    if lowest < low or highest > high:
        raise OptionError(f"{name} ranges over {lowest}..{highest}; allowed: {low}..{high}, since {why}")


def _count_groups(queries: Side, keys: Side, given: int | None, noun: str, count: str) -> int:
    if queries.groups is None or keys.groups is None:
        return 1
    groups = (*queries.groups, *keys.groups)
    if given is None:
        return max(0, *(int(t.max()) for t in groups if t.numel())) + 1 if any(t.numel() for t in groups) else 1
    if given < 1:
        raise OptionError(f"{count}={given} must be at least 1")
    for name, side in (("q", queries), ("k", keys)):
        for group in side.groups or ():
            _check_range(f"{name}_{noun}", group, _INT32.min, given - 1, f"{count} is {given}; below 0 a row is dropped")
    return given
