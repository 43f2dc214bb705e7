"""Functional operators on [B, T, H, D] tensors; packed sequences are [R, H, D] with cu_seqlens."""

from collections.abc import Callable
from typing import Any

from attnkit._core.dispatch import Explanation, explain_choice
from attnkit._core.errors import OptionError
from attnkit._core.opspec import OPS
from attnkit.ops.attention import spec as _attention
from attnkit.ops.attention.api import attention, query_sparse_attention
from attnkit.ops.indexed import spec as _indexed
from attnkit.ops.indexed.api import hash_sparse_attention, indexed_attention, qk_sparse_attention
from attnkit.ops.merge import SPEC as _MERGE
from attnkit.ops.merge import merge_partials

__all__ = [
    "OPS",
    "attention",
    "explain",
    "hash_sparse_attention",
    "indexed_attention",
    "merge_partials",
    "qk_sparse_attention",
    "query_sparse_attention",
]

for _spec in (*_attention.SPECS, _MERGE, *_indexed.SPECS):
    OPS.register(_spec.name, _spec)


def explain(op: str | Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any) -> Explanation:
    """Say which backend would run a call, and why the others would not, without running it.

    Args:
        op: an operator of `attnkit.ops`, or its name.
        args, kwargs: what the operator would be called with.
    Raises:
        OptionError: no such operator or backend.
        InputError: the call itself is wrong, as the operator would say.

    >>> import torch
    >>> from attnkit import ops
    >>> q = torch.randn(1, 8, 2, 16)
    >>> ops.explain(ops.attention, q, q, q, softcap=2.0).chosen
    'torch'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    spec = OPS[name]
    if not isinstance(op, str) and spec.function is not op:
        raise OptionError(f"{op!r} is not the attnkit operator of that name; give attnkit.ops.{name}")
    return explain_choice(name, spec.backends, backend, spec.prepare(*args, **kwargs))
