"""How much of the work of tiles is wanted: what a choice of buckets or of dropped rows saves, and what tiles waste of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.ops._attention_core.plan import Plan
from attnkit.ops.indexed.call import IndexedCall
from attnkit.ops.indexed.rows import order_rows

__all__ = ["Occupancy", "measure"]


@dataclass(frozen=True)
class Occupancy:
    """Of one call, summed over rounds; a step is one tile of rows with one tile of keys.

    Attributes:
        density: pairs that are seen, as a share of those of dense causal attention.
        steps: walked, over all heads.
        step_share: of the steps of dense causal attention with the same tiles: what the time would be if steps cost the same.
        unmasked: share of the steps that need no mask.
        wanted: share of the pairs in all steps that are seen.
        groups: sequences (batch element, key head, group) with at least one query and one key.
        largest: the most queries in one of them, over the mean of all that have any: 1 where groups are equal.
    """

    density: float
    steps: int
    step_share: float
    unmasked: float
    wanted: float
    groups: int
    largest: float


def measure(call: IndexedCall, block_q: int = 64, block_k: int = 64) -> Occupancy:
    """Count the steps of a call (see `attnkit.ops.occupancy`)."""
    if block_q < 1 or block_k < 1:
        raise OptionError(f"block_q={block_q} and block_k={block_k} must be at least 1")
    batch, num_q, heads = call.base.q.shape[:3]
    dense = Plan.causal(num_q, call.base.k.shape[1], block_q=block_q)
    causal_steps, _, causal_pairs = (int(n) * batch * heads for n in _count(dense, block_k))
    steps = unmasked = pairs = groups = 0
    largest = 0.0
    for index in range(call.rounds):
        order = order_rows(call, index)
        sizes = (len(order.queries), len(order.keys))
        plan = Plan.varlen(order.cu_q, order.cu_k, *sizes, right=0, q_pos=order.q_pos, block_q=block_q)
        counts = [int(n) for n in _count(plan, block_k)]
        steps, unmasked, pairs = steps + counts[0], unmasked + counts[1], pairs + counts[2]
        lengths = order.cu_q.diff()
        groups += int(((lengths > 0) & (order.cu_k.diff() > 0)).sum())
        some = lengths[lengths > 0].double()
        largest = max(largest, float(some.max() / some.mean()) if some.numel() else 0.0)
    return Occupancy(
        density=pairs / max(causal_pairs, 1),
        steps=steps,
        step_share=steps / max(causal_steps, 1),
        unmasked=unmasked / max(steps, 1),
        wanted=pairs / max(steps * block_q * block_k, 1),
        groups=groups,
        largest=largest,
    )


def _count(plan: Plan, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, steps without a mask, and pairs that are seen, of plans whose rows see everything up to their position."""
    lo, _, full_hi, hi = plan.bounds.long().unbind(1)
    steps, unmasked = (hi - lo + block_k - 1) // block_k, (full_hi - lo) // block_k
    start, end = plan.k_range.long().unbind(1)
    seen = (torch.minimum(plan.q_pos.long() + 1, end) - start).clamp(min=0)
    return steps.sum(), unmasked.sum(), seen.sum()
