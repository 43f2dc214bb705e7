from typing import Any

import pytest

from attnkit._core.errors import InputError
from attnkit.lab.compare.prompts import Frame, Prompt
from attnkit.lab.compare.questions import NEEDLE, OPENING, QUESTION, is_hit
from compare_examples import SENTENCES, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "".join(SENTENCES) * 20


def build(tokenizer: Any, *, length: int = 700, depth: float = 0.5, seed: int = 0, text: str = TEXT) -> Prompt:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Frame(tokenizer).prompt(ids, length=length, depth=depth, seed=[seed])


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [400, 701, 1024])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_have_exactly_the_length_asked_for(length: int, depth: float, template: str | None) -> None:
    tokenizer = byte_tokenizer(**({} if template is None else {"chat_template": template}))
    prompt = build(tokenizer, length=length, depth=depth)
    assert len(prompt.context) + len(prompt.question) == length


def test_the_needle_is_whole_and_stands_once_at_its_depth(tokenizer: Any) -> None:
    for depth in (0.1, 0.5, 0.9):
        prompt = build(tokenizer, length=1024, depth=depth)
        shown = tokenizer.decode(prompt.context)
        needle = NEEDLE.format(key=prompt.key)
        assert shown.count(needle) == shown.count(prompt.key) == 1
        before, after = shown.removeprefix("<s>").split(needle)
        assert before.rstrip(" ").endswith(".")
        assert len(before) / len(before + after) == pytest.approx(depth, abs=0.08)


def test_the_question_follows_the_text_and_the_answer_is_begun(tokenizer: Any) -> None:
    prompt = build(tokenizer)
    assert tokenizer.decode(prompt.question) == f"{QUESTION}\n\n{OPENING}"
    assert QUESTION not in tokenizer.decode(prompt.context)


def test_a_chat_template_stands_around_text_and_question() -> None:
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    prompt = build(tokenizer)
    assert tokenizer.decode(prompt.context).startswith("<user>")
    assert tokenizer.decode(prompt.question) == f"{QUESTION}</s><assistant>{OPENING}"


def test_seeds_decide_key_and_haystack(tokenizer: Any) -> None:
    assert build(tokenizer, seed=1) == build(tokenizer, seed=1)
    assert build(tokenizer, seed=1).key != build(tokenizer, seed=2).key


def test_a_key_that_the_text_holds_is_drawn_again(tokenizer: Any) -> None:
    key = build(tokenizer).key
    prompt = build(tokenizer, text=f"{key} "[:6] * 200)
    assert prompt.key != key
    assert len(prompt.context) + len(prompt.question) == 700


def test_a_length_without_room_for_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"length 200 is too short: .* use at least \d+") as caught:
        build(tokenizer, length=200)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(build(tokenizer, length=enough).context) > enough // 2


@pytest.mark.parametrize(
    ("answer", "hit"), [(" 48213.", True), ("48213", True), (" 4821", False), (" 48 213", False), ("", False)]
)
def test_a_hit_has_the_five_digits_in_a_row(answer: str, hit: bool) -> None:
    assert is_hit(answer, "48213") is hit
