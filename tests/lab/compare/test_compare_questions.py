"""Questions besides pass-keys: an oracle reads what stands in the prompt and answers from that alone."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnkit._core.errors import InputError
from attnkit.lab import compare
from attnkit.lab.compare import LoadedModel
from attnkit.lab.compare.plan import DEFAULT, TASKS, inputs
from attnkit.lab.compare.prompts import DEPTHS, Frame, Prompt
from attnkit.lab.compare.questions import ASKED, NAMES, WORDS, is_hit, list_counts
from compare_examples import SENTENCES, byte_tokenizer

LENGTH = 1536
TEXT = "".join(SENTENCES) * 20
OTHERS = [task for task in ASKED if task != "needle"]


def build(task: str, *, depth: float = 0.5, seed: int = 0, length: int = LENGTH) -> tuple[Prompt, str, str]:
    """A prompt, its text and its question."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    prompt = Frame(tokenizer).prompt(ids, length=length, depth=depth, seed=[seed], task=task)
    return prompt, tokenizer.decode(prompt.context), tokenizer.decode(prompt.question)


def city(question: str) -> str:
    """The one that is asked for."""
    found = re.findall(r"pass key of (\w+)", question)
    assert len(set(found)) == 1
    return str(found[0])


def followed(text: str, question: str) -> str:
    """Follow what each city's number is said to be, until a number comes."""
    told = dict(re.findall(r"The secret pass key of (\w+) is (?:the same as the secret pass key of )?(\w+)\.", text))
    value = city(question)
    while not value.isdigit():
        value = told[value]
    return value


def counted(text: str, question: str) -> str:
    """The three most common words of the list; it must be plain which three."""
    assert "three most frequent" in question
    (words,) = re.findall(r"The secret words are: ([a-z, ]+)\. Remember", text)
    counts = Counter(words.split(", ")).most_common()
    assert counts[2][1] > counts[3][1]
    return ", ".join(word for word, _ in counts[:3])


ORACLES: dict[str, Callable[[str, str], str]] = {"vt": followed, "assoc": followed, "cwe": counted, "fwe": counted}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", OTHERS)
def test_the_answer_follows_from_the_text(task: str, seed: int) -> None:
    for depth in DEPTHS:
        prompt, text, question = build(task, depth=depth, seed=seed)
        assert len(prompt.context) + len(prompt.question) == LENGTH
        assert set(ORACLES[task](text, question).split(", ")) == set(prompt.key.split(", "))
        assert (prompt.task, prompt.depth) == (task, depth)


@pytest.mark.parametrize("task", OTHERS)
def test_seeds_decide_and_nothing_else(task: str) -> None:
    assert build(task, seed=1) == build(task, seed=1)
    assert build(task, seed=1)[0].key != build(task, seed=2)[0].key


@pytest.mark.parametrize("task", OTHERS)
def test_what_is_asked_for_begins_at_its_depth(task: str) -> None:
    """At the number, at the beginning of all chains, or at the list; it moves back to the end of a sentence."""
    for depth in DEPTHS:
        prompt, text, question = build(task, depth=depth)
        sign = f"of {city(question)} is {prompt.key}" if task == "assoc" else "The secret"
        before = re.sub(r"\s*The secret [^\n]*", "", text[: text.index(sign)])
        whole = re.sub(r"\s*The secret [^\n]*", "", text)
        assert len(before) / len(whole) == pytest.approx(depth, abs=0.09)


def test_every_link_of_a_chain_has_text_of_its_own_before_the_next() -> None:
    prompt, text, question = build("vt", depth=0.1)
    told = re.findall(r"The secret pass key of (\w+) is (the same as the secret pass key of )?(\w+)\.", text)
    assert [bool(same) for _, same, _ in told] == [False] * 2 + [True] * 4  # of two chains, which take turns
    assert len({name for name, _, _ in told}) == 6
    assert sum(name == city(question) for name, _, _ in told) == 1
    assert question.endswith(f"The secret pass key of {city(question)} is the number")
    assert all(len(part.strip()) > 40 for part in re.split(r"The secret pass key of [^\n]*", text)[1:])
    assert prompt.key in text


