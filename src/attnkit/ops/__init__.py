"""Functional operators on [B, T, H, D] tensors; packed sequences are [R, H, D] with cu_seqlens."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from attnkit._core.dispatch import Explanation, explain_choice
from attnkit._core.errors import OptionError
from attnkit._core.opspec import OPS, OpSpec
from attnkit.ops._chunkwise_core.layout import ChunkLayout
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.attention.api import attention, query_sparse_attention
from attnkit.ops.entmax.api import entmax, entmax15, entmax_loss, entmax_threshold, sparsemax
from attnkit.ops.entmax_attention.api import EntmaxAttentionResult, entmax_attention
from attnkit.ops.entmax_attention.sparsity import attention_sparsity
from attnkit.ops.expected_attention.api import expected_attention_scores
from attnkit.ops.expected_attention.moments import future_query_moments
from attnkit.ops.indexed.api import hash_sparse_attention, indexed_attention, qk_sparse_attention
from attnkit.ops.indexed.call import IndexedCall
from attnkit.ops.indexed.occupancy import Occupancy, measure
from attnkit.ops.merge import merge_partials
from attnkit.ops.mlstm.api import mlstm, mlstm_parallel, mlstm_recurrent, mlstm_step
from attnkit.ops.query_moments.api import query_moments
from attnkit.ops.ragged_decode.api import ragged_decode_attention
from attnkit.ops.ragged_decode.pages import KVPages
from attnkit.ops.scalar_decay.api import lightning_attention, lightning_slopes, scalar_decay_attention, scalar_decay_step

__all__ = [
    "OPS",
    "ChunkLayout",
    "EntmaxAttentionResult",
    "KVPages",
    "Occupancy",
    "RecurrentState",
    "attention",
    "attention_sparsity",
    "entmax",
    "entmax15",
    "entmax_attention",
    "entmax_loss",
    "entmax_threshold",
    "expected_attention_scores",
    "explain",
    "future_query_moments",
    "hash_sparse_attention",
    "indexed_attention",
    "lightning_attention",
    "lightning_slopes",
    "merge_partials",
    "mlstm",
    "mlstm_parallel",
    "mlstm_recurrent",
    "mlstm_step",
    "occupancy",
    "qk_sparse_attention",
    "query_moments",
    "query_sparse_attention",
    "ragged_decode_attention",
    "scalar_decay_attention",
    "scalar_decay_step",
    "sparsemax",
]

# specs are data for instruments, found where somebody asks for one: an operator that runs needs none
_SPECS = {
    "attention.spec": ("attention", "query_sparse_attention"),
    "merge": ("merge_partials",),
    "indexed.spec": ("indexed_attention", "qk_sparse_attention", "hash_sparse_attention"),
    "entmax.spec": ("entmax",),
    "entmax_attention.spec": ("entmax_attention",),
    "expected_attention.spec": ("expected_attention_scores",),
    "mlstm.spec": ("mlstm",),
    "mlstm.step_spec": ("mlstm_step",),
    "query_moments.spec": ("query_moments",),
    "ragged_decode.spec": ("ragged_decode_attention",),
    "scalar_decay.spec": ("scalar_decay_attention", "lightning_attention", "scalar_decay_step"),
}


def _spec_of(module: str, name: str) -> OpSpec:
    specs: tuple[OpSpec, ...] = importlib.import_module(f"attnkit.ops.{module}").SPECS
    return next(spec for spec in specs if spec.name == name)


for _module, _names in _SPECS.items():
    for _operator in _names:
        OPS.register_later(_operator, partial(_spec_of, _module, _operator))


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
    name = _name(op)
    spec = OPS[name]
    return explain_choice(name, spec.backends, backend, spec.prepare(*args, **kwargs))


def occupancy(op: str | Callable[..., Any], *args: Any, block_q: int = 64, block_k: int = 64, **kwargs: Any) -> Occupancy:
    """Count the tiles that an indexed operator would walk over, without running it (reads on the host).

    Args:
        op: `indexed_attention`, `qk_sparse_attention`, `hash_sparse_attention`, or one of their names.
        args, kwargs: what the operator would be called with.
        block_q, block_k: rows and keys of a tile.
    Raises:
        OptionError: another operator, or tiles below 1.
        InputError: the call itself is wrong, as the operator would say.

    >>> import torch
    >>> from attnkit import ops
    >>> q = torch.randn(1, 512, 1, 16)
    >>> halves = torch.arange(512) // 256  # of 36 steps of causal attention 2 x 10 are left, and 2 x 4 of them hold a diagonal
    >>> found = ops.occupancy("hash_sparse_attention", q, q, q, halves, halves, num_buckets=2)
    >>> found.steps, round(found.step_share, 3), found.unmasked
    (20, 0.556, 0.6)
    """
    call = OPS[_name(op)].prepare(*args, **kwargs)
    if not isinstance(call, IndexedCall):
        raise OptionError(f"{_name(op)} has no rows to sort; occupancy is of the indexed operators")
    return measure(call, block_q, block_k)


def _name(op: str | Callable[..., Any]) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if not isinstance(op, str) and OPS[name].function is not op:
        raise OptionError(f"{op!r} is not the attnkit operator of that name; give attnkit.ops.{name}")
    return name
