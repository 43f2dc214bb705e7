"""Questions about one context: it is read once, and each question goes on from a copy of the cache."""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import InputError
from attnkit.inference.applied import apply
from attnkit.inference.policy import Policy
from attnkit.kv.cache import KVCache

__all__ = ["around", "generate_with_context", "greedy", "read", "stop_tokens"]

_CONTEXT = "<<context>>"


@torch.inference_mode()
def generate_with_context(
    model: Any,
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    policy: Policy | str,
    cache: KVCache | None = None,
    query_aware: bool = False,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer questions about a context greedily, under a policy.

    The context is read in one pass and compressed as the policy says, before any question is known. Each question is then
    read and answered on a copy of the cache, so that answers do not depend on each other. Where the tokenizer has a chat
    template, context and question are one message of the user.

    Args:
        model, tokenizer: of transformers.
        context, questions: texts.
        policy: a `Policy` or the name of one, "snapkv" or "adakv:expected_attention".
        cache: an empty cache that takes the context, `attnkit.kv.KVCache(model.config, codec="int8")`; None makes one.
        query_aware: read each question in one pass with the context, so that the policy knows it when it drops keys: one
            prefill a question. The cache then stays empty.
        max_new_tokens: of each answer, which also ends where the model ends it.
    Returns:
        the answers, without special tokens.
    Raises:
        InputError: the cache is not empty.
        AttnkitError: what `apply` raises.
    """
    if cache is not None and cache.get_seq_length():
        raise InputError(f"the cache has seen {cache.get_seq_length()} tokens; give an empty one")
    stop, answers = stop_tokens(model, tokenizer), []
    with apply(model, policy) as h:
        start = h.new_cache() if cache is None else cache
        parts = [around(tokenizer, "\n\n" + question) for question in questions]
        before = _ids(tokenizer, parts[0][0] + context, opens=True) if parts else []
        if parts and not query_aware:
            read(model, before, start, last=True)
        for _, after in parts:
            own = start.clone()
            asked = _ids(tokenizer, after)
            logits = read(model, [*before, *asked] if query_aware else asked, own, last=True)[-1]
            ids = list(islice(greedy(model, logits, own, stop=stop), max_new_tokens))
            answers.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def read(model: Any, ids: Sequence[int], cache: KVCache, *, last: bool = False) -> Tensor:
    """One forward pass over token ids: logits [T, V], or [1, V] of the last token."""
    tokens = torch.tensor([ids], device=model.device)
    logits: Tensor = model(tokens, past_key_values=cache, logits_to_keep=1 if last else 0).logits
    return logits[0]


def greedy(model: Any, logits: Tensor, cache: KVCache, *, stop: Collection[int]) -> Iterator[int]:
    """The most probable tokens after `logits` [V], each read when the next is asked for, up to one of `stop`."""
    while (token := int(logits.argmax())) not in stop:
        yield token
        logits = read(model, [token], cache, last=True)[-1]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*several, tokenizer.eos_token_id] if token is not None)


def around(tokenizer: Any, question: str) -> tuple[str, str]:
    """What stands before a context, and what follows it: a question at its end and the beginning of an answer.

    Both come from the chat template where there is one. Without one nothing stands before, and an empty line ends the
    question.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", question + "\n\n"
    turns = [{"role": "user", "content": _CONTEXT + question}]
    before, after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split(_CONTEXT)
    return before, after


def _ids(tokenizer: Any, text: str, *, opens: bool = False) -> list[int]:
    """Token ids; the first part of a prompt without a template begins with the token that begins texts."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = None if getattr(tokenizer, "chat_template", None) else getattr(tokenizer, "bos_token_id", None)
    return [begin, *ids] if opens and begin is not None else ids
