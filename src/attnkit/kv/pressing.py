"""A press: a compression method put together from its parts, and what it does to a layer of the cache."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, PolicyError
from attnkit.kv import scorers
from attnkit.kv.budgets import Budget, Uniform
from attnkit.kv.context import LayerCall, ScoreContext, Stored
from attnkit.kv.notes import Notes
from attnkit.kv.registry import build
from attnkit.kv.schedules import AfterPrefill, Schedule
from attnkit.kv.selectors import Kept, Selector, TopK

__all__ = ["Chain", "Press", "Scorer", "Transform", "press", "read"]


class Scorer(Protocol):
    """How much each stored key is worth; a frozen dataclass of its options.

    Attributes:
        needs: of "moments" (`ctx.moments`), "hidden" (`ctx.hidden`), "rope" (`ctx.rope`), "queries" (every query of the
            prefill in `ctx.queries`, which then has to be one pass), "replay" (see `Press.after_pass`).

    A scorer that looks at the newest queries has a field or property `window`, how many of them.
    """

    needs: ClassVar[frozenset[str]]

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32 in stored order; larger stays. What it says of padding is overwritten."""
        ...


class Transform(Protocol):
    """What happens to keys and values beside dropping.

    A transform to which positions are distances has `contiguous = True`; it never meets rows with padding between real tokens.
    """

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """The stored tokens as they shall be when those that are not in `kept` are gone."""
        ...


@dataclass(frozen=True)
class Press:
    """A compression method: scorer x budget x selector x transform x schedule. It does nothing by itself.

    `attnkit.inference.apply(model, Policy(cache=press))` switches it on; `press(name, ...)` makes one.

    Args:
        scorer: what each key is worth.
        ratio: the fraction that is removed, from 0 up to but not including 1.
        budget: how many keys each head keeps.
        selector: which.
        transform: what else happens to keys and values.
        schedule: when.
        buffer: newest queries (and hidden states) kept for the scorer while decoding.
        spec, options: the name and options it was made of, by which it is written and read.
    Raises:
        OptionError: the ratio is outside its range.
    """

    drops_keys: ClassVar[bool] = True

    scorer: Scorer
    ratio: float = 0.5
    budget: Budget = field(default_factory=Uniform)
    selector: Selector = field(default_factory=TopK)
    transform: Transform | None = None
    schedule: Schedule = field(default_factory=AfterPrefill)
    buffer: int = 256
    spec: str = ""
    options: tuple[tuple[str, Any], ...] = field(default=(), compare=False)  # may hold lists

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise OptionError(
                f"ratio={self.ratio} is not allowed; it is the fraction removed, from 0 up to but not including 1"
            )

    def __str__(self) -> str:
        """As `attnkit.kv.write` writes it; put together by hand, all of its parts."""
        return _written(self) if self.spec else repr(self)

    @property
    def name(self) -> str:
        """The spec it was made of."""
        return self.spec

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of the model and of each pass."""
        return frozenset(self.scorer.needs) | getattr(self.transform, "needs", frozenset())

    def to_dict(self) -> dict[str, Any]:
        """Name, ratio and options as plain values.

        Raises:
            PolicyError: it was put together by hand and has no name.
        """
        if not self.spec:
            raise PolicyError(f"{self} was put together by hand, so it cannot be written; make it with kv.press(name, ...)")
        return {"name": self.spec, "ratio": self.ratio, **dict(self.options)}

    def after(self, call: LayerCall) -> None:
        """Called when a layer's attention is done: take notes, and compress when it is time.

        Raises:
            PolicyError: the cache is not one of ours, or something else has dropped keys of it.
        """
        layer = call.layer
        if layer.listener is not None:
            layer.listener(call)
            return
        if layer.owner not in (None, self):
            raise PolicyError(
                f"the cache was thinned out by {layer.owner}; {self.spec} needs a cache of its own, h.new_cache()"
            )
        notes: Notes = layer.notes.setdefault(self, Notes())
        phase = notes.take(call, self)
        if phase is not None and self.schedule.due(phase=phase, since=notes.since):
            self._compress(call, notes, phase)
        if phase == "prefill":
            notes.end_prefill()

    def after_pass(self, passed: "PassDone") -> None:
        """Called when all layers are done: share a budget over them, or read the context again.

        Raises:
            PolicyError: the method has to read the context again and was not told its tokens.
        """
        pending = [
            (layer, layer.notes[self].pending)
            for layer in passed.layers
            if self in layer.notes and layer.notes[self].pending is not None
        ]
        if not pending:
            return
        contexts = [ctx for _, (ctx, _) in pending]
        scores = [score for _, (_, score) in pending]
        if "replay" in self.needs:
            scores = self.scorer.replay(passed, contexts)  # type: ignore[attr-defined]
            scores = [_real_only(score, ctx) for score, ctx in zip(scores, contexts, strict=True)]
        kept = [self._kept(ctx) for ctx in contexts]
        if hasattr(self.budget, "share"):
            counts = self.budget.share(contexts, scores, kept)
        else:
            counts = [self.budget.counts(*each) for each in zip(contexts, scores, kept, strict=True)]
        for (layer, _), ctx, score, count in zip(pending, contexts, scores, counts, strict=True):
            layer.notes[self].pending = None
            self._finish(layer, ctx, score, count)

    def _compress(self, call: LayerCall, notes: Notes, phase: str) -> None:
        if self.ratio == 0 and isinstance(self.schedule, AfterPrefill):
            return
        ctx = notes.context(call, self, phase)
        notes.since = 0
        if "replay" in self.needs:
            notes.pending = (ctx, None)
            return
        scores = _real_only(self.scorer.score(ctx), ctx)
        if hasattr(self.budget, "share"):
            notes.pending = (replace(ctx, hidden=None), scores)  # the states of all layers would not fit
            return
        self._finish(call.layer, ctx, scores, self.budget.counts(ctx, scores, self._kept(ctx)))

    def _kept(self, ctx: ScoreContext) -> int | Tensor:
        return self.schedule.kept(ctx.stored.length, self.ratio, ctx.seen)

    def _finish(self, layer: Any, ctx: ScoreContext, scores: Tensor, counts: int | Tensor) -> None:
        kept = self.selector.select(ctx, scores, counts, self.scorer)
        stored = ctx.stored if self.transform is None else self.transform.change(ctx, scores, kept)
        layer.compress(stored, kept, owner=self)


class PassDone(Protocol):
    """What `Press.after_pass` is told: `attnkit.inference.bridge.PassDone`.

    Attributes:
        text: the text model.
        layers: the cache's layers that keep positions.
        cache: the cache.
        input_ids: [B, T] of this pass, or None where embeddings were given.
        attention_mask: [B, seen] or None.
        position_ids: [B or 1, T], or None where the model counts for itself.
    """

    text: Any
    layers: list[Any]
    cache: Any
    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None


def _real_only(scores: Tensor, ctx: ScoreContext) -> Tensor:
    real = ctx.stored.real
    return scores if real is None else scores.masked_fill(~real, -torch.inf)


@dataclass(frozen=True)
class Chain:
    """Presses that run one after another: one for the prefill and one for decoding, or one on what another has left.

    Args:
        presses: in their order.
    """

    drops_keys: ClassVar[bool] = True

    presses: tuple[Press, ...]

    def __str__(self) -> str:
        """As `attnkit.kv.write` writes it; where a part was put together by hand, all of all parts."""
        return _written(self) if all(press.spec for press in self.presses) else repr(self)

    @property
    def name(self) -> str:
        """The specs, joined by "+"."""
        return "+".join(press.spec for press in self.presses)

    @property
    def needs(self) -> frozenset[str]:
        """What any of them needs."""
        return frozenset().union(*(press.needs for press in self.presses))

    def to_dict(self) -> dict[str, Any]:
        """Each press's values."""
        return {"name": self.name, "presses": [press.to_dict() for press in self.presses]}

    def after(self, call: LayerCall) -> None:
        """Each in turn."""
        if call.layer.listener is not None:
            call.layer.listener(call)
            return
        owner = call.layer.owner
        if owner not in (None, self):
            raise PolicyError(f"the cache was thinned out by {owner}; {self.name} needs a cache of its own, h.new_cache()")
        for press in self.presses:
            call.layer.owner = None
            press.after(call)
        call.layer.owner = owner if call.layer.owner is None else self

    def after_pass(self, passed: PassDone) -> None:
        """Each in turn."""
        for press in self.presses:
            press.after_pass(passed)


