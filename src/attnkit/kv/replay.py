"""Reading the context a second time, chunk by chunk, to see which keys it takes to repeat it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, PolicyError
from attnkit.kv.context import ScoreContext
from attnkit.kv.storage import copied

__all__ = ["Asked", "Piece", "Prompts", "pieces", "read_again", "weights"]

_SCORES = 2**25  # elements of a block of scores, 128 MB
_BEFORE = 8  # tokens before a chunk that say where it begins


@dataclass(frozen=True)
class Prompts:
    """What stands before a chunk that is to be repeated, as tokens of the model's vocabulary.

    Args:
        first: before the first chunk, "repeat the text above".
        later: before the others, "repeat the part of the text above that begins with"; the last tokens before the chunk
            follow.
        suffix: between these and the chunk, as where a chat template lets the answer begin.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One chunk of the context, repeated.

    Attributes:
        ids: [B, T] int64, the tokens of this pass; the chunk's come last.
        asked: [B, T] bool, which of them are real.
        columns: [B, C] int64, where the chunk's tokens stand in their rows.
        real: [B, C] bool, which of them are real tokens.
        sinks: [B, F] int64, where the first tokens of the rows stand, as far as they are before the chunk.
        sinks_real: [B, F] bool.
        width: tokens that the cache has seen before.
    """

    ids: Tensor
    asked: Tensor
    columns: Tensor
    real: Tensor
    sinks: Tensor
    sinks_real: Tensor
    width: int


def pieces(passed: Any, chunk: int | None, sink: int, prompts: Prompts) -> Iterator[Piece]:
    """The passes that repeat the context; chunks count a row's real tokens, so that padding does not shift them.

    Args:
        passed: the pass that read the context, see `attnkit.kv.pressing.PassDone`.
        chunk: tokens a pass, None for all at once.
        sink: first tokens that each chunk is shown besides itself.
        prompts: what stands before the chunks.
    """
    ids = passed.input_ids
    batch, width = ids.shape
    chunk = chunk or width
    mask = torch.ones_like(ids, dtype=torch.bool) if passed.attention_mask is None else passed.attention_mask.bool()
    length = mask.sum(-1, keepdim=True)
    order = (~mask).int().argsort(dim=-1, stable=True)  # real tokens first, as they come
    rank = torch.arange(width, device=ids.device)
    for start in range(0, width, chunk):
        columns = order[:, start : start + chunk]
        real = rank[start : start + chunk] < length
        before = order[:, max(start - _BEFORE, 0) : start]
        head = torch.tensor(prompts.later if start else prompts.first, dtype=ids.dtype, device=ids.device).expand(batch, -1)
        tail = torch.tensor(prompts.suffix, dtype=ids.dtype, device=ids.device).expand(batch, -1)
        said = torch.cat([head, ids.gather(1, before), tail, ids.gather(1, columns)], dim=1)
        live = (start < length).expand(-1, said.shape[1] - columns.shape[1])
        shown = min(sink, start)
        yield Piece(
            ids=said,
            asked=torch.cat([live, real], dim=1),
            columns=columns,
            real=real,
            sinks=order[:, :shown],
            sinks_real=rank[:shown] < length,
            width=width,
        )


@contextmanager
def _unchanged(cache: Any) -> Iterator[Callable[[], None]]:
    """Gives a function that puts the cache back to what it is now; called at the end, too."""
    from attnkit.kv.layers import KVLayer

    # a plain layer of ours makes new tensors when it grows; stock layers may write into theirs
    held = [
        dict(vars(layer)) if isinstance(layer, KVLayer) else {name: copied(value) for name, value in vars(layer).items()}
        for layer in cache.layers
    ]

    def restore() -> None:
        for layer, state in zip(cache.layers, held, strict=True):
            own = isinstance(layer, KVLayer)
            vars(layer).update(state if own else {name: copied(value) for name, value in state.items()})

    try:
        yield restore
    finally:
        restore()


def read_again(
    passed: Any,
    contexts: list[ScoreContext],
    passes: Iterator[Piece],
    listen: Callable[[int, Piece, Any], None],
    *,
    run: Callable[..., Any] | None = None,
) -> None:
    """Run the passes on the cache as it is; afterwards it is as before.

    Args:
        passed: the pass that read the context.
        contexts: its layers.
        passes: from `pieces`.
        listen: called with the place in `contexts`, the piece and the layer's attention call.
        run: called in place of the text model, with the piece and the model's arguments.
    Raises:
        PolicyError: the tokens of the context are not known, or not all of it is there any more.
    """
    _check(passed, contexts)
    places = {ctx.index: place for place, ctx in enumerate(contexts)}
    with _unchanged(passed.cache) as restore:
        for piece in passes:
            for layer in passed.layers:
                layer.listener = lambda call, piece=piece: listen(places[call.index], piece, call)
            arguments = {"past_key_values": passed.cache, "use_cache": True} | _placed(passed, piece)
            if run is None:
                passed.text(input_ids=piece.ids, **arguments)
            else:
                run(piece, arguments)
            restore()


def _check(passed: Any, contexts: list[ScoreContext]) -> None:
    if passed.input_ids is None:
        raise PolicyError("this method reads the context again and needs its tokens; pass input_ids, not inputs_embeds")
    if passed.input_ids.shape[1] != contexts[0].seen:
        raise PolicyError(
            f"this method reads the context again and knows {passed.input_ids.shape[1]} of its {contexts[0].seen} tokens; "
            f"read the context in one pass, and compress at its end"
        )
    if any(layer.pages is not None for layer in passed.layers):
        raise PolicyError("this method reads the context again, and part of the cache has been compressed before")


def _placed(passed: Any, piece: Piece) -> dict[str, Tensor]:
    """Mask and positions: in each row the new tokens follow the last real one."""
    given, positions = passed.attention_mask, passed.position_ids
    if given is None and positions is None:
        return {}
    batch, width = passed.input_ids.shape
    new = torch.arange(piece.ids.shape[1], device=piece.ids.device)
    mask = torch.ones_like(passed.input_ids, dtype=torch.bool) if given is None else given.bool()
    columns = torch.arange(width, device=mask.device).expand(batch, -1)
    last = columns.masked_fill(~mask, -1).amax(-1, keepdim=True)
    if positions is not None:
        last = positions.expand(batch, -1).gather(1, last.clamp(min=0))
    placed = {"position_ids": last + 1 + new}
    if given is not None:
        placed["attention_mask"] = torch.cat([mask, piece.asked], dim=1).to(given.dtype)
    return placed


@dataclass(frozen=True)
class Asked:
    """What one layer was asked while a chunk was repeated.

    Attributes:
        queries: [B, Hkv, G, T, D].
        keys: [B, Hkv, F + C + T, D]: the first tokens', the chunk's and the repeated ones.
        scale, softcap: of the scores.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, piece: Piece, call: Any) -> "Asked":
        """From an attention call of a plain layer."""
        stored = call.layer.view(None)
        batch, heads = stored.shape[:2]
        own = piece.width + torch.arange(piece.ids.shape[1], device=piece.ids.device).expand(batch, -1)
        index = torch.cat([piece.sinks, piece.columns, own], dim=1)[:, None, :, None]
        keys = stored.keys.detach().gather(2, index.expand(-1, heads, -1, stored.keys.shape[-1]))
        queries = call.q.detach().transpose(1, 2).unflatten(1, (heads, -1))
        return cls(queries, keys, call.q.shape[-1] ** -0.5 if call.scale is None else call.scale, call.softcap)