def test_eight_pairs_are_told_and_each_may_be_asked_for() -> None:
    asked = set()
    for seed in range(12):
        prompt, text, question = build("assoc", seed=seed)
        pairs = re.findall(r"The secret pass key of (\w+) is (\d{5})\.", text)
        assert len(pairs) == len(dict(pairs)) == len({key for _, key in pairs}) == 8
        asked.add([name for name, _ in pairs].index(city(question)))
        assert text.count(prompt.key) == 1
    assert asked <= {3, 4}  # at half of the text, with seven others around it


def test_lists_grow_with_the_length_and_keep_their_shape() -> None:
    for task, most in (("cwe", [6, 6, 6, 1]), ("fwe", [10, 6, 4, 2])):
        counts = list_counts(task, 1024)
        assert list(counts[:4]) == most
        assert list_counts(task, 4096) == tuple(4 * count for count in counts)
        assert list_counts(task, 64) == counts
        assert len(counts) <= len(WORDS)
        _, text, _ = build(task)
        (words,) = re.findall(r"The secret words are: ([a-z, ]+)\.", text)
        assert sorted(Counter(words.split(", ")).values(), reverse=True) == list(counts)


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        (" river, stone and bread.", True),
        (' "Bread, river, stone" and table', True),
        ("river river stone, stone, bread", True),
        ("river, stone, table, bread", False),
        ("river and stone", False),
        ("rivers, stone, bread", False),
        ("", False),
    ],
)
def test_the_first_three_words_must_be_the_right_ones(answer: str, hit: bool) -> None:
    assert is_hit(answer, "stone, river, bread") is hit


def test_repeating_a_list_is_seldom_an_answer() -> None:
    random, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        words = random.permutation(np.array(WORDS))
        counts = list_counts("cwe", 2048)
        listed = random.permutation(np.repeat(words[: len(counts)], counts))
        hits += is_hit(", ".join(listed), ", ".join(words[:3]))
    assert hits < 100


def test_names_and_words_cannot_be_taken_for_each_other() -> None:
    for known in (NAMES, WORDS):
        assert len(set(known)) == len(known)
        assert not [(a, b) for a in known for b in known if a != b and a in b]


def test_a_prompt_that_leaves_no_room_for_text_says_for_which_task() -> None:
    with pytest.raises(InputError, match=r"length 600 is too short: the assoc prompt itself takes \d+ tokens"):
        build("assoc", length=600)


def test_tasks_are_asked_at_each_depth_and_reported_apart(loaded: LoadedModel, text: str, tmp_path: Any) -> None:
    document = compare.sweep(
        model=loaded, text=text, lengths=[1280], presses=["knorm"], ratios=[0.5], tasks=["assoc", "vt"], trials=2,
        out=tmp_path,
    )  # fmt: skip
    assert list(document["tasks"]) == ["vt", "assoc"]
    for row in document["rows"]:
        assert list(row["asked"]) == ["vt", "assoc"]
        assert {name: found["trials"] for name, found in row["asked"].items()} == {"vt": 6, "assoc": 6}
        assert (row["passkey_trials"], row["passkey_low"], row["loss"]) == (0, None, None)
        assert Counter(trial["task"] for trial in row["trials"]) == {"vt": 6, "assoc": 6}
        for name, found in row["asked"].items():
            assert found["hits"] == sum(trial["hit"] for trial in row["trials"] if trial["task"] == name)
    first, second = (row["trials"] for row in document["rows"])
    assert [trial["key"] for trial in first] == [trial["key"] for trial in second]
    assert "vt_hits,vt_trials,vt_low,vt_high,assoc_hits" in (tmp_path / "results.csv").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "assoc, right answers, %" in page
    assert "Pass-keys by depth" not in page


def test_all_tasks_have_inputs_and_the_default_is_what_it_was() -> None:
    assert list(TASKS) == ["text", *ASKED]
    assert DEFAULT == ("text", "needle")
    items = inputs([128], 1, TASKS)
    assert Counter(item.task for item in items) == {"text": 1, **dict.fromkeys(ASKED, len(DEPTHS))}
    assert len({str(item) for item in items}) == len(items)
    assert str(items[1]) == "128 tokens, pass-key at 10 %, trial 1"
    assert str(items[-1]) == "128 tokens, assoc at 90 %, trial 1"
