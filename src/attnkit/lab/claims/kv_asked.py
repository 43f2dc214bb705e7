"""What claims about compressed caches share: the methods, questions behind a compressed context, and the oracle."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import inference, kv
from attnkit.kv.budgets import HeadAdaptive
from attnkit.kv.context import ScoreContext
from attnkit.kv.registry import WRAPPERS

__all__ = ["ADAPTED", "MAIN", "ORACLES", "Asked", "Method", "ask", "decoding", "future_mass", "oracle", "prefilling"]

MAIN = ("expected_attention", "snapkv", "tova", "knorm", "streaming_llm")
ADAPTED = (*MAIN[:4], "keydiff")  # what is asked with and without budgets that heads share
_VARIANTS: dict[str, dict[str, Any]] = {
    "expected_attention, mean": {"rope": "mean"},
    "expected_attention, output norm": {"value_norm": "output"},
    "expected_attention, eps 0.02": {"eps": 0.02},  # of the paper, except where it hides needles
    "adakv:expected_attention, eps 0.02": {"eps": 0.02},
}
ORACLES = ("oracle", "adakv:oracle")
_FIELDS = ("context", "asked", "answers", "counts", "kinds")
_LEARNT = {"qfilter": "filters", "expected_attention_stats": "stats"}  # method -> its option for what was learnt
_WHILE_DECODING = ("decode", "cam", "dms")


@dataclass(frozen=True)
class Method:
    """A press without its ratio.

    Attributes:
        name: for tables.
        spec, options: of `attnkit.kv.press`.
    """

    name: str
    spec: str
    options: dict[str, Any] = field(default_factory=dict)

    def press(self, ratio: float, learnt: Path) -> Any:
        """The press.

        Args:
            ratio: of it.
            learnt: what `attnkit.inference.calibrate` wrote of the model.
        Raises:
            OptionError: it needs other options, that only training or users have.
        """
        option = _LEARNT.get(self.spec.split(":")[-1])
        extra = {} if option is None else {option: str(learnt)}
        return kv.press(self.spec, ratio=ratio, **self.options, **extra)


def prefilling() -> list[Method]:
    """Every base method, variants of expected attention, budgets shared by heads, and every wrapper of the prefill once.

    Those that decide come first.
    """
    bases = kv.methods()  # registers wrappers, too
    wrapped = [f"{name}:expected_attention" for name in sorted(WRAPPERS) if name not in (*_WHILE_DECODING, "adakv")]
    names = dict.fromkeys([*MAIN, *ADAPTED, *(f"adakv:{name}" for name in ADAPTED)])
    variants = [Method(name, name.split(",")[0], options) for name, options in _VARIANTS.items()]
    return [*(Method(name, name) for name in names), *variants, *(Method(n, n) for n in (*bases, *wrapped) if n not in names)]


def decoding(interval: int) -> list[Method]:
    """Every base method while decoding, and the wrappers made for that.

    Args:
        interval: tokens between two compressions, after which the ratio's share of all tokens seen is left.
    """
    options = {"interval": interval, "target": None}
    found = [Method(f"decode:{name}", f"decode:{name}", options) for name in kv.methods()]
    return [*found, Method("cam:expected_attention", "cam:expected_attention", options)]


@dataclass(frozen=True)
class Asked:
    """Contexts with questions.

    Attributes:
        context: [B, C] int64.
        asked: [B, Q, T] int64, each question with all but the last token of its answer.
        answers: [B, Q, A] int64, A <= T.
        counts: [B, Q] bool, which questions count.
        kinds: [B] int64, for counting apart.
    """

    context: Tensor
    asked: Tensor
    answers: Tensor
    counts: Tensor
    kinds: Tensor

    def __len__(self) -> int:
        return len(self.context)

    def rows(self, chosen: slice) -> "Asked":
        """Some of the contexts."""
        return Asked(*(getattr(self, name)[chosen] for name in _FIELDS))

    def to(self, device: torch.device) -> "Asked":
        """On another device."""
        return Asked(*(getattr(self, name).to(device) for name in _FIELDS))

    def right(self, hits: Tensor, kind: int) -> tuple[int, int]:
        """Of hits [B, Q] bool: those of a kind that count, and how many could be."""
        of_kind = self.counts & (self.kinds == kind)[:, None]
        return int((hits & of_kind).sum()), int(of_kind.sum())


@torch.no_grad()
def ask(model: Any, press: Any, given: Asked, *, pieces: Sequence[int] | None = None) -> tuple[Tensor, float]:
    """Read the contexts, then ask every question of a copy of the cache.

    Args:
        model: in evaluation mode, on the device of `given`.
        press: or None for the whole cache.
        given: what to read.
        pieces: lengths of the passes that read the context; the first is the prefill. None is one pass.
    Returns:
        hits [B, Q] bool: a greedy reader would have given the whole answer; and the share of keys that the cache held.
    Raises:
        AttnkitError: the press cannot serve the model, or such passes.
    """
    with inference.apply(model, inference.Policy(cache=press)) as applied:
        cache = applied.new_cache()
        for part in given.context.split(list(pieces or [given.context.shape[1]]), 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        held = _held(cache) / given.context.shape[1]
        hits = []
        for asked, answer in zip(given.asked.unbind(1), given.answers.unbind(1), strict=True):
            logits = model(asked, past_key_values=cache.clone(), logits_to_keep=answer.shape[1]).logits
            hits.append((logits.argmax(-1) == answer).all(-1))
    return torch.stack(hits, 1), held


def _held(cache: Any) -> float:
    """Tokens a head, mean over layers, rows and heads."""
    total = 0.0
    for layer in cache.kv_layers:
        total += layer.seen if layer.pages is None else float(layer.pages.store.lengths.float().mean())
    return total / len(cache.kv_layers)


@torch.no_grad()
def future_mass(model: Any, given: Asked) -> tuple[Tensor, ...]:
    """[B, Hkv, C] float32 of each layer: the attention that all questions give each key when nothing is dropped, mean of the
    group's heads. What sliding layers say of the newest keys means nothing, and no press asks for it."""
    from transformers import DynamicCache

    from attnkit.inference.compat import get_attention_name, set_attention_name

    size, config = given.context.shape[1], model.config
    cache = DynamicCache(config=config)
    model(given.context, past_key_values=cache, logits_to_keep=1)
    before = get_attention_name(config)
    totals: list[Any] = [0.0] * config.num_hidden_layers
    set_attention_name(config, "eager")  # the one that returns weights
    try:
        for asked in given.asked.unbind(1):
            found = model(asked, past_key_values=copy.deepcopy(cache), output_attentions=True, logits_to_keep=1).attentions
            for layer, weights in enumerate(found):
                shared = weights[..., :size].float().unflatten(1, (config.num_key_value_heads, -1))
                totals[layer] = totals[layer] + shared.mean(2).sum(2)
    finally:
        set_attention_name(config, before)
    return tuple(totals)


@dataclass(frozen=True, eq=False)
class _Told:
    """The scorer that knows what will be asked."""

    needs: ClassVar[frozenset[str]] = frozenset()
    mass: tuple[Tensor, ...]

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return self.mass[ctx.index]


def oracle(mass: tuple[Tensor, ...], ratio: float, *, adaptive: bool = False) -> kv.Press:
    """A press that keeps what will get most attention; no method, since it has to be told the questions.

    Args:
        mass: of `future_mass`, for the same contexts.
        ratio: of the press.
        adaptive: whether heads share a budget.
    """
    press = kv.Press(scorer=_Told(mass), ratio=ratio)
    return replace(press, budget=HeadAdaptive()) if adaptive else press
