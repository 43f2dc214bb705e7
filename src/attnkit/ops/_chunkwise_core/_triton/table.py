"""What kernels need to know of where chunks lie, without waiting for the device."""

from dataclasses import dataclass

from torch import Tensor

from attnkit._core.triton.launcher import power_of_two
from attnkit.ops._chunkwise_core.layout import ChunkLayout

__all__ = ["ChunkTable"]

_GATES = 2048  # that a program holds


@dataclass(frozen=True)
class ChunkTable:
    """Chunks of sequences of one length, which need no table, or of packed ones, which do.

    Attributes:
        num_seqs, num_rows, num_chunks: N, R and C, some of which may hold no rows.
        chunk_size: rows of a chunk.
        each, length: chunks and rows of a sequence; of packed ones all of them.
        cu_seqlens, first_chunk, chunk_seq, chunk_start, chunk_len: as of `ChunkLayout`, or None.
    """

    num_seqs: int
    num_rows: int
    num_chunks: int
    chunk_size: int
    each: int
    length: int
    cu_seqlens: Tensor | None = None
    first_chunk: Tensor | None = None
    chunk_seq: Tensor | None = None
    chunk_start: Tensor | None = None
    chunk_len: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> "ChunkTable":
        """The chunks of [B, T, ...], or of packed [R, ...]."""
        if cu_seqlens is None:
            batch, length = x.shape[:2]
            each = -(-length // chunk_size)
            return cls(batch, batch * length, batch * each, chunk_size, each, length)
        t = ChunkLayout.packed(cu_seqlens, x.shape[0], chunk_size)
        tables = (t.cu_seqlens, t.seq_first_chunk, t.chunk_seq, t.chunk_start, t.chunk_len)
        return cls(t.num_seqs, t.num_rows, t.num_chunks, chunk_size, t.num_chunks, t.num_rows, *tables)

    def block_heads(self, heads: int) -> int:
        """Heads whose gates a program works on."""
        return min(power_of_two(heads), max(1, _GATES // self.chunk_size))
