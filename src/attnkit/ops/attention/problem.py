"""One attention problem on tiles: rows, runs of keys, masks, and the scores of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops._attention_core.plan import Plan

__all__ = ["Problem", "Runs"]

Runs = list[tuple[slice, bool]]


@dataclass
class Problem:
    """Batched inputs and the plan that tiles them; packed sequences come as a batch of one with boundaries in the plan."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, Dv]
    sinks: Tensor | None  # [H]
    key_bias: Tensor | None  # [B, S] or [B, S, Hkv]
    plan: Plan
    scale: float
    softcap: float
    stable: str

    def __post_init__(self) -> None:
        self.acc = accumulator_dtype(self.q.dtype)
        self.kv_heads = self.k.shape[2]
        self.group = self.q.shape[2] // self.kv_heads
        self.keys, self.values = (t.transpose(1, 2).to(self.acc) for t in (self.k, self.v))  # [B, Hkv, S, *]
        self.bias = None
        if self.key_bias is not None:
            bias = self.key_bias if self.key_bias.dim() == 3 else self.key_bias[..., None]
            self.bias = bias.transpose(1, 2).to(self.acc)[:, :, None]  # [B, 1 or Hkv, 1, S]
            hidden = torch.isneginf(self.bias).transpose(-1, -2)  # masked keys may hold anything, NaN included
            self.keys, self.values = self.keys.masked_fill(hidden, 0), self.values.masked_fill(hidden, 0)

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        key_bias: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        q_pos: Tensor | None,
        scale: float,
        left: int,
        right: int,
        softcap: float,
        stable: str = "off",
        *,
        block_q: int,
    ) -> "Problem":
        """A problem from the arguments of a registered operator, with the plan that they ask for."""
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            sizes = (q.shape[1], k.shape[1])
            plan = Plan.varlen(cu_seqlens_q, cu_seqlens_k, *sizes, left, right, q_pos=q_pos, block_q=block_q)
        elif q_pos is not None:
            plan = Plan.rows(q_pos, k.shape[1], left, right, block_q=block_q)
        else:
            plan = Plan.window(q.shape[1], k.shape[1], left, right, block_q=block_q, device=q.device)
        return cls(q, k, v, sinks, key_bias, plan, scale, softcap, stable)

    def grouped(self, t: Tensor) -> Tensor:
        """[B, T, H, *] -> view [B, Hkv, G, T, *]: the query heads that share a key head side by side."""
        return torch.movedim(t.unflatten(2, (self.kv_heads, self.group)), 1, 3)

    def queries(self, rows: slice) -> Tensor:
        """Scaled queries of a tile in the accumulation dtype, [B, Hkv, G, rows, D]."""
        return self.grouped(self.q)[..., rows, :].to(self.acc) * self.scale

    def tiles(self, longest: int | None) -> Iterator[tuple[slice, Runs]]:
        """Yield the rows of each tile and the runs of keys they walk over, with whether a run needs a mask."""
        for (first, count), (lo, full_lo, full_hi, hi) in zip(self.plan.tiles.tolist(), self.plan.bounds.tolist(), strict=True):
            if count == 0:
                continue
            runs = []
            for start, stop, masked in ((lo, full_lo, True), (full_lo, full_hi, False), (full_hi, hi, True)):
                step = longest or max(stop - start, 1)
                runs += [(slice(j, min(j + step, stop)), masked) for j in range(start, stop, step)]
            yield slice(first, first + count), runs

    def hidden(self, rows: slice, keys: slice) -> Tensor:
        """[rows, keys] or [B, 1, rows, keys] bool: the keys a row must not see."""
        mask = ~self.plan.mask(rows, keys)
        return mask[:, None] if mask.dim() == 3 else mask

    def scores(self, q: Tensor, rows: slice, keys: slice, masked: bool) -> tuple[Tensor, Tensor | None]:
        """Scores [B, Hkv, G, rows, keys] of scaled queries, and the softcap's derivative."""
        flat = q.flatten(2, 3)  # one matrix product for all heads of a group
        s = (flat @ self.keys[:, :, keys].transpose(-1, -2)).unflatten(2, q.shape[2:4])
        slope = None
        if self.softcap:
            s = torch.tanh(s / self.softcap)
            slope = 1 - s.square()
            s = s * self.softcap
        if self.bias is not None:
            s = s + self.bias[:, :, None, ..., keys]
        if masked:
            s = s.masked_fill_(self.hidden(rows, keys).unsqueeze(-3), -torch.inf)
        return s, slope
