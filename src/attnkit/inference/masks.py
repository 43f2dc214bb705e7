"""Recognising the masks that transformers asks for; what attnkit cannot express is refused, never ignored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import UnsupportedError

__all__ = ["Form", "recognise"]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
SAMPLED_ROWS = 8


@dataclass(frozen=True)
class Form:
    """A mask that attnkit's operators can express.

    Attributes:
        causal: a query sees no later key.
        window: keys that a query sees, itself included; None means all.
    """

    causal: bool
    window: int | None = None

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at these positions see keys at those; the shapes broadcast."""
        seen = key <= query if self.causal else torch.ones_like(key <= query)
        return seen if self.window is None else seen & (key > query - self.window)

    def __str__(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        return kind if self.window is None else f"{kind} with a window of {self.window} keys"


def recognise(
    mask_function: MaskFunction, *, batch: int, queries: range, keys: range, window: int | None, device: torch.device
) -> set[Form]:
    """The forms that a mask function agrees with on sampled rows, and near the diagonal on every row.

    Args:
        mask_function: (batch index, head index, query position, key position) -> bool, elementwise on index tensors.
        batch: number of rows of the batch.
        queries, keys: positions of this pass's queries and of the keys they meet.
        window: the sliding window of the model's configuration, where it has one.
        device: where the mask function's own tensors are.
    Returns:
        one form, or several that agree on inputs as short as these.
    Raises:
        UnsupportedError: none fits: packed sequences, bidirectional blocks, chunks, custom masks.
    """
    probes = _probes(batch, queries, keys, window, device)
    candidates = {Form(causal=True), Form(causal=False)}
    if window is not None:
        candidates.add(Form(causal=True, window=window))
    for rows, query, key in probes:
        try:
            given = torch.as_tensor(mask_function(rows, torch.zeros_like(rows), query, key), device=device)
        except Exception as error:
            raise UnsupportedError(f"the model's mask function cannot be evaluated by index ({error}); {_REFUSED}") from error
        shape = torch.broadcast_shapes(rows.shape, query.shape, key.shape)
        given = given.bool().expand(shape)
        candidates = {form for form in candidates if torch.equal(form.sees(query, key).expand(shape), given)}
    if not candidates:
        raise UnsupportedError(f"the model's mask is neither causal nor bidirectional nor its sliding window; {_REFUSED}")
    return candidates


_REFUSED = (
    "packed sequences (position_ids that restart), bidirectional image blocks, chunked attention and custom or/and masks are "
    "not supported by attnkit policies"
)


def _probes(batch: int, queries: range, keys: range, window: int | None, device: torch.device) -> list[tuple[Tensor, ...]]:
    rows = torch.arange(batch, device=device)[:, None, None]
    query = torch.arange(queries.start, queries.stop, device=device)
    sampled = query[torch.linspace(0, len(queries) - 1, min(SAMPLED_ROWS, len(queries)), device=device).round().long()]
    every_key = torch.arange(keys.start, keys.stop, device=device)
    offsets = [1, 0] if window is None else [1, 0, 1 - window, -window]
    near = (query[:, None] + torch.tensor(offsets, device=device)).clamp(keys.start, keys.stop - 1)
    return [(rows, sampled[None, :, None], every_key[None, None]), (rows, query[None, :, None], near[None])]
