"""The table of chunks of a batch: which rows each holds, and which sequence it belongs to."""

from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from attnkit._core.errors import OptionError

__all__ = ["ChunkLayout", "Step", "check_chunk_size"]

Step: TypeAlias = "tuple[slice | Tensor, slice | Tensor]"
_SMALLEST = 16


def check_chunk_size(chunk_size: int | str) -> None:
    """Refuse what is neither "auto" nor a power of two from 16 on.

    Raises:
        OptionError: names what came and what is allowed.
    """
    if chunk_size == "auto":
        return
    if not isinstance(chunk_size, int) or chunk_size < _SMALLEST or chunk_size & (chunk_size - 1):
        raise OptionError(f'chunk_size={chunk_size!r} must be "auto" or a power of two from {_SMALLEST} on')


@dataclass(frozen=True)
class ChunkLayout:
    """Chunks of at most `chunk_size` rows that keep to the boundaries of sequences, in the order of rows.

    Tables are built on the device without waiting for it; packed sequences get as many chunks as any boundaries could need,
    and those that are not needed hold no rows.

    Attributes:
        chunk_size: rows of a chunk at most.
        num_seqs: N sequences.
        num_chunks: C chunks.
        num_rows: R rows of all sequences.
        chunk_seq: [C] int64, the sequence of each chunk; N where a chunk is not needed.
        chunk_start: [C] int64, its first row.
        chunk_len: [C] int64, its rows.
        seq_first_chunk: [N + 1] int64, the first chunk of each sequence, and the number of chunks that are needed.
        cu_seqlens: [N + 1] int64, the first row of each sequence, and R.
        dense: all sequences have the same length.

    >>> import torch
    >>> from attnkit import ops
    >>> layout = ops.ChunkLayout.packed(torch.tensor([0, 5, 5, 40], dtype=torch.int32), 40, 32)
    >>> layout.num_chunks, layout.chunk_start.tolist(), layout.chunk_len.tolist()
    (4, [0, 5, 37, 40], [5, 32, 3, 0])
    """

    chunk_size: int
    num_seqs: int
    num_chunks: int
    num_rows: int
    chunk_seq: Tensor
    chunk_start: Tensor
    chunk_len: Tensor
    seq_first_chunk: Tensor
    cu_seqlens: Tensor = field(repr=False)
    dense: bool = False

    @classmethod
    def batched(cls, batch: int, length: int, chunk_size: int, device: torch.device | str = "cpu") -> "ChunkLayout":
        """The chunks of `batch` sequences of `length` rows each, one after the other."""
        each = -(-length // chunk_size)
        seqs, chunks = (torch.arange(count, device=device) for count in (batch + 1, batch * each))
        seq = chunks // max(each, 1)
        start = (chunks % max(each, 1)) * chunk_size
        lengths = (length - start).clamp(max=chunk_size)
        return cls(
            chunk_size,
            batch,
            batch * each,
            batch * length,
            seq,
            seq * length + start,
            lengths,
            seqs * each,
            seqs * length,
            True,
        )

    @classmethod
    def packed(cls, cu_seqlens: Tensor, num_rows: int, chunk_size: int) -> "ChunkLayout":
        """The chunks of packed sequences.

        Args:
            cu_seqlens: [N + 1] int32, boundaries.
            num_rows: R, its last entry, which is not read.
            chunk_size: rows of a chunk at most.
        """
        bounds = cu_seqlens.long()
        num_seqs = cu_seqlens.numel() - 1
        counts = (bounds.diff() + (chunk_size - 1)) // chunk_size
        first = torch.cat([bounds.new_zeros(1), counts.cumsum(0)])
        capacity = num_rows // chunk_size + min(num_seqs, num_rows)
        chunks = torch.arange(capacity, device=cu_seqlens.device)
        seq = torch.searchsorted(first[1:].contiguous(), chunks, right=True)
        known = seq.clamp(max=num_seqs - 1)
        start = torch.minimum(bounds[known] + (chunks - first[known]) * chunk_size, bounds[known + 1])
        lengths = (bounds[known + 1] - start).clamp(max=chunk_size)
        return cls(chunk_size, num_seqs, capacity, num_rows, seq, start, lengths, first, bounds)

    def trimmed(self) -> "ChunkLayout":
        """Without the chunks that are not needed; waits for the device."""
        if self.dense:
            return self
        count = int(self.seq_first_chunk[-1])
        return replace(
            self,
            num_chunks=count,
            chunk_seq=self.chunk_seq[:count],
            chunk_start=self.chunk_start[:count],
            chunk_len=self.chunk_len[:count],
        )

    def steps(self) -> list[Step]:
        """What a scan over chunks goes through: the s-th chunks of all sequences that have one, and these sequences.

        Both index the first dimension of tensors of chunks and of sequences; waits for the device where sequences are packed.
        """
        if self.num_chunks == 0:
            return []
        if self.dense:
            each = self.num_chunks // self.num_seqs
            return [(slice(s, None, each), slice(None)) for s in range(each)]
        counts = self.seq_first_chunk.diff()
        found: list[Step] = []
        for s in range(int(counts.max())):
            seqs = (counts > s).nonzero()[:, 0]
            found.append((self.seq_first_chunk[seqs] + s, seqs))
        return found

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Rows [R, ...] -> chunks [C, chunk_size, ...], `fill` where a chunk has no row."""
        if self.dense:
            rows = self.num_rows // max(self.num_seqs, 1)
            each = self.num_chunks // max(self.num_seqs, 1)
            x = x.unflatten(0, (self.num_seqs, rows)) if self.num_rows else x.new_empty(self.num_seqs, 0, *x.shape[1:])
            missing = each * self.chunk_size - rows
            if missing:
                x = torch.cat([x, x.new_full((self.num_seqs, missing, *x.shape[2:]), fill)], 1)
            return x.reshape(self.num_chunks, self.chunk_size, *x.shape[2:])
        place = torch.arange(self.chunk_size, device=x.device)
        absent = place >= self.chunk_len[:, None]
        rows_of = (self.chunk_start[:, None] + place).masked_fill(absent, 0)
        if self.num_rows == 0:
            return x.new_full((self.num_chunks, self.chunk_size, *x.shape[1:]), fill)
        return x[rows_of].masked_fill(absent.view(*absent.shape, *[1] * (x.dim() - 1)), fill)

    def join(self, x: Tensor) -> Tensor:
        """Chunks [C, chunk_size, ...] -> rows [R, ...]."""
        if self.dense:
            rows = self.num_rows // max(self.num_seqs, 1)
            each = self.num_chunks // max(self.num_seqs, 1)
            return x.reshape(self.num_seqs, each * self.chunk_size, *x.shape[2:])[:, :rows].flatten(0, 1)
        place = torch.arange(self.chunk_size, device=x.device)
        return x.flatten(0, 1)[(place < self.chunk_len[:, None]).flatten().nonzero()[:, 0]]  # chunks are in the order of rows
