"""One model reading one input under one method: what is recorded of it."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit import inference
from attnkit._core.errors import PolicyError, UnsupportedArchitecture
from attnkit.inference.answers import greedy, read, stop_tokens
from attnkit.kv import KVCache
from attnkit.lab.compare.kept import kept_of
from attnkit.lab.compare.loading import LoadedModel
from attnkit.lab.compare.measure import MIB, PeakMemory, clock
from attnkit.lab.compare.methods import BASELINE, METHODS, Method
from attnkit.lab.compare.prompts import ANSWER_TOKENS, Prompt
from attnkit.lab.compare.questions import is_hit

__all__ = ["Session", "TextInput"]

DECODED = 32
_CHUNK = 64
_WARM_UP = 64


@dataclass(frozen=True)
class TextInput:
    """A window of text: token ids to read first, and the tail that is scored."""

    context: list[int]
    tail: list[int]


@dataclass(frozen=True)
class _Start:
    """A model that has read a context: its cache, the logits [V] of the next token, and what that took."""

    cache: KVCache
    logits: Tensor
    seconds: float
    peak_mib: float | None


class Session:
    """Runs methods on inputs; whatever methods share on one input is computed once.

    Args:
        loaded: the model.
        methods: those that will run.
        query_aware: whether questions are read in one pass with the context.
    """

    def __init__(self, loaded: LoadedModel, methods: Sequence[Method], *, query_aware: bool = False) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._device = loaded.model.device
        self._copies = sum(method.shares_dense_prefill for method in methods) > 1
        self._stop = stop_tokens(loaded.model, loaded.tokenizer)
        self._query_aware = query_aware
        self._warm: set[tuple[inference.Policy, str | None, int]] = set()
        self._dense: _Start | None = None
        self._reference: Tensor | None = None

    def check(self, methods: Sequence[Method], length: int) -> None:
        """Read a few tokens under every method: refusals come before hours of work, and first calls before the clock.

        Raises:
            UnsupportedArchitecture, PolicyError: the model lacks what a method needs; the message names both.
        """
        ids = [token % self._model.config.get_text_config().vocab_size for token in range(_WARM_UP)]
        for method in methods:
            try:
                with torch.inference_mode(), self._applied(method, length) as applied:
                    self._forward(ids, applied.new_cache(codec=method.codec))
            except PolicyError as error:
                kind = UnsupportedArchitecture if isinstance(error, UnsupportedArchitecture) else PolicyError
                fix = "choose another model" if method.name == BASELINE else f"leave {method.name} out of the methods"
                raise kind(f"method {method.name!r} cannot run on this model: {error}; {fix}") from error

    def begin(self) -> None:
        """Forget what belongs to the last input."""
        self._dense = self._reference = None

    @torch.inference_mode()
    def read_text(self, item: TextInput, method: Method, length: int) -> dict[str, Any]:
        """Score the tail, then decode.

        Returns:
            losses (one a tail token), kl, agreement, prefill_s, peak_mib, token_s (one a decoded token), kv_mib, kept (see
            `kept_of`).
        """
        reference = None if method.name == BASELINE else self._dense_logits(item, length)
        start = self._dense_start(item.context, length) if method.shares_dense_prefill else None
        with self._applied(method, length) as applied:
            start = start or self._read(item.context, applied, method.codec)
            kept = None if method.press is None else kept_of(start.cache)
            after = self._forward(item.tail, start.cache)
            kv_mib = start.cache.nbytes() / MIB
            logits = torch.cat([start.logits[None], after[:-1]])
            _, token_s = self._decode(after[-1], start.cache, steps=DECODED, stop=())
        if method.name == BASELINE:
            self._reference = logits
        tail = torch.tensor(item.tail, device=logits.device)
        kl, agreement = (0.0, 1.0) if reference is None else _compare(reference, logits)
        return {
            "losses": F.cross_entropy(logits.float(), tail, reduction="none").tolist(),
            "kl": kl,
            "agreement": agreement,
            "prefill_s": start.seconds,
            "peak_mib": start.peak_mib,
            "token_s": token_s,
            "kv_mib": kv_mib,
            "kept": kept,
        }

    @torch.inference_mode()
    def ask(self, prompt: Prompt, method: Method, length: int) -> dict[str, Any]:
        """Ask a question.

        Returns:
            task, depth, key, answer, hit, prefill_s, peak_mib, token_s, kv_mib, kept.
        """
        first, rest = (prompt.context, prompt.question)
        if self._query_aware:
            first, rest = [*first, *rest], []
        start = self._dense_start(first, length) if method.shares_dense_prefill else None
        with self._applied(method, length) as applied:
            start = start or self._read(first, applied, method.codec)
            kept = None if method.press is None else kept_of(start.cache)
            logits = self._forward(rest, start.cache, last=True)[-1] if rest else start.logits
            kv_mib = start.cache.nbytes() / MIB
            ids, token_s = self._decode(logits, start.cache, steps=ANSWER_TOKENS, stop=self._stop)
        answer = self._tokenizer.decode(ids)
        return {
            "task": prompt.task,
            "depth": prompt.depth,
            "key": prompt.key,
            "answer": answer,
            "hit": is_hit(answer, prompt.key),
            "prefill_s": start.seconds,
            "peak_mib": start.peak_mib,
            "token_s": token_s,
            "kv_mib": kv_mib,
            "kept": kept,
        }

    def _applied(self, method: Method, length: int) -> inference.Applied:
        return inference.apply(self._model, method.policy(length))

    def _dense_start(self, context: list[int], length: int) -> _Start:
        """Dense's prefill of this input, for one method to go on from."""
        if self._dense is None:
            with self._applied(METHODS[BASELINE], length) as applied:
                self._dense = self._read(context, applied, None)
        start = self._dense
        if self._copies:
            return dataclasses.replace(start, cache=start.cache.clone())
        self._dense = None  # the cache is about to grow
        return start

    def _dense_logits(self, item: TextInput, length: int) -> Tensor:
        """Dense's logits over the tail; missing only where a resumed run has dense's row already."""
        if self._reference is None:
            start = self._dense_start(item.context, length)
            with self._applied(METHODS[BASELINE], length):
                after = self._forward(item.tail, start.cache)
            self._reference = torch.cat([start.logits[None], after[:-1]])
        return self._reference

    def _read(self, ids: list[int], applied: inference.Applied, codec: str | None) -> _Start:
        shape = (applied.policy, codec, len(ids))
        if self._device.type == "cuda" and shape not in self._warm:  # the first call of a shape chooses and compiles kernels
            self._warm.add(shape)
            self._forward(ids, applied.new_cache(codec=codec), last=True)
        cache = applied.new_cache(codec=codec)
        with PeakMemory(self._device) as peak:
            begin = clock(self._device)
            logits = self._forward(ids, cache, last=True)[-1]
            seconds = clock(self._device) - begin
        return _Start(cache, logits, seconds, peak.mib)

    def _forward(self, ids: Sequence[int], cache: KVCache, *, last: bool = False) -> Tensor:
        """Token ids -> logits [T, V], or [1, V] of the last token."""
        return read(self._model, ids, cache, last=last)

    def _decode(self, logits: Tensor, cache: KVCache, *, steps: int, stop: Collection[int]) -> tuple[list[int], list[float]]:
        """Greedy tokens after `logits` [V], and the seconds of each."""
        ids: list[int] = []
        stream = greedy(self._model, logits, cache, stop=stop)
        token, times = next(stream, None), [clock(self._device)]
        while token is not None and len(ids) < steps:
            ids.append(token)
            token = next(stream, None)
            times.append(clock(self._device))
        return ids, [after - before for before, after in itertools.pairwise(times)]


def _compare(reference: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL(reference || method) in nats a token, and the share of positions with the same largest logit."""
    total, same = 0.0, 0
    for p, q in zip(reference.split(_CHUNK), logits.split(_CHUNK), strict=True):  # in parts: vocabularies are large
        log_p, log_q = (part.double().log_softmax(-1) for part in (p, q))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return total / len(reference), same / len(reference)
