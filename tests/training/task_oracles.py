"""Solvers that read the tokens of an example and nothing else: what each task's answers must be."""

import itertools
from collections.abc import Callable

import numpy as np

from attnkit.training.tasks import AssociativeRecall, Copying, Needle, PermutationWords, Ruler, Task, VariableTracking

Answers = dict[int, int]  # position -> token


def recall(task: AssociativeRecall, ids: list[int]) -> Answers:
    table, answers = {}, {}
    for place in range(0, len(ids), 2):
        key, value = ids[place], ids[place + 1]
        if key in table:
            answers[place + 1] = table[key]
        table[key] = value
    return answers


def needle(task: Needle, ids: list[int]) -> Answers:
    (question,) = [place for place, token in enumerate(ids) if token == 1]
    key = ids[question + 1]
    (found,) = [place for place in range(question) if ids[place] == 0 and ids[place + 1] == key]
    return {question + 2 + digit: ids[found + 2 + digit] for digit in range(task.digits)}


def variables(task: VariableTracking, ids: list[int]) -> Answers:
    held: dict[int, int] = {}
    (question,) = [place for place, token in enumerate(ids) if token == 1]
    for place in range(question):
        if ids[place] == 0:
            name, source = ids[place + 1], ids[place + 2]
            assert name not in held
            held[name] = held.get(source, source)
    return {question + 2: held[ids[question + 1]]}


def copying(task: Copying, ids: list[int]) -> Answers:
    mark = max(place for place, token in enumerate(ids) if token == 0)
    length = len(ids) - mark - 1
    return {mark + 1 + place: ids[mark - length + place] for place in range(length)}


def permutations(task: PermutationWords, ids: list[int]) -> Answers:
    elements = list(itertools.permutations(range(task.points)))
    state, answers = tuple(range(task.points)), {}
    for place, token in enumerate(ids[:-1]):
        state = tuple(elements[token][image] for image in state)
        answers[place + 1] = elements.index(state)
    return answers


def ruler(task: Ruler, ids: list[int]) -> Answers:
    start = len(ids) - 3 * task.questions
    told: dict[int, list[int]] = {}
    for place in range(start):
        if ids[place] == 0:
            told.setdefault(ids[place + 1], []).append(ids[place + 2])
    answers = {}
    for place in range(start, len(ids), 3):
        mark, name = ids[place : place + 2]
        if mark == 4 and name != 4:
            ranked = sorted(set(ids[:start]), key=ids[:start].count)
            common = ranked[-task.questions :]
            assert ids[:start].count(common[0]) > max(map(ids[:start].count, ranked[: -task.questions]), default=0)
            answers[place + 2] = min(token for token in common if token > name)
            continue
        if mark == 4:
            counts = sorted((ids[:start].count(token), token) for token in set(ids[:start]))
            assert counts[-1][0] > counts[-2][0]
            answers[place + 2] = counts[-1][1]
            continue
        found = told[name][-1 if mark == 3 else 0]
        answers[place + 2] = told[found][0] if found in told else found
    return answers


ORACLES: dict[str, Callable[..., Answers]] = {
    "mqar": recall,
    "needle": needle,
    "needle-multikey": needle,
    "variables": variables,
    "copy": copying,
    "permutations": permutations,
    "ruler": ruler,
}


def solve(task: Task, input_ids: np.ndarray) -> np.ndarray:
    """[n, T] predictions of the oracle, -1 where it has none."""
    predictions = np.full(input_ids.shape, -1)
    for row, ids in enumerate(input_ids.tolist()):
        for place, token in ORACLES[task.name](task, ids).items():
            predictions[row, place] = token
    return predictions
