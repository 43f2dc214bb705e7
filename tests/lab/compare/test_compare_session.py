from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

from attnkit._core.errors import UnsupportedArchitecture
from attnkit.lab.compare import LoadedModel
from attnkit.lab.compare.methods import BASELINE, METHODS, Method, select
from attnkit.lab.compare.prompts import ANSWER_TOKENS, Frame, Prompt
from attnkit.lab.compare.session import Session, TextInput

LENGTH = 512
TAIL = 96


@pytest.fixture
def ids(tokenizer: Any, text: str) -> list[int]:
    with open(text) as file:
        return list(tokenizer(file.read(), add_special_tokens=False)["input_ids"])


@pytest.fixture
def window(ids: list[int]) -> TextInput:
    return TextInput(ids[: LENGTH - TAIL], ids[LENGTH - TAIL : LENGTH])


@pytest.fixture
def prompt(tokenizer: Any, ids: list[int]) -> Prompt:
    return Frame(tokenizer).prompt(ids, length=LENGTH, depth=0.5, seed=[0])


def plain_logits(loaded: LoadedModel, item: TextInput) -> torch.Tensor:
    """Of the tokens before each tail token, by the model as it came, in one pass without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(torch.tensor([item.context + item.tail])).logits[0]
    return logits[len(item.context) - 1 : -1]


def test_dense_losses_are_those_of_the_untouched_model(loaded: LoadedModel, window: TextInput) -> None:
    expected = F.cross_entropy(plain_logits(loaded, window), torch.tensor(window.tail), reduction="none")
    result = Session(loaded, select(["dense"])).read_text(window, METHODS[BASELINE], LENGTH)
    torch.testing.assert_close(torch.tensor(result["losses"]), expected, rtol=1e-4, atol=1e-4)
    assert (result["kl"], result["agreement"]) == (0.0, 1.0)


def test_kl_and_agreement_compare_with_dense(loaded: LoadedModel, window: TextInput) -> None:
    session = Session(loaded, select(["dense", "pi"]))
    result = session.read_text(window, METHODS["pi"], LENGTH)
    dense = plain_logits(loaded, window).double()
    with session._applied(METHODS["pi"], LENGTH):
        other = plain_logits(loaded, window).double()
    expected = F.kl_div(other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    assert result["kl"] == pytest.approx(float(expected), rel=1e-3)
    assert result["agreement"] == pytest.approx(float((dense.argmax(-1) == other.argmax(-1)).double().mean()))
    assert 0 < result["agreement"] < 1


def test_the_cache_of_dense_weighs_what_its_tensors_weigh(loaded: LoadedModel, window: TextInput) -> None:
    result = Session(loaded, select(["dense"])).read_text(window, METHODS[BASELINE], LENGTH)
    layers, heads, width = 2, 2, 16
    assert result["kv_mib"] * 2**20 == layers * LENGTH * (2 * heads * width * 4 + 8)  # keys and values, and positions


def test_a_window_keeps_less(loaded: LoadedModel, window: TextInput) -> None:
    session = Session(loaded, select(None))
    dense, short = (session.read_text(window, METHODS[name], LENGTH) for name in ("dense", "window"))
    assert short["kv_mib"] < dense["kv_mib"] / 1.5
    assert short["losses"] != dense["losses"]


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.shares_dense_prefill], ids=lambda method: method.name)
def test_sharing_the_dense_prefill_changes_nothing(
    loaded: LoadedModel, window: TextInput, prompt: Prompt, method: Method
) -> None:
    alone = Method(method.name, method.summary, method.policy)
    results = []
    for variant in (method, alone):
        session = Session(loaded, [METHODS[BASELINE], METHODS["window-decode"]])
        session.read_text(window, METHODS[BASELINE], LENGTH)
        text = session.read_text(window, variant, LENGTH)
        session.begin()
        results.append((text, session.ask(prompt, variant, LENGTH)))
    (shared_text, shared_ask), (text, ask) = results
    torch.testing.assert_close(shared_text["losses"], text["losses"], rtol=1e-5, atol=1e-5)
    assert shared_text["agreement"] == text["agreement"]
    assert shared_ask["answer"] == ask["answer"]
    assert shared_text["kv_mib"] == text["kv_mib"]


def test_methods_that_share_do_not_disturb_each_other(loaded: LoadedModel, window: TextInput) -> None:
    methods = [METHODS["dense"], METHODS["window-decode"]]
    session = Session(loaded, methods)
    first = [session.read_text(window, method, LENGTH)["losses"] for method in methods]
    second = [session.read_text(window, method, LENGTH)["losses"] for method in reversed(methods)]
    assert first == second[::-1]
    assert first[0] != first[1]


def test_the_dense_prefill_is_timed_once_an_input(loaded: LoadedModel, window: TextInput) -> None:
    session = Session(loaded, select(None))
    times = [session.read_text(window, METHODS[name], LENGTH)["prefill_s"] for name in ("dense", "window-decode", "window")]
    assert times[0] == times[1] != times[2]
    session.begin()
    assert session.read_text(window, METHODS["dense"], LENGTH)["prefill_s"] != times[0]


def test_answers_are_greedy_tokens_after_the_question(loaded: LoadedModel, prompt: Prompt) -> None:
    loaded.model.generation_config.eos_token_id = None
    result = Session(loaded, select(["dense"])).ask(prompt, METHODS[BASELINE], LENGTH)
    given = torch.tensor([prompt.context + prompt.question])
    with torch.no_grad():
        expected = loaded.model.generate(given, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=0)
    assert result["answer"] == loaded.tokenizer.decode(expected[0, given.shape[1] :])
    assert (result["depth"], result["key"], result["hit"]) == (0.5, prompt.key, False)


def test_answers_end_where_the_model_ends_them(loaded: LoadedModel, prompt: Prompt) -> None:
    given = torch.tensor([prompt.context + prompt.question])
    with torch.no_grad():
        second = loaded.model.generate(given, do_sample=False, max_new_tokens=2, pad_token_id=0)[0, -1]
    loaded.model.generation_config.eos_token_id = [int(second)]
    answer = Session(loaded, select(["dense"])).ask(prompt, METHODS[BASELINE], LENGTH)["answer"]
    assert len(answer) == 1  # a token is a byte


def test_the_model_is_left_as_it_was(loaded: LoadedModel, window: TextInput, prompt: Prompt) -> None:
    before = plain_logits(loaded, window)
    session = Session(loaded, select(None))
    session.check(select(None), LENGTH)
    for method in select(None):
        session.read_text(window, method, LENGTH)
        session.begin()
        session.ask(prompt, method, LENGTH)
        session.begin()
    assert torch.equal(plain_logits(loaded, window), before)


def test_a_model_without_the_attention_interface_is_refused_by_name(tokenizer: Any) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2)).eval()
    session = Session(LoadedModel("bloom", model, tokenizer), select(None))
    with pytest.raises(UnsupportedArchitecture, match=r"method 'dense' cannot run on this model: .*; choose another model"):
        session.check(select(None), LENGTH)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(loaded: LoadedModel, window: TextInput) -> None:
    methods = select(None)
    on_cpu = Session(loaded, methods)
    expected = {method.name: on_cpu.read_text(window, method, LENGTH) for method in methods}
    loaded.model.to("cuda")
    on_gpu = Session(loaded, methods)
    for method in methods:
        result = on_gpu.read_text(window, method, LENGTH)
        torch.testing.assert_close(result["losses"], expected[method.name]["losses"], rtol=0.01, atol=0.01)
        assert result["kv_mib"] == expected[method.name]["kv_mib"]
        assert result["peak_mib"] > 0
