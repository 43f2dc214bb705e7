"""What a model is asked about a text: statements hidden in it, a question, and the answer that is wanted (after RULER)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["ASKED", "NAMES", "NEEDLE", "OPENING", "QUESTION", "WORDS", "Asked", "is_hit", "list_counts"]

# Worded so that a 135M model finds the key with dense attention in 2,048 and 4,096 tokens of an encyclopaedia: a paragraph
# of its own, and an answer that begins by quoting it. Without the quote the model sometimes makes up a story; instructions
# ahead of the text made it worse.
NEEDLE = "\n\nThe secret pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret pass key in the text above?"
OPENING = 'The text says: "The secret pass key is'
_SAME = "\n\nThe secret pass key of {} is the same as the secret pass key of {}. Remember it.\n\n"
_LIST = "\n\nThe secret words are: {}. Remember them.\n\n"
_LIST_QUESTION = "\n\nWhat are the three most frequent of the secret words in the text above?"
_LIST_OPENING = "Of the secret words, the three most frequent are the words"

# one token each in common vocabularies, so that contexts and questions have equal lengths
NAMES = (
    "Rome", "Paris", "London", "Berlin", "Madrid", "Vienna", "Dublin", "Oslo", "Athens", "Cairo", "Tokyo", "Boston",
    "Chicago", "Sydney", "Moscow", "Lisbon",
)  # fmt: skip
WORDS = (
    "apple", "bread", "bridge", "chair", "cloud", "coffee", "dress", "field", "forest", "garden", "glass", "horse",
    "kitchen", "paper", "pencil", "river", "stone", "street", "summer", "table", "tiger", "train", "window", "winter",
)  # fmt: skip
_PAIRS, _CHAINS, _HOPS = 8, 2, 2
_MOST = 3  # words that are asked for
_CWE = (*[6] * _MOST, *[1] * 18)  # half of the list
_FWE = (10, 6, 4, *[2] * 3, *[1] * 14)
_SHARE = 1024  # tokens of a prompt for each repetition of these counts


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        statements: (where, text) in the order of the text; where is a share of it, 0 its start.
        question, opening: what is asked, and how the answer begins.
        key: the answer: five digits, or words separated by ", ".
    """

    statements: tuple[tuple[float, str], ...]
    question: str
    opening: str
    key: str


def is_hit(answer: str, key: str) -> bool:
    """Whether an answer is right: five digits stand in it, next to each other; or the first of WORDS in it are those of `key`.

    The order of words does not matter. What follows them does not count, so that repeating a list is not answering.
    """
    wanted = key.split(", ")
    if key.isdigit():
        return key in answer
    named = dict.fromkeys(word for word in re.findall(r"[a-z]+", answer.lower()) if word in WORDS)
    return set(list(named)[: len(wanted)]) == set(wanted)


def list_counts(task: str, length: int) -> tuple[int, ...]:
    """How often the words of a list stand there, the most common first.

    Args:
        task: "cwe", where three words stand six times as often as all others, or "fwe", where counts fall.
        length: tokens of the prompt.
    """
    return tuple(max(1, length // _SHARE) * count for count in (_CWE if task == "cwe" else _FWE))


def _needle(random: np.random.Generator, depth: float, length: int) -> Asked:
    """One number."""
    del length
    key = str(random.integers(10_000, 100_000))
    return Asked(((depth, NEEDLE.format(key=key)),), QUESTION, OPENING, key)


def _assoc(random: np.random.Generator, depth: float, length: int) -> Asked:
    """Several numbers, each of a city; the one at `depth` is asked for, the others lie all over the text."""
    del length
    names, keys = _drawn(random, _PAIRS, _PAIRS)
    told = [_told(name, key) for name, key in zip(names, keys, strict=True)]
    others = [((place + 0.5) / (_PAIRS - 1), statement) for place, statement in enumerate(told[1:])]
    asked = _of(QUESTION, names[0]), _of(OPENING, names[0])
    return Asked(tuple(sorted([(depth, told[0]), *others])), *asked, keys[0])


def _vt(random: np.random.Generator, depth: float, length: int) -> Asked:
    """Chains of cities with the same number, told at the first of them; the last of one chain is asked for.

    Statements of all chains take turns from `depth` to the end of the text.
    """
    del length
    names, keys = _drawn(random, _CHAINS * (_HOPS + 1), _CHAINS)
    told = [_told(name, key) for name, key in zip(names, keys, strict=False)]
    told += [_SAME.format(name, before) for name, before in zip(names[_CHAINS:], names, strict=False)]
    order = [link * _CHAINS + chain for link in range(_HOPS + 1) for chain in random.permutation(_CHAINS)]
    places = [depth + (1 - depth) * turn / len(told) for turn in range(len(told))]
    statements = tuple((place, told[which]) for place, which in zip(places, order, strict=True))
    last = names[-_CHAINS]  # of the first chain
    return Asked(statements, _of(QUESTION, last), _of(OPENING, last) + " the number", keys[0])


def _cwe(random: np.random.Generator, depth: float, length: int) -> Asked:
    """A list of words in which three are much more common than all others."""
    return _listed(random, depth, list_counts("cwe", length))


def _fwe(random: np.random.Generator, depth: float, length: int) -> Asked:
    """A list of words whose counts fall; the three most common are asked for."""
    return _listed(random, depth, list_counts("fwe", length))


def _listed(random: np.random.Generator, depth: float, counts: tuple[int, ...]) -> Asked:
    words = random.permutation(np.array(WORDS))[: len(counts)]
    text = ", ".join(random.permutation(np.repeat(words, counts)))
    return Asked(((depth, _LIST.format(text)),), _LIST_QUESTION, _LIST_OPENING, ", ".join(words[:_MOST]))


def _drawn(random: np.random.Generator, names: int, keys: int) -> tuple[list[str], list[str]]:
    """Different names, and different numbers of five digits."""
    chosen = random.choice(np.array(NAMES), names, replace=False)
    return [str(name) for name in chosen], [str(10_000 + key) for key in random.choice(90_000, keys, replace=False)]


def _of(text: str, name: str) -> str:
    return text.replace("pass key", f"pass key of {name}")


def _told(name: str, key: str) -> str:
    return _of(NEEDLE, name).format(key=key)


ASKED: dict[str, Callable[[np.random.Generator, float, int], Asked]] = {
    "needle": _needle,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
    "assoc": _assoc,
}
"""Task -> a function (random numbers, depth, tokens of the prompt) that makes a question."""
