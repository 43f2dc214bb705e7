"""Tasks: answers that follow from the context, exact scores, chance."""

import numpy as np
import pytest
from task_oracles import ORACLES, solve

from attnkit._core.errors import InputError, OptionError, ShapeError
from attnkit.training.data import IGNORED
from attnkit.training.tasks import (
    TASKS,
    AssociativeRecall,
    Examples,
    PermutationWords,
    Ruler,
    Score,
    Task,
    TaskData,
    TaskRows,
    score,
)
from attnkit.training.tasks.permutations import group_table

LENGTHS = {
    "mqar": (8, 64, 256),
    "needle": (12, 64, 65),
    "needle-multikey": (54, 100),
    "variables": (27, 64),
    "copy": (3, 8, 33),
    "ruler": (24, 64, 300),
}


def cases() -> list[tuple[str, int]]:
    return [(name, length) for name in TASKS for length in LENGTHS.get(name, (2, 5, 32))]


@pytest.mark.parametrize(("name", "length"), cases())
def test_the_oracle_scores_one_and_answers_stand_where_they_are_asked(name: str, length: int) -> None:
    task = TASKS[name]()
    examples = task.generate(7, 40, length)
    assert examples.input_ids.shape == examples.labels.shape == (40, length)
    assert examples.input_ids.min() >= 0
    assert examples.input_ids.max() < task.vocab_size
    assert (examples.labels[:, 0] == IGNORED).all()
    found = score(solve(task, examples.input_ids), examples)
    assert (found.right, found.solved) == (found.answers, found.examples)
    assert found.accuracy == 1.0


def test_every_task_has_an_oracle() -> None:
    assert set(ORACLES) == set(TASKS)
    assert all(isinstance(TASKS[name](), Task) for name in TASKS)


@pytest.mark.parametrize("name", list(TASKS))
def test_guessing_scores_chance(name: str) -> None:
    task = TASKS[name]()
    examples = task.generate(0, 3000, 64)
    asked = examples.labels[examples.labels != IGNORED]
    kinds = np.arange(asked.min(), asked.max() + 1)
    guesses = np.random.default_rng(1).choice(kinds, examples.labels.shape)
    spread = (task.chance / len(asked)) ** 0.5
    assert abs(score(guesses, examples).accuracy - task.chance) < 5 * spread


@pytest.mark.parametrize("name", [name for name in TASKS if name != "permutations"])
def test_answers_are_in_the_context(name: str) -> None:
    task = TASKS[name]()
    examples = task.generate(3, 50, 64)
    for ids, labels in zip(examples.input_ids, examples.labels, strict=True):
        for place in np.flatnonzero(labels != IGNORED):
            assert labels[place] in ids[:place]
            assert ids[place] == labels[place]


def test_products_of_permutations_are_never_shown() -> None:
    """The word does not hold its answers: guessing the last letter is no better than chance."""
    task = PermutationWords()
    examples = task.generate(0, 500, 64)
    shown = np.concatenate([np.full((500, 1), -1), examples.input_ids[:, :-1]], 1)
    labels = np.where(np.arange(64) > 1, examples.labels, IGNORED)  # the first product is the first letter
    assert score(shown, Examples(examples.input_ids, labels)).accuracy < 3 * task.chance


def test_the_table_of_s3() -> None:
    table = group_table(3)
    assert table[0].tolist() == table[:, 0].tolist() == list(range(6))
    assert all(sorted(row) == list(range(6)) for row in table.tolist())
    assert (table != table.T).any()
    a, b, c = 1, 3, 4
    assert table[table[a, b], c] == table[a, table[b, c]]


def test_examples_are_a_function_of_the_seed() -> None:
    for name in TASKS:
        first, again, other = (TASKS[name]().generate(seed, 5, 64).input_ids for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_scores_count_tokens_and_examples() -> None:
    labels = np.array([[IGNORED, 4, 5], [IGNORED, IGNORED, 6]])
    found = score(np.array([[9, 4, 0], [5, 5, 6]]), Examples(labels, labels))
    assert found == Score(right=2, answers=3, solved=1, examples=2)
    assert found + found == Score(4, 6, 2, 4)
    with pytest.raises(ShapeError, match="the examples are"):
        score(labels[:1], Examples(labels, labels))
    with pytest.raises(InputError, match="every label is -100"):
        score(labels, Examples(labels, np.full_like(labels, IGNORED)))


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="multiple of 4"):
        AssociativeRecall().generate(0, 1, 30)
    with pytest.raises(OptionError, match="raise alphabet"):
        AssociativeRecall(alphabet=8).generate(0, 1, 64)
    with pytest.raises(OptionError, match="needle-multikey; choose at least 54"):
        TASKS["needle-multikey"]().generate(0, 1, 53)
    with pytest.raises(OptionError, match="lengths is empty"):
        TaskRows(AssociativeRecall(), [], row_tokens=64, rows=1, seed=0)


def test_rows_of_a_task() -> None:
    data = TaskData.make(AssociativeRecall(), [32, 16], row_tokens=100, rows=200, seed=0, validation_rows=2)
    lengths = [data.train[index]["input_ids"].shape[1] for index in range(200)]
    assert set(lengths[:60]) == {16}  # the longer one joins after 30 % of the rows
    assert set(lengths[120:]) == {16, 32}
    for index in (0, 199):
        row, work = data.train[index], data.train.work(index)
        n, length = row["input_ids"].shape
        assert n == 100 // length
        assert (work.tokens, work.squares) == (n * length, n * length * length)
        assert work.targets == int((row["labels"] != IGNORED).sum())
    assert [data.validation[index]["input_ids"].shape[1] for index in range(4)] == [16, 32, 16, 32]
    train = {row.tobytes() for index in range(200) for row in data.train[index]["input_ids"].numpy()}
    validation = {row.tobytes() for index in range(4) for row in data.validation[index]["input_ids"].numpy()}
    assert not train & validation
    assert data.facts == {"task": "mqar", "lengths": [32, 16], "row_tokens": 100, "alphabet": 64}


@pytest.mark.parametrize(("questions", "values", "length"), [(1, 8, 60), (4, 32, 512), (8, 32, 200), (10, 40, 400)])
def test_common_values_are_all_asked_for_in_order(questions: int, values: int, length: int) -> None:
    task = Ruler(kinds=("common",), questions=questions, values=values)
    examples = task.generate(1, 20, length)
    assert score(solve(task, examples.input_ids), examples).accuracy == 1.0
    asked = examples.labels[examples.labels != IGNORED].reshape(20, questions)
    assert (np.diff(asked, axis=1) > 0).all()
    assert (task.generate(2, 20, length).labels != examples.labels).any()


@pytest.mark.parametrize(("questions", "values", "length"), [(8, 32, 36), (32, 32, 500), (31, 32, 500)])
def test_common_values_that_would_not_stand_out_are_refused(questions: int, values: int, length: int) -> None:
    with pytest.raises(OptionError, match=f"'common' is not possible with questions={questions}, values={values}"):
        Ruler(kinds=("common",), questions=questions, values=values).generate(0, 2, length)