def weights(piece: Piece, asked: Asked) -> Iterator[tuple[slice, Tensor]]:
    """Attention on the chunk's keys, softmaxed over the first tokens', the chunk's and (causally) the repeated ones.

    Yields:
        which of the T queries, and [B, Hkv, G, t, C] float32 of them; rows and keys of padding are zero.
    """
    batch, heads, group, count, _ = asked.queries.shape
    keys = asked.keys.float()
    step = max(1, _SCORES // (batch * heads * group * keys.shape[2]))
    given = torch.cat([piece.sinks_real, piece.real], dim=1)
    shown, chunk = piece.sinks.shape[1], piece.columns.shape[1]
    place = torch.arange(count, device=keys.device)
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        scores = torch.einsum("bkgtd,bksd->bkgts", asked.queries[:, :, :, block].float(), keys) * asked.scale
        if asked.softcap is not None:
            scores = asked.softcap * torch.tanh(scores / asked.softcap)
        own = piece.asked[:, None] & (place <= place[block, None])
        seen = torch.cat([given[:, None].expand(-1, own.shape[1], -1), own], dim=-1)
        part = torch.softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), dim=-1)[..., shown : shown + chunk]
        yield block, torch.nan_to_num(part, nan=0.0) * piece.asked[:, None, None, block, None]


def checked_chunk(chunk: int) -> None:
    """Raises OptionError: not a number of tokens."""
    if chunk < 1:
        raise OptionError(f"chunk={chunk} is not allowed; it counts tokens, 1 or more")
