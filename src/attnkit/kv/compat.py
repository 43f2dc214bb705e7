"""Compression objects of NVIDIA's kvpress as presses of ours; kvpress itself is not imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import PolicyError
from attnkit.kv.budgets_tables import Threshold
from attnkit.kv.context import Rotation, ScoreContext
from attnkit.kv.pressing import Press

__all__ = ["adapt"]


def adapt(theirs: Any, model: Any = None) -> Press:
    """Let a kvpress object decide what `attnkit.inference.apply` keeps: `Policy(cache=adapt(SnapKVPress(0.5)))`.

    Of an object that scores, the score is used and its ratio. Of one that only compresses, what it returns is compared with
    what it was given, or the keys that it masks are read: these tokens go, really. It works once, when the context has been
    read in one pass without padding.

    Args:
        theirs: the object.
        model: where the object has to be prepared with the model (`post_init_from_model`), the model.
    Raises:
        PolicyError: it takes over the model's forward pass or acts while decoding; our own method of the name does that. Or,
            when it runs: it changes keys or values beside dropping them, which cannot be told from other tokens.
    """
    name = type(theirs).__name__
    for part in ("forward_hook", "__call__"):
        if _owner(theirs, part) != "BasePress":
            raise PolicyError(
                f"{name} has a {part} of its own, beyond scoring and compressing a layer after the prefill; take attnkit's own "
                f"method, attnkit.kv.methods() names them"
            )
    if model is not None:
        theirs.post_init_from_model(model)
    if hasattr(theirs, "score") and _owner(theirs, "compress") == "ScorerPress":
        return Press(_Scored(theirs), ratio=float(theirs.compression_ratio))
    return Press(_Compressed(theirs), budget=Threshold(0.5))


def _owner(theirs: Any, part: str) -> str:
    return str(getattr(getattr(type(theirs), part, None), "__qualname__", "nothing")).split(".")[0]


@dataclass(frozen=True, eq=False)
class _Scored:
    """Their scores."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "rope", "queries"})
    theirs: Any

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        with _asked(self.theirs, ctx) as arguments:
            scores: Tensor = self.theirs.score(*arguments)
        return scores.float()


@dataclass(frozen=True, eq=False)
class _Compressed:
    """1 for what they keep, 0 for the rest."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "rope", "queries"})
    theirs: Any

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            PolicyError: what they return is not a part of what they were given.
        """
        module = ctx.module
        with _asked(self.theirs, ctx) as arguments:
            keys, values = arguments[2], arguments[3]
            given = torch.cat([keys, values], dim=-1)
            back = torch.cat(self.theirs.compress(*arguments), dim=-1)
            masked = getattr(module, "masked_key_indices", None)
        kept = _part(given, back, type(self.theirs).__name__)
        if masked is not None:
            kept[tuple(torch.as_tensor(place, device=kept.device).long() for place in masked)] = False
        return kept.float()


@contextmanager
def _asked(theirs: Any, ctx: ScoreContext) -> Iterator[tuple[Any, ...]]:
    """The arguments of their methods; what they leave on the module is taken away again.

    Raises:
        PolicyError: padding, decoding, or a context that was read in several passes.
    """
    name = type(theirs).__name__
    if ctx.stored.real is not None:
        raise PolicyError(f"{name} knows nothing of padding; read rows one by one, or take attnkit's own method")
    size = ctx.stored.shape[2]
    if ctx.phase != "prefill" or ctx.hidden is None or ctx.hidden.shape[1] != size or ctx.rope is None:
        raise PolicyError(f"{name} wants the hidden states of all stored tokens; it works at the end of a prefill in one pass")
    rotary = _Rotary(ctx.rope)
    kwargs = {
        "hidden_states": ctx.hidden,
        "position_embeddings": rotary(ctx.hidden, ctx.query_turned),
        "cache_position": torch.arange(size, device=ctx.hidden.device),
    }
    before = dict(vars(ctx.module))
    ctx.module.masked_key_indices = None
    if not hasattr(ctx.module, "rotary_emb"):
        ctx.module.rotary_emb = rotary
    try:
        yield ctx.module, ctx.hidden, ctx.stored.keys.clone(), ctx.stored.values.clone(), None, kwargs
    finally:
        for added in set(vars(ctx.module)) - set(before):
            delattr(ctx.module, added)
        vars(ctx.module).update(before)


class _Rotary:
    """A model's rotary module, as they use it."""

    def __init__(self, rope: Rotation) -> None:
        self.inv_freq = rope.inv_freq
        self.attention_scaling = rope.attention_factor

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angle = torch.cat([angle, angle], dim=-1)
        factor = self.attention_scaling
        return (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)


def _part(given: Tensor, back: Tensor, name: str) -> Tensor:
    """[B, Hkv, S] bool: which rows of given [B, Hkv, S, D] came back, [B, Hkv, M, D], bit by bit."""
    kept = torch.zeros(given.shape[:3], dtype=torch.bool, device=given.device)
    size = given.shape[2]
    if back.shape[:2] != given.shape[:2] or back.shape[3] != given.shape[3]:
        raise PolicyError(
            f"{name} returns keys and values of shape {tuple(back.shape)}; rows of {tuple(given.shape)} are expected"
        )
    for row in range(given.shape[0]):
        for head in range(given.shape[1]):
            joined = torch.cat([given[row, head], back[row, head]])
            kinds, kind = joined.unique(dim=0, return_inverse=True)
            if kinds.shape[0] != size or kind[:size].unique().numel() != size or kind[size:].unique().numel() != back.shape[2]:
                raise PolicyError(
                    f"{name} changes keys or values beside dropping them, or some tokens are equal, so that it cannot be seen "
                    f"which it keeps; take attnkit's own method, attnkit.kv.methods() names them"
                )
            place = torch.empty(size, dtype=torch.long, device=given.device)
            place[kind[:size]] = torch.arange(size, device=given.device)
            kept[row, head, place[kind[size:]]] = True
    return kept
