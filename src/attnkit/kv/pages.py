"""Pages: where compressed layers keep their keys, ragged per row and head.

A page holds `page_size` tokens of one head and is never changed once written, so that copies of a cache share it. The newest
tokens of each head wait in a tail until there are enough of them for a page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from attnkit import ops
from attnkit.kv.codecs import Codec
from attnkit.kv.context import Stored
from attnkit.kv.selectors import Kept

__all__ = ["Lease", "PagePool", "PageStore"]


@dataclass
class Lease:
    """Pages start to stop of a pool, and how many stores hold on to them."""

    start: int
    stop: int
    holders: int = 1


class PagePool:
    """The pages of one layer and of its copies.

    Args:
        page_size: tokens a page.
        codec: how keys and values are written.

    Attributes:
        tensors: name -> [N, ...], what the codec makes of a page, and "positions" [N, page_size] int32.
    """

    def __init__(self, page_size: int, codec: Codec) -> None:
        self.page_size = page_size
        self.codec = codec
        self.tensors: dict[str, Tensor] = {}
        self._free: list[tuple[int, int]] = []
        self._size = 0

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self._size - sum(stop - start for start, stop in self._free)

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Lease:
        """Write keys [n, page_size, D], values, positions and, where the layer has one, a bias into n pages."""
        encoded = self.codec.encode(keys, values) | {"positions": positions}
        if bias is not None:
            encoded["bias"] = bias
        lease = self._take(keys.shape[0], encoded)
        for name, tensor in encoded.items():
            self.tensors[name][lease.start : lease.stop] = tensor
        return lease

    def read(self, pages: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """keys, values (in `dtype`), positions (and bias) [..., page_size, ...] of these pages, decoded."""
        rows = {name: tensor[pages.long()] for name, tensor in self.tensors.items()}
        keys, values = self.codec.decode(rows, dtype)
        return {"keys": keys, "values": values} | {name: rows[name] for name in ("positions", "bias") if name in rows}

    def release(self, lease: Lease) -> None:
        """One holder less; without holders the pages are free."""
        lease.holders -= 1
        if lease.holders or lease.start == lease.stop:
            return
        spans = sorted([*self._free, (lease.start, lease.stop)])
        self._free = [spans[0]]
        for start, stop in spans[1:]:
            if start == self._free[-1][1]:
                self._free[-1] = (self._free[-1][0], stop)
            else:
                self._free.append((start, stop))

    def _take(self, count: int, like: dict[str, Tensor]) -> Lease:
        for place, (start, stop) in enumerate(self._free):
            if stop - start >= count:
                self._free[place] = (start + count, stop)
                self._free = [span for span in self._free if span[0] < span[1]]
                return Lease(start, start + count)
        # a little more than is asked for, so that not every page that is added moves all others
        more = max(count, self._size // 32) if self._size else count
        for name, tensor in like.items():
            fresh = tensor.new_empty(more, *tensor.shape[1:])
            self.tensors[name] = torch.cat([self.tensors[name], fresh]) if self._size else fresh
        start, self._size = self._size, self._size + more
        if more > count:
            self._free.append((start + count, self._size))
        return Lease(start, start + count)


class PageStore:
    """The stored tokens of one layer.

    Attributes:
        table: [B, Hkv, M] int32, the pages of each head in the order of their tokens.
        counts: [B, Hkv] int32, how many of them count; the pages before are full.
        tail: keys, values, positions (and bias) [B, Hkv, 2 page_size, ...], the newest tokens.
        tail_lengths: [B, Hkv] int32.
    """

    def __init__(self, pool: PagePool, table: Tensor, counts: Tensor, tail: dict[str, Tensor], tail_lengths: Tensor) -> None:
        self.pool = pool
        self.table, self.counts = table, counts
        self.tail, self.tail_lengths = tail, tail_lengths
        self.leases: list[Lease] = []
        self._least = 0  # every tail holds at least this many tokens; the device need not be asked

    @classmethod
    def build(cls, stored: Stored, kept: Kept, *, codec: Codec, page_size: int) -> Self:
        """Move the kept tokens into pages of a new pool."""
        pool = PagePool(page_size, codec)
        batch, heads, width = kept.index.shape
        rows = batch * heads
        device = kept.index.device
        lengths = kept.index.new_full((rows,), width) if kept.lengths is None else kept.lengths.flatten()
        counts = lengths // page_size
        total = rows * (width // page_size) if kept.lengths is None else int(counts.sum())
        head = torch.repeat_interleave(torch.arange(rows, device=device), counts, output_size=total)
        first = counts.cumsum(0) - counts
        slot = (torch.arange(total, device=device) - first[head])[:, None] * page_size + torch.arange(page_size, device=device)
        page = _pick(stored, kept, head[:, None].expand_as(slot), slot)
        most = width // page_size if kept.lengths is None else (int(counts.max()) if rows else 0)
        tail_slot = (counts[:, None] * page_size + torch.arange(2 * page_size, device=device)).clamp(max=max(width - 1, 0))
        everyone = torch.arange(rows, device=device)[:, None].expand_as(tail_slot)
        tail = {name: part.unflatten(0, (batch, heads)) for name, part in _pick(stored, kept, everyone, tail_slot).items()}
        table = first[:, None] + torch.arange(most, device=device)
        store = cls(
            pool,
            table.clamp(max=max(total - 1, 0)).int().unflatten(0, (batch, heads)),
            counts.int().unflatten(0, (batch, heads)),
            tail,
            (lengths % page_size).int().unflatten(0, (batch, heads)),
        )
        store.leases.append(pool.write(page["keys"], page["values"], page["positions"], page.get("bias")))
        store._least = width % page_size if kept.lengths is None else 0
        return store

    @property
    def lengths(self) -> Tensor:
        """[B, Hkv] int32: stored tokens."""
        return self.counts * self.pool.page_size + self.tail_lengths

    @property
    def added(self) -> int:
        """Pages a head that were filled since the store was built."""
        return len(self.leases) - 1

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Add n tokens to every head: keys [B, Hkv, n, D], values [B, Hkv, n, Dv], at positions first, first + 1, ..."""
        size = self.pool.page_size
        done = 0
        while done < keys.shape[2]:
            count = min(keys.shape[2] - done, size - self._least)
            self._write(keys[:, :, done : done + count], values[:, :, done : done + count], first + done)
            done += count
            self._least += count
            if self._least == size:
                self._turn_page()

    def _write(self, keys: Tensor, values: Tensor, first: int) -> None:
        count = keys.shape[2]
        new = torch.arange(count, device=keys.device)
        place = (self.tail_lengths[..., None] + new).long()
        positions = (new + first).int().expand_as(place)
        fresh = {"keys": keys, "values": values, "positions": positions, "bias": None}
        for name, held in self.tail.items():
            states = fresh[name]
            index = place if held.dim() == 3 else place[..., None].expand(-1, -1, -1, held.shape[-1])
            held.scatter_(2, index, torch.zeros_like(place, dtype=held.dtype) if states is None else states.to(held.dtype))
        self.tail_lengths = self.tail_lengths + count

    def _turn_page(self) -> None:
        """Move the oldest `page_size` tokens of every tail, all of which have that many, into a page."""
        size = self.pool.page_size
        oldest = {name: held[:, :, :size].flatten(0, 1) for name, held in self.tail.items()}
        lease = self.pool.write(oldest["keys"], oldest["values"], oldest["positions"], oldest.get("bias"))
        pages = torch.arange(lease.start, lease.stop, device=self.table.device, dtype=torch.int32)
        self.table = torch.cat(
            [self.table, self.table[..., -1:] if self.table.shape[-1] else pages.view(*self.counts.shape, 1)], -1
        )
        self.table.scatter_(-1, self.counts[..., None].long(), pages.view(*self.counts.shape, 1))
        self.counts = self.counts + 1
        self.leases.append(lease)
        self.tail = {name: torch.cat([held[:, :, size:], held[:, :, size:]], 2) for name, held in self.tail.items()}
        self.tail_lengths = self.tail_lengths - size
        self._least -= size

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens of every head, which were appended after the store was built."""
        while count:
            if not self._least:
                self._turn_back()
            step = min(count, self._least)
            self.tail_lengths = self.tail_lengths - step
            self._least -= step
            count -= step

    def _turn_back(self) -> None:
        size = self.pool.page_size
        last = (self.counts - 1)[..., None].long()
        page = self.pool.read(self.table.gather(-1, last)[..., 0], self.tail["keys"].dtype)
        self.tail = {name: torch.cat([page[name].to(held.dtype), held[:, :, :size]], 2) for name, held in self.tail.items()}
        self.counts, self.tail_lengths = self.counts - 1, self.tail_lengths + size
        self._least += size
        self.pool.release(self.leases.pop())
        self.table = self.table[..., :-1]

    def view(self) -> Stored:
        """All stored tokens side by side, decoded; S is the longest head's pages and the tails."""
        size = self.pool.page_size
        pages = self.table.shape[-1]
        read = self.pool.read(self.table, self.tail["keys"].dtype)
        parts = {name: torch.cat([read[name].flatten(2, 3), held], 2) for name, held in self.tail.items()}
        place = torch.arange(pages * size, device=self.table.device)
        in_pages = place < (self.counts * size)[..., None]
        in_tail = torch.arange(2 * size, device=self.table.device) < self.tail_lengths[..., None]
        return Stored(
            parts["keys"],
            parts["values"],
            parts["positions"].long(),
            torch.cat([in_pages, in_tail], -1),
            parts.get("bias"),
        )

    def operand(self) -> ops.KVPages:
        """What `ops.ragged_decode_attention` reads."""
        tensors = self.pool.tensors
        scales = {name: tensors[name] for name in ("key_scale", "key_zero", "value_scale", "value_zero") if name in tensors}
        return ops.KVPages(
            keys=tensors["keys"],
            values=tensors["values"],
            table=self.table,
            lengths=self.counts * self.pool.page_size,
            tail_keys=self.tail["keys"],
            tail_values=self.tail["values"],
            tail_lengths=self.tail_lengths,
            bias=tensors.get("bias"),
            tail_bias=self.tail.get("bias"),
            **scales,
        )

    def fork(self) -> Self:
        """A copy that shares the pages and has tails of its own."""
        other = self.__class__(
            self.pool,
            self.table.clone(),
            self.counts.clone(),
            {name: held.clone() for name, held in self.tail.items()},
            self.tail_lengths.clone(),
        )
        for lease in self.leases:
            lease.holders += 1
        other.leases = list(self.leases)
        other._least = self._least
        return other

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows of the batch; their pages are shared."""
        self.table, self.counts, self.tail_lengths = (change(part) for part in (self.table, self.counts, self.tail_lengths))
        self.tail = {name: change(held) for name, held in self.tail.items()}

    def release(self) -> None:
        """Let go of all pages."""
        for lease in self.leases:
            self.pool.release(lease)
        self.leases = []

    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        return [*self.pool.tensors.values(), *self.tail.values(), self.table, self.counts, self.tail_lengths]


def _pick(stored: Stored, kept: Kept, head: Tensor, slot: Tensor) -> dict[str, Tensor]:
    """keys, values, positions (and bias) [n, P, ...] of kept token `slot` of row-and-head `head`, both [n, P]."""
    heads = kept.index.shape[1]
    row, head_of = head // heads, head % heads
    token = kept.index.flatten(0, 1)[head, slot]
    picked = {
        "keys": stored.keys[row, head_of, token],
        "values": stored.values[row, head_of, token],
        "positions": stored.positions.expand(stored.shape)[row, head_of, token].int(),
    }
    if stored.bias is not None:
        picked["bias"] = stored.bias[row, head_of, token]
    return picked
