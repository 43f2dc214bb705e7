"""Prompts of an exact length: statements hidden in real text, and a question about them at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit._core.errors import InputError
from attnkit.inference.answers import around
from attnkit.lab.compare.questions import ASKED

__all__ = ["ANSWER_TOKENS", "DEPTHS", "Frame", "Prompt"]

DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 12
_SENTENCE_SEARCH = 64


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        context: token ids of everything before the question.
        question: token ids of the question, up to where the answer goes on.
        key: the answer; a number stands nowhere else in the text.
        depth: of what is asked for, as a share of the text.
        task: of `attnkit.lab.compare.questions.ASKED`.
    """

    context: list[int]
    question: list[int]
    key: str
    depth: float
    task: str = "needle"


class Frame:
    """What stands around the haystack: the model's chat template where there is one.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prompt(self, ids: Sequence[int], *, length: int, depth: float, seed: Sequence[int], task: str = "needle") -> Prompt:
        """Hide statements in `ids` so that context and question together are exactly `length` tokens.

        Args:
            ids: the text, at least `length` tokens of it.
            length: tokens.
            depth: where what is asked for begins, 0 is the start of the text; it moves back to the end of a sentence.
            seed: of the answer and of where in the text the haystack begins.
            task: what is hidden and asked.
        Raises:
            InputError: `length` leaves less room for text than the prompt itself takes.
        """
        generator = np.random.default_rng(seed)
        asked = ASKED[task](generator, depth, length)
        before, after = self._around(asked.question, asked.opening)
        statements = [(where, self._ids(text)) for where, text in asked.statements]
        room = length - len(before) - len(after) - sum(len(statement) for _, statement in statements)
        if room < length // 2:
            name = "pass-key" if task == "needle" else task
            raise InputError(
                f"length {length} is too short: the {name} prompt itself takes {length - room} tokens; use at least "
                f"{2 * (length - room)}"
            )
        start = int(generator.integers(0, len(ids) - room + 1))
        hay = list(ids[start : start + room])
        if asked.key.isdigit() and asked.key in self._tokenizer.decode(hay):
            return self.prompt(ids, length=length, depth=depth, seed=[*seed, 1], task=task)
        context, done = before, 0
        for where, statement in statements:
            cut = self._sentence_end(hay, round(where * room))
            context += [*hay[done:cut], *statement]
            done = cut
        return Prompt([*context, *hay[done:]], after, asked.key, depth, task)

    def _around(self, question: str, opening: str) -> tuple[list[int], list[int]]:
        """Token ids of what stands before the text, and of the question behind it."""
        before, after = around(self._tokenizer, question)
        ids = self._ids(before)
        if not getattr(self._tokenizer, "chat_template", None):
            bos = getattr(self._tokenizer, "bos_token_id", None)
            ids = [] if bos is None else [bos]
        return ids, self._ids(after + opening)

    def _sentence_end(self, hay: list[int], cut: int) -> int:
        for place in range(cut, max(cut - _SENTENCE_SEARCH, 0), -1):
            if self._tokenizer.decode([hay[place - 1]]).rstrip(" ").endswith((".", "\n")):
                return place
        return cut

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