def _written(press: Press | Chain) -> str:
    from attnkit.kv.notation import write  # which makes presses

    return write(press)


def press(spec: str, *, ratio: float = 0.5, **options: Any) -> Press | Chain:
    """Make a press.

    Args:
        spec: a base method, "snapkv"; with wrappers before it, "adakv:snapkv"; several in a row, "snapkv+decode:tova".
            `attnkit kv list` names them.
        ratio: the fraction of keys that is removed.
        options: of the base method and the wrappers, by name.
    Returns:
        what `attnkit.inference.Policy(cache=...)` takes.
    Raises:
        OptionError: an unknown name or option, or a value outside its range.

    >>> press("adakv:expected_attention", ratio=0.5, alpha=0.1).name
    'adakv:expected_attention'
    """
    scorers.load()
    parts = spec.split("+")
    if len(parts) == 1:
        return build(spec, ratio, options)
    if options:
        raise OptionError(
            f"options={sorted(options)} cannot be told apart between {spec!r}; join presses with kv.Chain((a, b))"
        )
    return Chain(tuple(build(part, ratio, {}) for part in parts))


def read(values: dict[str, Any]) -> Press | Chain:
    """Make what `to_dict` wrote."""
    values = dict(values)
    if "presses" in values:
        scorers.load()
        return Chain(tuple(build(each.pop("name"), each.pop("ratio"), each) for each in map(dict, values["presses"])))
    return press(values.pop("name"), **values)
