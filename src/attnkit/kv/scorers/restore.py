"""A second reading, and learnt tokens that take down what is about to be dropped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import ShapeError
from attnkit.kv.budgets import kept_of
from attnkit.kv.budgets_joint import AcrossLayers
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.line import MUST_STAY
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base
from attnkit.kv.replay import Piece, read_again
from attnkit.kv.scorers.replay import KVzip, prompts_of
from attnkit.kv.weights import device_copy, required, tensors

__all__ = ["RestoreKV", "Restored"]

_STEM = "base_model.model.model."  # in front of the text model's names in files of adapters


@dataclass(frozen=True)
class RestoreKV(KVzip):
    """KVzip, and r learnt tokens that read the whole context before anything goes; their keys are part of what is kept.

    The tokens are encoded in one pass under a low-rank adapter of the model, at the positions after the context, and are
    stored as if they were its last token; the tokens that follow have the positions that they would have without them.

    Args:
        embeddings: safetensors with `restore_embeddings` [r, width].
        adapter: safetensors with `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] of linear layers, named as
            adapters are published; None is no adapter.
        scaling: what the adapter's products are multiplied with, alpha / rank of its configuration.
    """

    embeddings: str | None = None
    adapter: str | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        required(self.embeddings, "restorekv", "embeddings, the safetensors file of restore tokens trained for this model")

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S + r] float32 of each layer; `contexts` get the r tokens, too.

        Raises:
            PolicyError: the context cannot be read again.
            ShapeError: tokens or adapter are another model's.
        """
        scores = super().replay(passed, contexts)
        tokens = self._tokens(passed)
        taken: dict[int, tuple[Tensor, Tensor]] = {}

        def listen(place: int, piece: Piece, call: Any) -> None:
            count = piece.ids.shape[1]
            taken[place] = call.k[:, -count:].transpose(1, 2), call.v[:, -count:].transpose(1, 2)

        def run(piece: Piece, arguments: dict[str, Any]) -> None:
            embedded = tokens.to(passed.text.dtype).expand(piece.ids.shape[0], -1, -1)
            passed.text(inputs_embeds=embedded, **arguments)

        with torch.no_grad(), self._adapted(passed.text):
            read_again(passed, contexts, _one_pass(passed, tokens.shape[0]), listen, run=run)
        for place, (keys, values) in taken.items():
            contexts[place] = _grown(contexts[place], keys, values)
            extra = scores[place].new_full((*keys.shape[:3],), 3 * MUST_STAY)
            scores[place] = torch.cat([scores[place], extra], dim=-1)
        return scores

    def _tokens(self, passed: Any) -> Tensor:
        tokens = device_copy(str(self.embeddings), "restore_embeddings", passed.input_ids.device)
        width = passed.text.config.hidden_size
        if tokens.dim() != 2 or tokens.shape[1] != width:
            raise ShapeError(f"{self.embeddings} has tokens of shape {tuple(tokens.shape)}; this model's are {width} wide")
        return tokens

    @contextmanager
    def _adapted(self, text: Any) -> Iterator[None]:
        """The adapter's products are added to what its linear layers give."""
        hooks: list[Any] = []
        try:
            for name in [] if self.adapter is None else sorted(tensors(self.adapter)):
                if name.endswith(".lora_A.weight"):
                    stem = name.removesuffix(".lora_A.weight")
                    module = text.get_submodule(stem.removeprefix(_STEM))
                    hooks.append(module.register_forward_hook(self._product(stem, module)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _product(self, stem: str, module: Any) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        device = module.weight.device
        down, up = (device_copy(str(self.adapter), f"{stem}.{part}.weight", device) for part in ("lora_A", "lora_B"))
        if (up.shape[0], down.shape[1]) != tuple(module.weight.shape):
            raise ShapeError(
                f"{self.adapter}: {stem} is for a layer of {(up.shape[0], down.shape[1])}, not {tuple(module.weight.shape)}"
            )

        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            return output + (self.scaling * (args[0].float() @ down.T) @ up.T).to(output.dtype)

        return add


def _one_pass(passed: Any, count: int) -> Iterator[Piece]:
    """A pass of tokens that are no part of the text."""
    ids = passed.input_ids
    none = ids[:, :0]
    asked = torch.ones(ids.shape[0], count, dtype=torch.bool, device=ids.device)
    yield Piece(ids[:, :1].expand(-1, count), asked, none, none.bool(), none, none.bool(), ids.shape[1])


def _grown(ctx: ScoreContext, keys: Tensor, values: Tensor) -> ScoreContext:
    stored = ctx.stored
    new = keys.shape[2]
    last = stored.positions.new_full((*stored.positions.shape[:2], new), ctx.seen - 1)
    real = None if stored.real is None else torch.cat([stored.real, torch.ones_like(last, dtype=torch.bool)], dim=-1)
    bias = None if stored.bias is None else torch.cat([stored.bias, stored.bias.new_zeros(*stored.shape[:2], new)], dim=-1)
    more = Stored(
        torch.cat([stored.keys, keys], dim=2),
        torch.cat([stored.values, values], dim=2),
        torch.cat([stored.positions, last], dim=-1),
        real,
        bias,
    )
    return replace(ctx, stored=more)


@dataclass(frozen=True)
class Restored(AcrossLayers):
    """As `AcrossLayers`; the tokens that were added count as part of what the ratio leaves of the others.

    Args:
        added: how many there are a head.
    """

    added: int = 0

    def share(self, contexts: list[ScoreContext], scores: list[Tensor], kept: list[int | Tensor]) -> list[Tensor]:
        """[B, Hkv] int64 of each layer."""
        del kept
        return super().share(contexts, scores, [kept_of(ctx.stored.length - self.added, ctx.ratio) for ctx in contexts])


@base("restorekv")
def _restorekv(
    embeddings: str | None = None,
    adapter: str | None = None,
    scaling: float = 1.0,
    plus: bool = False,
    chunk: int = 2048,
    sink: int = 4,
    prompt_ids: Any = (),
    later_ids: Any = None,
    suffix_ids: Any = (),
) -> Press:
    """KVzip with learnt tokens that take down the context before it is thinned out; see `RestoreKV`.

    Args:
        embeddings, adapter, scaling: the trained tokens and adapter.
        plus, chunk, sink, prompt_ids, later_ids, suffix_ids: as for kvzip; `plus` as in kvzip_plus.
    Source: RestoreKV 2026, arXiv:2608.01247.
    """
    scorer = RestoreKV(plus, chunk, sink, prompts_of(prompt_ids, later_ids, suffix_ids), embeddings, adapter, scaling)
    return Press(scorer, budget=Restored(tensors(str(embeddings))["restore_embeddings"].shape[0]))
