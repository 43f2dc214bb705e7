"""The n-gram: probabilities that sum to one, values by hand, better with a longer context."""

import math

import numpy as np
import pytest

from attnkit import training
from attnkit._core.errors import InputError, OptionError


def log_prob(model: training.KneserNey, history: list[int], token: int) -> float:
    """Natural logarithm of one conditional probability; `loss` is a mean over the tokens after the first."""
    whole = -model.loss([np.array([*history, token])]) * len(history)
    before = -model.loss([np.array(history)]) * (len(history) - 1) if len(history) > 1 else 0.0
    return whole - before


@pytest.mark.parametrize("history", [[0], [1, 2], [4, 4, 4], [3, 0, 1, 2]])
def test_probabilities_sum_to_one(history: list[int]) -> None:
    documents = [np.random.default_rng(0).integers(0, 4, 60), np.array([4, 1, 2])]
    model = training.KneserNey(documents, order=3, vocab_size=5)
    assert sum(math.exp(log_prob(model, history, token)) for token in range(5)) == pytest.approx(1.0, abs=1e-12)


def test_a_bigram_by_hand() -> None:
    """The text 0 1 0 1 0 2: bigrams 01 01 02 10 10; each order takes n1 / (n1 + 2 n2) from its counts."""
    model = training.KneserNey([np.array([0, 1, 0, 1, 0, 2])], order=2, vocab_size=3)
    # what comes before: 0 after 1; 1 after 0; 2 after 0 -> one kind each, none twice, discount 1
    unigram = 1 / 3
    bigram_discount = 1 / (1 + 2 * 2)
    expected = (2 - bigram_discount) / 3 + bigram_discount * 2 / 3 * unigram
    assert math.exp(log_prob(model, [0], 1)) == pytest.approx(expected)


def test_longer_contexts_help_on_a_pattern() -> None:
    text = np.tile([0, 1, 2, 0, 2, 1], 200)
    losses = [training.KneserNey([text], order=order, vocab_size=3).loss([text[:300]]) for order in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.05


def test_contexts_do_not_cross_documents() -> None:
    model = training.KneserNey([np.array([0, 1])] * 5, order=2, vocab_size=3)
    joined = training.KneserNey([np.array([0, 1] * 5)], order=2, vocab_size=3)
    assert log_prob(model, [1], 0) < log_prob(joined, [1], 0)


def test_what_it_refuses() -> None:
    with pytest.raises(OptionError, match="does not fit into 64 bits"):
        training.KneserNey([np.array([0, 1])], order=5, vocab_size=49_152)
    with pytest.raises(InputError, match="hold the token 7; vocab_size is 3"):
        training.KneserNey([np.array([0, 7])], order=2, vocab_size=3)
    with pytest.raises(InputError, match="nothing to predict"):
        training.KneserNey([np.array([0])], order=2, vocab_size=3)
