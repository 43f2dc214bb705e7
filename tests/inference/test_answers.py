"""Questions about one context: read once, answered apart from each other."""

import pytest
import torch

from attnkit import kv
from attnkit._core.errors import InputError
from attnkit.inference import Policy, apply, generate_with_context
from attnkit.testing import tiny_model
from compare_examples import SENTENCES, byte_tokenizer

CONTEXT = "".join(SENTENCES[(i * i + i // 3) % 4] for i in range(8))
QUESTIONS = ["Who counted ships?", "What was quiet?"]
TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"


@pytest.fixture
def model():
    model = tiny_model("llama", vocab_size=258, max_position_embeddings=1024)
    model.generation_config.eos_token_id = None
    return model


def generated(model, tokenizer, prompt, *, begin=True, new=9):
    """transformers' own greedy answer to a whole prompt."""
    ids = torch.tensor([[*([256] if begin else []), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=257, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("aware", [False, True])
def test_dense_answers_are_those_of_generate(model, aware):
    tokenizer = byte_tokenizer()
    answers = generate_with_context(model, tokenizer, CONTEXT, QUESTIONS, policy="dense", query_aware=aware, max_new_tokens=9)
    assert answers == [generated(model, tokenizer, f"{CONTEXT}\n\n{question}\n\n") for question in QUESTIONS]


def test_a_chat_template_stands_around_context_and_question(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    answers = generate_with_context(model, tokenizer, CONTEXT, QUESTIONS[:1], policy="dense", max_new_tokens=9)
    assert answers == [generated(model, tokenizer, f"<u>{CONTEXT}\n\n{QUESTIONS[0]}</u><a>", begin=False)]


@pytest.mark.parametrize("policy", ["adakv:knorm", "snapkv", "window"])
def test_answers_do_not_depend_on_each_other(model, policy):
    tokenizer = byte_tokenizer()
    together = generate_with_context(model, tokenizer, CONTEXT, QUESTIONS, policy=policy, max_new_tokens=9)
    alone = [
        generate_with_context(model, tokenizer, CONTEXT, [question], policy=policy, max_new_tokens=9)[0]
        for question in QUESTIONS
    ]
    turned = generate_with_context(model, tokenizer, CONTEXT, QUESTIONS[::-1], policy=policy, max_new_tokens=9)
    assert together == alone == turned[::-1]


def test_a_cache_takes_the_compressed_context_and_not_the_questions(model):
    tokenizer, policy = byte_tokenizer(), Policy(cache=kv.press("knorm", ratio=0.75))
    cache = kv.KVCache(model.config, codec="int8")
    generate_with_context(model, tokenizer, CONTEXT, QUESTIONS, policy=policy, cache=cache, max_new_tokens=4)
    tokens = len(CONTEXT) + 1  # a byte each, and the first
    assert cache.get_seq_length() == tokens
    assert [layer.stored for layer in cache.kv_layers] == [tokens // 4] * 2
    with pytest.raises(InputError, match=f"the cache has seen {tokens} tokens; give an empty one"):
        generate_with_context(model, tokenizer, CONTEXT, QUESTIONS, policy=policy, cache=cache)


def test_a_question_read_with_the_context_is_known_when_keys_are_dropped(model):
    """finch keeps what the newest tokens look at: only then are they the question's."""
    tokenizer, finch = byte_tokenizer(), Policy(cache=kv.press("finch", ratio=0.9, window=16))
    seen = []
    for aware in (False, True):
        cache = kv.KVCache(model.config)
        generate_with_context(
            model, tokenizer, CONTEXT, QUESTIONS[:1], policy=finch, cache=cache, query_aware=aware, max_new_tokens=1
        )
        seen.append(cache.get_seq_length())
    assert seen == [len(CONTEXT) + 1, 0]
    prompt = torch.tensor([[256, *tokenizer(f"{CONTEXT}\n\n{QUESTIONS[0]}\n\n", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad(), apply(model, finch) as h:
        out = model.generate(prompt, past_key_values=h.new_cache(), do_sample=False, max_new_tokens=9, pad_token_id=0)
    expected = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    (answer,) = generate_with_context(
        model, tokenizer, CONTEXT, QUESTIONS[:1], policy=finch, query_aware=True, max_new_tokens=9
    )
    assert answer == expected.partition("</s>")[0]


def test_no_question_no_answer(model):
    assert generate_with_context(model, byte_tokenizer(), CONTEXT, [], policy="knorm") == []
