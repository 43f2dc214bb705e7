"""Scorers that read the context again: which keys does it take to repeat it?"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, PolicyError
from attnkit.kv.budgets_joint import AcrossLayers, Composite
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.pressing import Press
from attnkit.kv.projection import output_norms
from attnkit.kv.registry import base
from attnkit.kv.replay import Asked, Piece, Prompts, checked_chunk, pieces, read_again, weights

__all__ = ["KVCompose", "KVzip", "Replay"]


class Replay:
    """What scorers share that read the context again."""

    needs: ClassVar[frozenset[str]] = frozenset({"replay"})

    def score(self, ctx: ScoreContext) -> Tensor:
        """Not for one layer.

        Raises:
            PolicyError: always.
        """
        raise PolicyError(
            f"{type(self).__name__} reads the context again when all layers are done; it cannot score layer {ctx.index} alone, "
            f"as wrappers want that score parts of it"
        )


def put(scores: Tensor, piece: Piece, found: Tensor) -> None:
    """Write [B, Hkv, C] where the chunk's tokens stand in scores [B, Hkv, S]."""
    scores.scatter_(-1, piece.columns[:, None].expand_as(found), found)


@dataclass(frozen=True)
class KVzip(Replay):
    """A key is worth the most attention that any query gives it while the context is repeated.

    For each chunk, s_i = max over the group's heads and all replayed queries of the attention on i, softmaxed over the
    first tokens, the chunk and what was repeated so far. "kvzip_plus" first multiplies by |W_o v_i| and divides by the
    norm of the query's hidden state. The highest scores of the whole model stay ("adakv:kvzip" shares by layer). Costs
    two to three times the prefill.

    Args:
        plus: weigh by values and hidden states.
        chunk: tokens that are repeated in one pass.
        sink: first tokens, which every chunk sees and which stay.
        prompts: what stands before the chunks; without any, the chunk follows the context as if it went on with it.
    Source: Kim et al. 2025 (KVzip), arXiv:2505.23416; KVzip+: Jegou and Jeblick 2026, arXiv:2601.07891.
    """

    plus: bool = False
    chunk: int = 2048
    sink: int = 4
    prompts: Prompts = field(default_factory=Prompts)

    def __post_init__(self) -> None:
        checked_chunk(self.chunk)

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S] float32 of each layer.

        Raises:
            PolicyError: the context cannot be read again.
        """
        scores = [torch.zeros(ctx.stored.shape, device=ctx.stored.keys.device) for ctx in contexts]
        widths = _Widths(contexts) if self.plus else None

        def listen(place: int, piece: Piece, call: Any) -> None:
            ctx = contexts[place]
            found = scores[place].new_zeros(*ctx.stored.shape[:2], piece.columns.shape[1])
            factor = None if widths is None else chunk_norms(ctx, piece)
            for block, part in weights(piece, Asked.of(piece, call)):
                if widths is not None and factor is not None:
                    part = part * factor / widths.of(place)[:, None, None, block, None]
                torch.maximum(found, part.amax((2, 3)), out=found)
            put(scores[place], piece, found)

        with torch.no_grad():
            if widths is None:
                read_again(passed, contexts, pieces(passed, self.chunk, self.sink, self.prompts), listen)
            else:
                with widths:
                    read_again(passed, contexts, pieces(passed, self.chunk, self.sink, self.prompts), listen)
        return [must_stay(score, ctx, sink=self.sink) for ctx, score in zip(contexts, scores, strict=True)]


def chunk_norms(ctx: ScoreContext, piece: Piece) -> Tensor:
    """[B, Hkv, G, 1, C] float32: |W_o v| of the chunk's values."""
    values = ctx.stored.values.detach()
    index = piece.columns[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[-1])
    norms = output_norms(values.gather(2, index), ctx.module, ctx.queries.shape[1], order=2)
    grouped: Tensor = norms.unflatten(1, (-1, ctx.groups))
    return grouped[:, :, :, None]


