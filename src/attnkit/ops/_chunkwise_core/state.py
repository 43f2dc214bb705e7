"""The state of a recurrence between two calls."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RecurrentState"]


class RecurrentState(NamedTuple):
    """What a recurrent operator knows of the tokens before: of constant size, one entry for each sequence.

    All tensors are in the accumulation dtype (float32, or float64 with float64 inputs). An operator returns new ones and
    changes none that it is given.

    Attributes:
        S: [N, Hkv, D, Dv], sums of k v^T.
        n: [N, Hkv, D], sums of k, where outputs are normalised; else None.
        m: [N, Hkv], where S and n are in units of exp(m); else None.

    >>> import torch
    >>> from attnkit import ops
    >>> state = ops.RecurrentState(torch.zeros(2, 4, 16, 32))
    >>> state.nbytes, state.expand(3).S.shape, state.detach().m
    (16384, torch.Size([6, 4, 16, 32]), None)
    """

    S: Tensor
    n: Tensor | None = None
    m: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there, in order."""
        return tuple(part for part in self if part is not None)

    def detach(self) -> "RecurrentState":
        """Without the graph of gradients behind it."""
        return self.each(lambda part: part.detach())

    def to(self, *args: Any, **kwargs: Any) -> "RecurrentState":
        """As `Tensor.to`."""
        return self.each(lambda part: part.to(*args, **kwargs))

    def index_select(self, sequences: Tensor) -> "RecurrentState":
        """The states of the sequences [N'] int64, in that order: picked, repeated or put into another order (beams)."""
        return self.each(lambda part: part.index_select(0, sequences.to(part.device)))

    def expand(self, repeats: int) -> "RecurrentState":
        """Every sequence `repeats` times, copies side by side."""
        return self.each(lambda part: part.repeat_interleave(repeats, 0))

    def flatten(self) -> Tensor:
        """All of it as one tensor [N, ...], for caches that keep one."""
        return torch.cat([part.flatten(1) for part in self.tensors()], 1)

    @classmethod
    def unflatten(
        cls, flat: Tensor, heads: int, width: int, width_v: int, *, normalised: bool, stabilised: bool
    ) -> "RecurrentState":
        """What `flatten` has made one tensor of.

        Args:
            flat: [N, ...].
            heads, width, width_v: Hkv, D, Dv.
            normalised, stabilised: whether there is n, and m.
        """
        sizes = [heads * width * width_v, heads * width * normalised, heads * stabilised]
        S, n, m = flat.split(sizes, 1)
        return cls(
            S.unflatten(1, (heads, width, width_v)), n.unflatten(1, (heads, width)) if normalised else None,
            m if stabilised else None,
        )  # fmt: skip

    def each(self, change: Callable[[Tensor], Tensor]) -> "RecurrentState":
        """With every part changed."""
        S, n, m = self
        return RecurrentState(change(S), None if n is None else change(n), None if m is None else change(m))
