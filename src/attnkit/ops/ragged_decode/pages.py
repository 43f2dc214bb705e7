"""What a cache hands to attention: pages, which head has which, and a tail of the newest tokens."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnkit.ops.ragged_decode.codes import CODE_DTYPES, decode

__all__ = ["KVPages"]


@dataclass(frozen=True, eq=False)
class KVPages:
    """Stored keys and values, every (batch row, key head) with a number of its own.

    A head has `lengths` tokens in pages, page after page and each full but the last, and `tail_lengths` in its tail. Pages
    belong to one head: a token of a page is a row of it. What lies beyond a length, there and in the table, may hold anything.

    Attributes:
        keys, values: [N, P, D] and [N, P, Dv], the pool of pages, P a power of two from 16 to 128. In q's dtype; or codes
            (docs/operators.md): uint8 of 8 bits, uint8 of 4 bits as [N, P, D / 2] and [N, P, Dv / 2], or float8_e4m3fn.
        table: [B, Hkv, M] int32, numbers of pages.
        lengths: [B, Hkv] int32, at most M * P.
        tail_keys, tail_values: [B, Hkv, L, D] and [B, Hkv, L, Dv] in q's dtype, or None.
        tail_lengths: [B, Hkv] int32, at most L; None where there is no tail.
        key_scale, key_zero: [N, D] float16, of codes; fp8 has no zero. Key = code * scale + zero.
        value_scale, value_zero: [N, P] float16, likewise.
        bias: [N, P] float32, added to the scaled scores of each token, or None; -inf masks it.
        tail_bias: [B, Hkv, L] float32 or None.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    tail_keys: Tensor | None = None
    tail_values: Tensor | None = None
    tail_lengths: Tensor | None = None
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    bias: Tensor | None = None
    tail_bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that are there."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    @property
    def code(self) -> str:
        """ "raw", "int8", "int4" or "fp8"."""
        if self.keys.dtype not in CODE_DTYPES:
            return "raw"
        if self.keys.dtype != torch.uint8:
            return "fp8"
        return "int8" if self.key_scale is None or self.key_scale.shape[-1] == self.keys.shape[-1] else "int4"

    @property
    def page_size(self) -> int:
        """P."""
        return self.keys.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """D and Dv."""
        packed = 2 if self.code == "int4" else 1
        return self.keys.shape[-1] * packed, self.values.shape[-1] * packed

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the whole pool, whoever uses its pages."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def gather(self, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Numbers of pages [...] int64 -> their keys [..., P, D] and values [..., P, Dv] in `dtype`, decoded."""
        keys, values = self.keys[table], self.values[table]
        if self.key_scale is None or self.value_scale is None:
            return keys.to(dtype), values.to(dtype)
        bits = 4 if self.code == "int4" else 8
        key_zero = None if self.key_zero is None else self.key_zero[table][..., None, :]
        value_zero = None if self.value_zero is None else self.value_zero[table][..., None]
        keys = decode(keys, self.key_scale[table][..., None, :], key_zero, bits, dtype)
        return keys, decode(values, self.value_scale[table][..., None], value_zero, bits, dtype)

    def materialize(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All of it in plain tensors, for oracles and for those who cannot read pages.

        Args:
            dtype: None is that of raw pages; float32 for codes.
        Returns:
            keys [B, Hkv, S, D], values [B, Hkv, S, Dv] and seen [B, Hkv, S] bool, with S = M * P + L: first pages, then the
            tail. What is not seen is 0.
        """
        dtype = dtype or (self.keys.dtype if self.code == "raw" else torch.float32)
        used = self._used()
        keys, values = (t.flatten(2, 3) for t in self.gather(self._table(), dtype))
        seen = used
        if self.tail_keys is not None and self.tail_values is not None:
            keys = torch.cat([keys, self.tail_keys.to(dtype)], 2)
            values = torch.cat([values, self.tail_values.to(dtype)], 2)
            seen = torch.cat([used, self._used_tail(self.tail_keys.shape[2])], 2)
        hidden = ~seen[..., None]
        return keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0), seen

    def materialize_bias(self) -> Tensor | None:
        """The bias of what `materialize` returns, [B, Hkv, S], or None; 0 where nothing is seen."""
        if self.bias is None and self.tail_bias is None:
            return None
        used = self._used()
        bias = self.lengths.new_zeros(used.shape, dtype=torch.float32) if self.bias is None else self.bias[self._table()]
        bias = bias.reshape(used.shape).masked_fill(~used, 0)
        if self.tail_keys is None:
            return bias
        shape = self.tail_keys.shape[:3]
        tail = bias.new_zeros(shape) if self.tail_bias is None else self.tail_bias.to(bias.dtype)
        return torch.cat([bias, tail.masked_fill(~self._used_tail(shape[2]), 0)], 2)

    def _table(self) -> Tensor:
        """Numbers of pages [B, Hkv, M] int64, 0 where they are not to be read; none where the pool is empty."""
        table = self.table if self.keys.shape[0] else self.table[..., :0]
        count = (self.lengths + self.page_size - 1) // self.page_size
        unused = torch.arange(table.shape[2], device=table.device) >= count[..., None]
        return table.masked_fill(unused, 0).long()

    def _used(self) -> Tensor:
        """[B, Hkv, M * P] bool."""
        most = self.table.shape[2] * self.page_size if self.keys.shape[0] else 0
        return torch.arange(most, device=self.lengths.device) < self.lengths[..., None]

    def _used_tail(self, length: int) -> Tensor:
        assert self.tail_lengths is not None  # comes with the tail
        return torch.arange(length, device=self.lengths.device) < self.tail_lengths[..., None]
