"""Pass-key prompts of an exact length: a number hidden in real text, and a question for it at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit._core.errors import InputError
from attnkit.inference.answers import around

__all__ = ["ANSWER_TOKENS", "DEPTHS", "NEEDLE", "OPENING", "QUESTION", "Frame", "Prompt", "is_hit"]

DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 12
# Worded so that a 135M model finds the key with dense attention in 2,048 and 4,096 tokens of an encyclopaedia: a paragraph
# of its own, and an answer that begins by quoting it. Without the quote the model sometimes makes up a story; instructions
# ahead of the text made it worse.
NEEDLE = "\n\nThe secret pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret pass key in the text above?"
OPENING = 'The text says: "The secret pass key is'
_SENTENCE_SEARCH = 64


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        context: token ids of everything before the question.
        question: token ids of the question, up to where the answer goes on.
        key: five digits, nowhere else in the text.
        depth: of the needle, as a share of the text.
    """

    context: list[int]
    question: list[int]
    key: str
    depth: float


class Frame:
    """What stands around the haystack: the model's chat template where there is one.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        before, after = around(tokenizer, QUESTION)
        self._before = self._ids(before)
        if not getattr(tokenizer, "chat_template", None):
            bos = getattr(tokenizer, "bos_token_id", None)
            self._before = [] if bos is None else [bos]
        self._after = self._ids(after + OPENING)

    def prompt(self, ids: Sequence[int], *, length: int, depth: float, seed: Sequence[int]) -> Prompt:
        """Hide a key in `ids` so that context and question together are exactly `length` tokens.

        Args:
            ids: the text, at least `length` tokens of it.
            length: tokens.
            depth: where the needle begins, 0 is the start of the text; it moves back to the end of a sentence.
            seed: of the key and of where in the text the haystack begins.
        Raises:
            InputError: `length` leaves less room for text than the prompt itself takes.
        """
        generator = np.random.default_rng(seed)
        key = str(generator.integers(10_000, 100_000))
        needle = self._ids(NEEDLE.format(key=key))
        room = length - len(self._before) - len(needle) - len(self._after)
        if room < length // 2:
            raise InputError(
                f"length {length} is too short: the pass-key prompt itself takes {length - room} tokens; use at least "
                f"{2 * (length - room)}"
            )
        start = int(generator.integers(0, len(ids) - room + 1))
        hay = list(ids[start : start + room])
        if key in self._tokenizer.decode(hay):
            return self.prompt(ids, length=length, depth=depth, seed=[*seed, 1])
        cut = self._sentence_end(hay, round(depth * room))
        return Prompt([*self._before, *hay[:cut], *needle, *hay[cut:]], self._after, key, depth)

    def _sentence_end(self, hay: list[int], cut: int) -> int:
        for place in range(cut, max(cut - _SENTENCE_SEARCH, 0), -1):
            if self._tokenizer.decode([hay[place - 1]]).rstrip(" ").endswith((".", "\n")):
                return place
        return cut

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def is_hit(answer: str, key: str) -> bool:
    """Whether the five digits stand in the answer, next to each other."""
    return key in answer
