"""Which keys each query row sees, and in which order tiles of rows walk over them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Plan"]

UNBOUNDED = -1


@dataclass(frozen=True)
class Plan:
    """Rows, their positions, and for each tile of rows the range of keys it walks over.

    A row standing on key row p (`q_pos`) inside a sequence whose keys are rows [start, end) (`k_range`) sees the keys
    j with start <= j < end, p - left <= j and j <= p + right; a side of -1 is unbounded, causal is `right == 0`.

    Everything is built on the device of the inputs with sizes known beforehand, so that building one never waits for the
    device and a plan can be captured in a CUDA graph. Packed and batched calls differ only in `k_range`.

    Attributes:
        kind: the builder's name.
        num_q, num_k: rows of queries and of keys (of one batch element, or of the packed tensor).
        block_q: rows of a tile.
        left, right: the window around a row's position, in keys, without the row's own.
        tiles: [n, 2] int32, first row and number of rows; 0 rows marks unused capacity. A tile never crosses sequences.
        bounds: [n, 4] int32, key rows lo <= full_lo <= full_hi <= hi: every key that any row of the tile sees lies in
            [lo, hi), and every row of the tile sees all of [full_lo, full_hi), so no mask is needed there.
        q_pos: [num_q] or [B, num_q] int32, the key row each query row stands on.
        k_range: [num_q, 2] int32, the key rows of the sequence each query row belongs to.
    """

    kind: str
    num_q: int
    num_k: int
    block_q: int
    left: int
    right: int
    tiles: Tensor
    bounds: Tensor
    q_pos: Tensor
    k_range: Tensor

    @classmethod
    def dense(cls, num_q: int, num_k: int, *, block_q: int = 128, device: torch.device | str = "cpu") -> "Plan":
        """Every query sees every key."""
        return cls.window(num_q, num_k, UNBOUNDED, UNBOUNDED, block_q=block_q, device=device, kind="dense")

    @classmethod
    def causal(cls, num_q: int, num_k: int, *, block_q: int = 128, device: torch.device | str = "cpu") -> "Plan":
        """Row i sees the keys j <= i + num_k - num_q: the last query sees the last key."""
        return cls.window(num_q, num_k, UNBOUNDED, 0, block_q=block_q, device=device, kind="causal")

    @classmethod
    def window(
        cls,
        num_q: int,
        num_k: int,
        left: int,
        right: int,
        *,
        block_q: int = 128,
        device: torch.device | str = "cpu",
        kind: str = "window",
    ) -> "Plan":
        """Row i, standing on p = i + num_k - num_q, sees the keys p - left .. p + right."""
        q_pos = torch.arange(num_q, device=device, dtype=torch.int32) + (num_k - num_q)
        return cls.rows(q_pos, num_k, left, right, block_q=block_q, kind=kind)

    @classmethod
    def rows(
        cls, q_pos: Tensor, num_k: int, left: int = UNBOUNDED, right: int = 0, *, block_q: int = 128, kind: str = "rows"
    ) -> "Plan":
        """Rows that stand on given keys: `q_pos` is [T], or [B, T] where the batch elements differ."""
        num_q, device = q_pos.shape[-1], q_pos.device
        first = torch.arange(0, num_q, block_q, device=device, dtype=torch.int32)
        tiles = torch.stack([first, (num_q - first).clamp(max=block_q)], dim=1)
        k_range = torch.tensor([0, num_k], device=device, dtype=torch.int32).expand(num_q, 2)
        return cls._with_bounds(kind, num_q, num_k, block_q, left, right, tiles, q_pos.to(torch.int32), k_range)

    @classmethod
    def varlen(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        num_q: int,
        num_k: int,
        left: int = UNBOUNDED,
        right: int = UNBOUNDED,
        *,
        q_pos: Tensor | None = None,
        block_q: int = 128,
    ) -> "Plan":
        """Packed sequences: boundaries [N + 1] int32 of queries and keys; within each, windows as in `window`.

        With `q_pos` [num_q] rows stand on these key rows instead; before its sequence's first key a row sees nothing.
        """
        device, num_seqs = cu_seqlens_q.device, cu_seqlens_q.numel() - 1
        q_start, k_start = cu_seqlens_q[:-1].long(), cu_seqlens_k[:-1].long()
        q_len, k_len = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
        # tiles: as many as could ever be needed; those past the last sequence keep zero rows
        per_seq = (q_len + block_q - 1) // block_q
        ends = per_seq.cumsum(0)
        slot = torch.arange(num_q // block_q + num_seqs, device=device)
        seq = torch.searchsorted(ends, slot, right=True).clamp(max=num_seqs - 1)
        inside = (slot - (ends - per_seq)[seq]) * block_q
        count = (q_len[seq] - inside).clamp(0, block_q).masked_fill(slot >= ends[-1], 0)
        tiles = torch.stack([(q_start[seq] + inside).clamp(max=max(num_q - 1, 0)), count], dim=1).int()
        # rows: a row past the last boundary belongs to no sequence and sees no key
        row = torch.arange(num_q, device=device)
        seq = torch.searchsorted(cu_seqlens_q[1:].long(), row, right=True)
        orphan = seq >= num_seqs
        seq = seq.clamp(max=num_seqs - 1)
        if q_pos is None:
            q_pos = k_start[seq] + row - q_start[seq] + k_len[seq] - q_len[seq]
        k_range = torch.stack([k_start[seq], k_start[seq] + k_len[seq]], dim=1).masked_fill(orphan[:, None], 0)
        return cls._with_bounds("varlen", num_q, num_k, block_q, left, right, tiles, q_pos.int(), k_range.int())

    @classmethod
    def _with_bounds(
        cls,
        kind: str,
        num_q: int,
        num_k: int,
        block_q: int,
        left: int,
        right: int,
        tiles: Tensor,
        q_pos: Tensor,
        k_range: Tensor,
    ) -> "Plan":
        """Find the extreme positions of each tile and from them its key ranges."""
        first, count = tiles.unbind(1)
        row = first[:, None] + torch.arange(block_q, device=tiles.device, dtype=torch.int32)
        valid = torch.arange(block_q, device=tiles.device) < count[:, None]
        row = row.clamp(max=max(num_q - 1, 0)).long()
        pos = q_pos[..., row] if num_q else q_pos.new_zeros(*q_pos.shape[:-1], *row.shape)
        big = torch.iinfo(torch.int32).max // 4
        low = pos.masked_fill(~valid, big).amin(-1)
        high = pos.masked_fill(~valid, -big).amax(-1)
        if low.dim() > 1:  # batch elements that differ share a tile's range
            low, high = low.amin(0), high.amax(0)
        start, end = k_range[first.long()].unbind(1) if num_q else (first, first)
        lo, full_lo = (start, start) if left < 0 else (low - left, high - left)
        hi, full_hi = (end, end) if right < 0 else (high + right + 1, low + right + 1)
        lo = torch.minimum(torch.maximum(lo, start), end)
        hi = torch.maximum(torch.minimum(hi, end), lo)
        full_lo = torch.minimum(torch.maximum(full_lo, lo), hi)
        full_hi = torch.maximum(torch.minimum(full_hi, hi), full_lo)
        bounds = torch.stack([lo, full_lo, full_hi, hi], dim=1).masked_fill((count == 0)[:, None], 0).int()
        return cls(kind, num_q, num_k, block_q, left, right, tiles, bounds, q_pos, k_range)

    def mask(self, rows: slice, keys: slice) -> Tensor:
        """[rows, keys] or [B, rows, keys] bool: which of these keys each of these rows sees."""
        key = torch.arange(keys.start, keys.stop, device=self.q_pos.device, dtype=torch.int32)
        pos = self.q_pos[..., rows, None]
        start, end = self.k_range[rows].unbind(1)
        seen = (key >= start[:, None]) & (key < end[:, None])
        if self.left >= 0:
            seen = seen & (key >= pos - self.left)
        if self.right >= 0:
            seen = seen & (key <= pos + self.right)
        return seen.expand(*self.q_pos.shape[:-1], *seen.shape[-2:])

    def to_dense_mask(self) -> Tensor:
        """[num_q, num_k] or [B, num_q, num_k] bool, for oracles and pictures: it takes num_q * num_k bytes."""
        return self.mask(slice(0, self.num_q), slice(0, self.num_k))

    def to_block_mask(self) -> "BlockMask":
        """The same pattern as FlexAttention's BlockMask, to check one against the other."""
        from torch.nn.attention.flex_attention import create_block_mask

        pos = self.q_pos if self.q_pos.dim() > 1 else self.q_pos[None]
        batch = pos.shape[0] if pos.shape[0] > 1 else None
        start, end = self.k_range.unbind(1)

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            p = pos[b if batch else 0, q]
            inside = (k >= start[q]) & (k < end[q])
            if self.left >= 0:
                inside = inside & (k >= p - self.left)
            if self.right >= 0:
                inside = inside & (k <= p + self.right)
            return inside

        return create_block_mask(seen, batch, None, self.num_q, self.num_k, device=pos.device)

    def pairs(self) -> int:
        """How many (row, key) pairs the tiles walk over, masked ones included (waits for the device)."""
        lo, _, _, hi = self.bounds.long().unbind(1)
        return int(((hi - lo) * self.tiles[:, 1]).sum())
