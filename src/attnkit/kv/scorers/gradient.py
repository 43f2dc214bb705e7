"""A scorer that asks by gradient what a key does to the model's last hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit.kv.budgets_joint import AcrossLayers
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base
from attnkit.kv.replay import Asked, Piece, Prompts, checked_chunk, pieces, read_again, weights
from attnkit.kv.scorers.replay import Replay, chunk_norms, prompts_of, put

__all__ = ["KVGrad"]


@dataclass(frozen=True)
class KVGrad(Replay):
    """What a key writes into the residual stream while the context is repeated, times how much the result minds.

    s_i = max over the group's heads and replayed tokens t of a_ti |W_o v_i| |d Phi / d o_t|, with a as in `KVzip`, o_t the
    output of the attention module and Phi the sum of squares of the hidden states behind the last layer. One forward and
    one backward pass a chunk: three to four times the prefill, and the activations of a chunk are held.

    Args:
        chunk: tokens that are repeated in one pass.
        sink: first tokens, which every chunk sees and which stay.
        prompts: what stands before the chunks.
    Source: KVgrad 2026, https://openreview.net/forum?id=cg1wTCJjjk.
    """

    chunk: int = 512
    sink: int = 4
    prompts: Prompts = field(default_factory=Prompts)

    def __post_init__(self) -> None:
        checked_chunk(self.chunk)

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S] float32 of each layer.

        Raises:
            PolicyError: the context cannot be read again.
        """
        with torch.inference_mode(False), torch.enable_grad(), _frozen(passed.text):
            scores = [torch.zeros(ctx.stored.shape, device=ctx.stored.keys.device) for ctx in contexts]
            held: dict[int, tuple[Piece, Asked]] = {}

            def listen(place: int, piece: Piece, call: Any) -> None:
                held[place] = (piece, Asked.of(piece, call))

            def run(piece: Piece, arguments: dict[str, Any]) -> None:
                outputs, last = _forward(passed, contexts, piece, arguments)
                # rows of padding do not count, whatever they hold
                last = last.float().masked_fill(~piece.asked[..., None], 0.0)
                gradients = torch.autograd.grad(last.square().sum(), outputs)
                with torch.no_grad():
                    for place, gradient in enumerate(gradients):
                        put(scores[place], piece, _found(contexts[place], *held.pop(place), gradient))

            read_again(passed, contexts, pieces(passed, self.chunk, self.sink, self.prompts), listen, run=run)
        return [must_stay(score, ctx, sink=self.sink) for ctx, score in zip(contexts, scores, strict=True)]


def _forward(passed: Any, contexts: list[ScoreContext], piece: Piece, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Run one pass with gradients: what each attention module gave, and the hidden states behind the last layer."""
    outputs: dict[int, Tensor] = {}
    last: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        del args
        outputs[id(module)] = output[0]

    def end(module: Any, args: Any, output: Any) -> None:
        del module, args
        last.append(output[0] if isinstance(output, tuple) else output)

    hooks = [ctx.module.register_forward_hook(note) for ctx in contexts]
    hooks.append(passed.text.layers[-1].register_forward_hook(end))
    try:
        embedded = passed.text.get_input_embeddings()(piece.ids).detach().requires_grad_()
        passed.text(inputs_embeds=embedded, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[id(ctx.module)] for ctx in contexts], last[0]


def _found(ctx: ScoreContext, piece: Piece, asked: Asked, gradient: Tensor) -> Tensor:
    """[B, Hkv, C]."""
    minded: Tensor = gradient.float().norm(dim=-1)
    factor = chunk_norms(ctx, piece)
    found = minded.new_zeros(*ctx.stored.shape[:2], piece.columns.shape[1])
    for block, part in weights(piece, asked):
        torch.maximum(found, (part * factor * minded[:, None, None, block, None]).amax((2, 3)), out=found)
    return found


@contextmanager
def _frozen(text: Any) -> Iterator[None]:
    """No parameter asks for a gradient."""
    asking = [parameter for parameter in text.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@base("kvgrad")
def _kvgrad(chunk: int = 512, sink: int = 4, prompt_ids: Any = (), later_ids: Any = None, suffix_ids: Any = ()) -> Press:
    """What a key writes into the residual stream times how much the result minds; see `KVGrad`.

    Source: KVgrad 2026, https://openreview.net/forum?id=cg1wTCJjjk.
    """
    return Press(KVGrad(chunk, sink, prompts_of(prompt_ids, later_ids, suffix_ids)), budget=AcrossLayers())
