"""What a press remembers of one layer between passes."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkit._core.errors import InputError, PolicyError
from attnkit.kv.context import LayerCall, ScoreContext
from attnkit.kv.moments import QueryMoments

if TYPE_CHECKING:
    from attnkit.kv.pressing import Press

__all__ = ["Notes"]


@dataclass
class Notes:
    """Newest queries and hidden states, running moments, and where in its schedule a press stands.

    Attributes:
        prefilled: the context has been read.
        since: tokens since then, or since the press last compressed.
        pending: (context, scores or None), for what is decided when all layers are done.
        memory: what the scorer wants to find again, by names of its own; tensors have rows first.
    """

    prefilled: bool = False
    since: int = 0
    pending: Any = None
    queries: Tensor | None = None
    positions: Tensor | None = None
    turned: Tensor | None = None
    real: Tensor | None = None
    hidden: Tensor | None = None
    moments: Any = None
    whole: bool = field(default=True)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def take(self, call: LayerCall, press: "Press") -> str | None:
        """Note one pass; returns "prefill" where it completes the context, "decode" after that, None before.

        Raises:
            InputError: a pass goes beyond the end of the context that the cache was told of.
        """
        context = call.layer.context
        new = call.q.shape[1]
        if self.prefilled:
            self.since += new
            if not press.schedule.decodes:
                return "decode"
            phase: str | None = "decode"
        else:
            phase = "prefill" if call.seen >= (context or 0) else None
            if context is not None and call.seen > context:
                raise InputError(
                    f"this pass ends at token {call.seen}, beyond the context of {context} tokens that "
                    f"new_cache(context=...) was told of; end a pass there"
                )
        self.whole = self.whole and call.first == 0
        limit = press.buffer if self.prefilled else _prefill_window(press)
        self._buffer(call, new if limit is None else limit)
        if "moments" in press.needs:
            self._note_moments(call, press)
        return phase

    def _note_moments(self, call: LayerCall, press: "Press") -> None:
        if self.prefilled:  # while decoding the newest queries count, see `context`
            return
        if self.moments is None:
            self.moments = QueryMoments(sinks=int(getattr(press.scorer, "sinks", 4)))
        real = None if call.padding is None else call.padding.mask[:, call.first : call.seen].bool()
        self.moments.update(call.q.transpose(1, 2), real=real, **_rotation(call, _turned(call)))

    def _recent_moments(self, call: LayerCall) -> QueryMoments:
        assert self.queries is not None
        assert self.turned is not None
        moments = QueryMoments(sinks=0)
        moments.update(self.queries, real=self.real, **_rotation(call, self.turned))
        return moments

    def _buffer(self, call: LayerCall, limit: int) -> None:
        q = call.q.transpose(1, 2)
        positions = torch.arange(call.first, call.seen, device=q.device)[None]
        real = None if call.padding is None else call.padding.mask[:, call.first : call.seen]
        self.queries = _newest(self.queries, q, limit, 2)
        self.positions = _newest(self.positions, positions, limit, 1)
        self.turned = _newest(self.turned, _turned(call), limit, 1)
        if real is not None or self.real is not None:
            held = self.queries.shape[2]
            new = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if real is None else real.bool()
            old = self.real
            if old is None and held > q.shape[2]:
                old = torch.ones(q.shape[0], held - q.shape[2], dtype=torch.bool, device=q.device)
            self.real = _newest(old, new, limit, 1)
        if call.hidden is not None:
            self.hidden = _newest(self.hidden, call.hidden, limit, 1)

    def end_prefill(self) -> None:
        """Start counting anew; a press that compresses while decoding starts with an empty buffer."""
        self.prefilled, self.since = True, 0
        self.queries = self.positions = self.turned = self.real = self.hidden = None
        self.moments = None

    def context(self, call: LayerCall, press: "Press", phase: str) -> ScoreContext:
        """What the scorer gets.

        Raises:
            PolicyError: it needs all queries of the context, and they came in several passes; or padding stands between real
                tokens, and the press takes positions for distances.
        """
        if "queries" in press.needs and phase == "prefill" and not self.whole:
            raise PolicyError(
                f"{press.spec} needs the whole context in one pass; do not prefill in chunks, or take another method"
            )
        if getattr(press.transform, "contiguous", False) and call.padding is not None and not call.padding.contiguous:
            raise PolicyError(
                f"{press.spec} turns keys by the distance of their tokens, and attention_mask has padding between real tokens; "
                f"pad rows at their ends only, or leave rerotate out"
            )
        assert self.queries is not None
        assert self.positions is not None
        assert self.turned is not None
        wants = "moments" in press.needs
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        return ScoreContext(
            stored=call.layer.view(call.padding),
            queries=self.queries,
            query_positions=self.positions,
            query_real=self.real,
            query_turned=self.turned,
            moments=self._recent_moments(call) if wants and phase == "decode" else self.moments,
            hidden=self.hidden,
            seen=call.seen,
            index=call.index,
            layers=int(call.module.config.num_hidden_layers),
            module=call.module,
            scale=scale,
            softcap=call.softcap,
            rope=call.rope,
            ratio=press.ratio,
            phase=phase,
            memory=self.memory,
        )

    def copy(self) -> "Notes":
        """A copy that shares no tensor that changes."""
        return replace(self, moments=copy(self.moments), memory=dict(self.memory))

    def forget(self, count: int) -> None:
        """The newest `count` tokens are taken back: forget their queries."""
        self.since = max(self.since - count, 0)
        for name, dim in (("queries", 2), ("positions", 1), ("turned", 1), ("real", 1), ("hidden", 1)):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.narrow(dim, 0, max(held.shape[dim] - count, 0)))

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows of the batch."""
        for name in ("queries", "turned", "real", "hidden"):
            value = getattr(self, name)
            alike = name == "turned" and value is not None and value.shape[0] == 1
            setattr(self, name, value if value is None or alike else change(value))
        if self.moments is not None:
            self.moments = self.moments.rows(change)
        self.memory = {name: change(value) for name, value in self.memory.items()}


def _prefill_window(press: "Press") -> int | None:
    """How many of the context's newest queries the scorer wants; None is all of them."""
    if press.needs & {"queries", "hidden"}:
        return None
    return int(getattr(press.scorer, "window", 1))


def _turned(call: LayerCall) -> Tensor:
    """[B or 1, T] int64; what the model was not told it counts itself."""
    counted = torch.arange(call.first, call.seen, device=call.q.device)[None]
    return counted if call.turned is None else call.turned


def _rotation(call: LayerCall, turned: Tensor) -> dict[str, Any]:
    """How queries were rotated to `turned` [B or 1, n], in the words of `QueryMoments.update`."""
    places = turned[0] if turned.shape[0] == 1 else turned  # one row of angles serves all
    return {"positions": places, "inv_freq": call.rope.inv_freq, "interleaved": bool(call.rope.interleaved)}


def _newest(old: Tensor | None, new: Tensor, limit: int, dim: int) -> Tensor:
    joined = new if old is None else torch.cat([old, new], dim)
    return joined.narrow(dim, max(joined.shape[dim] - limit, 0), min(limit, joined.shape[dim])).clone()
