"""A layer in pages as attention meets it: new tokens come in, queries read, all heads hold what is theirs."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import PolicyError
from attnkit.kv.context import Stored
from attnkit.kv.pages import PageStore
from attnkit.kv.selectors import Kept, gather

__all__ = ["Paged"]


class Paged:
    """Pages, and the tokens of a pass that wait until its attention is done.

    Args:
        store: the pages.
    """

    def __init__(self, store: PageStore) -> None:
        self.store = store
        self._waiting: tuple[Tensor, Tensor, int] | None = None

    def update(self, keys: Tensor, values: Tensor, seen: int, *, served: bool) -> tuple[Tensor, Tensor]:
        """Take in n tokens, the last of `seen`: one at once, several when `attend` is done.

        Args:
            keys, values: [B, Hkv, n, D] and [B, Hkv, n, Dv].
            seen: tokens seen, these included.
            served: whether the caller reads the stored tokens through `attend`.
        Returns:
            keys and values as given where the caller is served; else all stored ones, unpacked.
        Raises:
            PolicyError: they cannot be unpacked, since heads hold different numbers, or keys have a bias.
        """
        self.admit(None)  # nobody asked for the last ones' attention
        first = seen - keys.shape[2]
        if served and keys.shape[2] > 1:
            self._waiting = keys, values, first
            return keys, values
        self.store.append(keys, values, first)
        return (keys, values) if served else self._unpacked(keys.dtype, values.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, *, sinks: Tensor | None, **options: Any) -> Tensor:
        """Attention of the newest tokens over everything in pages and, causally, each other; out [B, T, H, Dv].

        Args:
            q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv]; k and v are what `update` was given.
            real: [B, T] bool, which of the tokens are no padding; None when all are.
            sinks: as in `ops.attention`.
            options: scale and softcap, as in `ops.attention`.
        """
        if self._waiting is None:  # one token, in the tail already
            out: Any = ops.ragged_decode_attention(q, self.store.operand(), sinks=sinks, **options)
            return out  # type: ignore[no-any-return]
        acc = accumulator_dtype(q.dtype)
        old, old_lse = ops.ragged_decode_attention(q, self.store.operand(), return_lse=True, out_dtype=acc, **options)
        bias = None if real is None else torch.zeros_like(real, dtype=acc).masked_fill(~real, -torch.inf)
        new, new_lse = ops.attention(
            q, k, v, causal=True, sinks=sinks, key_bias=bias, return_lse=True, out_dtype=acc, **options
        )
        merged, _ = ops.merge_partials(torch.stack([old, new]), torch.stack([old_lse, new_lse]))
        self.admit(real)
        return merged.to(q.dtype)

    def admit(self, real: Tensor | None) -> None:
        """Put waiting tokens into pages, those that `real` [B, n] names."""
        if self._waiting is None:
            return
        (keys, values, first), self._waiting = self._waiting, None
        if real is None or bool(real.all()):
            self.store.append(keys, values, first)
            return
        old = self.store.view()  # rows grow by different numbers of tokens: build anew
        assert old.real is not None
        positions = torch.arange(first, first + keys.shape[2], device=keys.device).expand(keys.shape[:3])
        bias = None if old.bias is None else torch.cat([old.bias, old.bias.new_zeros(keys.shape[:3])], 2)
        every = torch.cat([old.real, real[:, None].expand(keys.shape[:3])], 2)
        stored = Stored(
            torch.cat([old.keys.to(keys.dtype), keys], 2),
            torch.cat([old.values.to(values.dtype), values], 2),
            torch.cat([old.positions, positions], 2),
            every,
            bias,
        )
        before, pool = self.store, self.store.pool
        self.store = PageStore.build(stored, Kept.of_mask(every), codec=pool.codec, page_size=pool.page_size)
        before.release()

    def view(self) -> Stored:
        """All stored tokens side by side."""
        self.admit(None)
        return self.store.view()

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        self.admit(None)
        self.store.crop(count)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows of the batch."""
        self.admit(None)
        self.store.rows(change)

    def fork(self) -> Self:
        """A copy that shares full pages."""
        self.admit(None)
        return self.__class__(self.store.fork())

    def release(self) -> None:
        """Let go of all pages."""
        self.store.release()

    def _unpacked(self, key_dtype: torch.dtype, value_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        stored = self.store.view()
        lengths = self.store.lengths
        length = int(lengths.flatten()[0])
        if bool((lengths != length).any()):
            raise PolicyError(
                "the heads of this cache hold different numbers of tokens, which only attnkit's attention reads; run the model "
                "inside `with attnkit.inference.apply(model, policy)`, or press with a method that treats heads alike"
            )
        if stored.bias is not None:
            raise PolicyError(
                "the keys of this cache have a bias, which only attnkit's attention reads; run the model inside apply"
            )
        assert stored.real is not None
        index = Kept.of_mask(stored.real).index[..., :length]
        return gather(stored.keys, index).to(key_dtype), gather(stored.values, index).to(value_dtype)