class _Widths:
    """The norms of hidden states that go into each layer's attention module, while it is entered."""

    def __init__(self, contexts: list[ScoreContext]) -> None:
        self._modules = [ctx.module for ctx in contexts]
        self._held: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def of(self, place: int) -> Tensor:
        """[B, T] float32 of the pass that runs."""
        return self._held[id(self._modules[place])]

    def __enter__(self) -> None:
        self._hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._modules]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # rows of padding may be anything
        self._held[id(module)] = hidden.detach().float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class KVCompose(Replay):
    """A key is worth the attention it gets while the whole context is read once more, after itself.

    Over the queries of the second reading the maximum (or mean) of the attention, then the mean over a group; the mean of
    a layer's heads is added to each of them, and the norm of the value may weigh it. See `Composite` for the budget. The
    second pass makes the cache twice as long for its time.

    Args:
        queries: "max" or "mean", over queries.
        value_norm: multiply by |v|.
        join_heads: add the mean over the layer's heads.
    Source: Akulov et al. 2025 (KVCompose), arXiv:2509.05165.
    """

    queries: str = "max"
    value_norm: bool = False
    join_heads: bool = True

    def __post_init__(self) -> None:
        if self.queries not in ("mean", "max"):
            raise OptionError(f"queries={self.queries!r} is not allowed; it is 'mean' or 'max'")

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S] float32 of each layer.

        Raises:
            PolicyError: the context cannot be read again.
        """
        scores = [torch.zeros(ctx.stored.shape, device=ctx.stored.keys.device) for ctx in contexts]

        def listen(place: int, piece: Piece, call: Any) -> None:
            ctx = contexts[place]
            found = scores[place].new_zeros(*ctx.stored.shape[:2], ctx.groups, piece.columns.shape[1])
            for _, part in weights(piece, Asked.of(piece, call)):
                found = torch.maximum(found, part.amax(3)) if self.queries == "max" else found + part.sum(3)
            if self.queries == "mean":
                found = found / piece.asked.sum(-1).clamp(min=1)[:, None, None, None]
            put(scores[place], piece, found.mean(2))

        with torch.no_grad():
            read_again(passed, contexts, pieces(passed, None, 0, Prompts()), listen)
        return [self._weighed(ctx, score) for ctx, score in zip(contexts, scores, strict=True)]

    def _weighed(self, ctx: ScoreContext, score: Tensor) -> Tensor:
        if self.value_norm:
            score = score * ctx.stored.values.float().norm(dim=-1)
        return score + score.mean(1, keepdim=True) if self.join_heads else score


def prompts_of(prompt_ids: Any, later_ids: Any, suffix_ids: Any) -> Prompts:
    """Prompts from what was given as options; later chunks have the first one's prompt unless they are given their own."""
    later = prompt_ids if later_ids is None else later_ids
    return Prompts(tuple(prompt_ids), tuple(later), tuple(suffix_ids))


@base("kvzip")
def _kvzip(chunk: int = 2048, sink: int = 4, prompt_ids: Any = (), later_ids: Any = None, suffix_ids: Any = ()) -> Press:
    """Keys that are looked at while the context is repeated; see `KVzip`.

    Source: Kim et al. 2025 (KVzip), arXiv:2505.23416.
    """
    return Press(KVzip(False, chunk, sink, prompts_of(prompt_ids, later_ids, suffix_ids)), budget=AcrossLayers())


@base("kvzip_plus")
def _kvzip_plus(chunk: int = 2048, sink: int = 4, prompt_ids: Any = (), later_ids: Any = None, suffix_ids: Any = ()) -> Press:
    """KVzip's scores, weighed by the size of values and hidden states; see `KVzip`.

    Source: Jegou and Jeblick 2026 (KVzap), arXiv:2601.07891.
    """
    return Press(KVzip(True, chunk, sink, prompts_of(prompt_ids, later_ids, suffix_ids)), budget=AcrossLayers())


@base("kvcompose")
def _kvcompose(
    queries: str = "max", heads: str = "mean", value_norm: bool = False, join_heads: bool = True, structured: bool = True
) -> Press:
    """Keys that are looked at in a second reading; all heads of a layer keep equally many; see `KVCompose`.

    Source: Akulov et al. 2025 (KVCompose), arXiv:2509.05165.
    """
    return Press(KVCompose(queries, value_norm, join_heads), budget=Composite(heads) if structured else AcrossLayers())
