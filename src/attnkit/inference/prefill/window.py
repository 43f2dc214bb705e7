"""A sliding window with attention sinks, and the bounded cache that goes with it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError, PolicyError, UnsupportedError
from attnkit.inference.call import LayerCall, Padding

__all__ = ["CROP_SLACK", "Window"]

CROP_SLACK = 64
"""Tokens kept beyond the window so that speculative decoding can take back up to this many in one step."""


@dataclass(frozen=True)
class Window:
    """Each query sees the last `window` keys, itself included, and the row's first `sink` real tokens.

    With a cache from `new_cache()` keys that no later query can see are dropped, so that a full-attention layer stores at
    most sink + window - 1 + 2 * CROP_SLACK tokens between forward passes; with a DynamicCache the outputs are the same and
    memory grows. Layers that have a sliding window of their own are left alone.

    Args:
        window: keys, at least 1; the query's own counts.
        sink: keys at the beginning of each row, 0 or more.
        rerotate: False keeps original positions. True gives those of StreamingLLM, counted inside the cache: a query
            stands at most sink + window - 1 positions behind the first sink.
        dense_prefill: the first forward pass on an empty cache is dense (a pass without a cache too), and the window
            applies from then on.
    Raises:
        OptionError: window below 1 or sink below 0.
    Source: Xiao et al. 2023, arXiv:2309.17453; the two parts are merged by their log-sum-exp.
    """

    name: ClassVar[str] = "window"
    sparse: ClassVar[bool] = True
    drops_keys: ClassVar[bool] = True
    needs_causal: ClassVar[bool] = True
    window: int = 1024
    sink: int = 4
    rerotate: bool = False
    dense_prefill: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"window={self.window} is not allowed; the query's own key counts, so it is at least 1")
        if self.sink < 0:
            raise OptionError(f"sink={self.sink} is not allowed; it counts keys, 0 or more")

    @property
    def needs_rotation(self) -> bool:
        """Only sinks at positions of their own need it."""
        return self.rerotate and self.sink > 0

    def attend(self, call: LayerCall) -> Tensor:
        """Return out [B, T, H, Dv] and drop what no later query can see.

        Raises:
            UnsupportedError: padding between the real tokens of a row.
            PolicyError: the cache lacks keys that something else has dropped.
        """
        self._check(call)
        sees_all = call.seen <= self.sink + self.window or (self.dense_prefill and call.first == 0)
        out = call.dense() if sees_all else self._sparse(call)
        self._drop(call)
        return out

    def _check(self, call: LayerCall) -> None:
        if call.layer is not None and call.layer.owner not in (None, self):
            raise PolicyError(
                f"the cache was thinned out by {call.layer.owner}; {self} needs a cache of its own, h.new_cache()"
            )
        if call.layer is None and call.k.shape[1] != call.seen:
            raise PolicyError(
                f"the cache holds {call.k.shape[1]} keys of {call.seen} tokens and does not say which; use h.new_cache() or a "
                f"DynamicCache"
            )

    def _sparse(self, call: LayerCall) -> Tensor:
        # keys further back than this are outside the window of every query
        near = max(call.k.shape[1] - call.q.shape[1] - (self.window - 1), 0)
        seen = None
        if call.padding is None:
            near = max(near, self.sink)
        elif call.padding.contiguous:
            seen = self._real_beyond_sinks(call, call.padding)[..., near:]
        else:
            raise UnsupportedError("a row has padding between its tokens, so windows cannot be counted; pad on the left")
        if call.q.shape[1] == 1:
            return self._one_query(call, near, seen)
        parts = [self._window_part(call, near, seen)]
        if self.sink:
            parts.append(self._sink_part(call))
        if len(parts) == 1:
            return parts[0][0].to(call.q.dtype)
        out, _ = ops.merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
        return out.to(call.q.dtype)

    def _real_beyond_sinks(self, call: LayerCall, padding: Padding) -> Tensor:
        """[B, Hkv or 1, S] bool: which keys the window part may show."""
        rank = call.key_positions() - padding.starts[:, None, None]
        real = padding.mask[:, None].expand(-1, rank.shape[1], -1).gather(-1, call.key_positions().expand_as(rank))
        return real & ((rank < 0) | (rank >= self.sink))

    def _window_part(self, call: LayerCall, near: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        part: Any = ops.attention(
            call.q,
            call.k[:, near:],
            call.v[:, near:],
            causal=True,
            window_size=(self.window - 1, 0),
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            key_bias=call.key_bias(seen),
            return_lse=True,
            out_dtype=accumulator_dtype(call.q.dtype),
        )
        return part  # type: ignore[no-any-return]

    def _sink_part(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        k, v, rank = self._sinks(call)
        q = call.q
        if self.needs_rotation:
            assert call.rope is not None  # needs_rotation asked for it
            q = call.rope.rotate(q, -self._skipped(rank))
        part: Any = ops.query_sparse_attention(
            q,
            k,
            v,
            rank.clamp(0, self.sink - 1),  # sinks up to the query's own rank are real
            scale=call.scale,
            softcap=call.softcap,
            return_lse=True,
            out_dtype=accumulator_dtype(q.dtype),
        )
        return part  # type: ignore[no-any-return]

    def _one_query(self, call: LayerCall, near: int, seen: Tensor | None) -> Tensor:
        """Decoding: the sinks, turned to where the one query sees them, and its window, in a single call."""
        k, v, rank = self._sinks(call)
        if self.needs_rotation:
            assert call.rope is not None  # needs_rotation asked for it
            k = call.rope.rotate(k, self._skipped(rank).expand(*rank.shape[:-1], self.sink))
        if seen is not None:
            real = torch.arange(self.sink, device=rank.device) <= rank  # [B, sink]
            seen = torch.cat([real[:, None].expand(-1, seen.shape[1], -1), seen], dim=-1)
        out: Any = ops.attention(
            call.q,
            torch.cat([k, call.k[:, near:]], dim=1),
            torch.cat([v, call.v[:, near:]], dim=1),
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            key_bias=call.key_bias(seen),
        )
        return out  # type: ignore[no-any-return]

    def _skipped(self, rank: Tensor) -> Tensor:
        """How many tokens lie between the sinks and the window of a query that is number `rank` of its row."""
        return (rank - (self.sink + self.window - 1)).clamp(min=0)

    def _sinks(self, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, sink, Hkv, D] of the sinks, and each query's rank [T] or [B, T] among its row's real tokens."""
        rank = torch.arange(call.first, call.seen, device=call.q.device)
        if call.padding is None:
            return call.k[:, : self.sink], call.v[:, : self.sink], rank
        starts = call.padding.starts[:, None]
        token = starts + torch.arange(self.sink, device=call.k.device)
        stored = call.key_positions()[:, 0].expand(call.k.shape[0], -1).contiguous()
        index = torch.searchsorted(stored, token).clamp_(max=call.k.shape[1] - 1)[..., None, None]
        k, v = (states.gather(1, index.expand(-1, -1, *states.shape[2:])) for states in (call.k, call.v))
        return k, v, rank - starts

    def _drop(self, call: LayerCall) -> None:
        layer = call.layer
        if layer is None or layer.stored <= self.sink + self.window - 1 + 2 * CROP_SLACK:
            return
        recent = self.window - 1 + CROP_SLACK
        device = layer.positions.device
        tail = torch.arange(layer.stored - recent, layer.stored, device=device).expand(call.k.shape[0], -1)
        if call.padding is None:
            head = torch.arange(self.sink, device=device).expand(call.k.shape[0], -1)
        else:
            head = self._sink_slots(layer.positions[:, 0], call.padding.starts, layer.seen - recent)
        index = torch.cat([head, tail], dim=-1)[:, None]
        layer.keep(index, floor=layer.seen - CROP_SLACK, owner=self)

    def _sink_slots(self, positions: Tensor, starts: Tensor, recent_from: int) -> Tensor:
        """[B, sink] stored slots of the sinks before the recent part.

        A row with much padding has fewer of them there. To keep rows equally long the rest repeats its token 0, which is
        padding in such a row, and so stays masked.
        """
        before = (recent_from - starts).clamp(0, self.sink)[:, None]
        which = torch.arange(self.sink, device=positions.device) - (self.sink - before)
        token = torch.where(which < 0, 0, starts[:, None] + which)
        return torch.searchsorted(positions.contiguous(), token)
