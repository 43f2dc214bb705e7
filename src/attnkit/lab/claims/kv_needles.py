"""System 9: what compressed caches cost a language model that is asked for numbers hidden in real text."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnkit import inference
from attnkit._core.errors import InputError
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row
from attnkit.lab.claims.kv_asked import ORACLES, Asked, Method, future_mass, oracle, prefilling
from attnkit.lab.claims.kv_verdict import DENSE, PROTOCOL, conclude_rows, measure
from attnkit.lab.claims.place import Place
from attnkit.lab.compare import loading, texts
from attnkit.lab.compare.questions import NAMES, NEEDLE, OPENING, QUESTION

__all__ = ["CLAIM"]

_LEARNT = 0.6
_KIND = "needles"
_TEXTS, _READ = 16, 256  # texts that are read to learn statistics of queries, and their tokens


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Attributes:
        model: of `attnkit.lab.compare.loading.locate`.
        text: a text asset or a file.
        length: tokens of a context.
        contexts: how many.
        needles: numbers hidden in each, all of which are asked for; at most 16.
        ratios: shares of the keys that are removed.
        batch: contexts a pass.
        errors: whether reconstruction errors are measured, too.
        seeds: of the numbers, their places and the texts.
    """

    model: str = loading.PACKAGED
    text: str = "wiki"
    length: int = 384
    contexts: int = 4
    needles: int = 4
    ratios: tuple[float, ...] = (0.5,)
    batch: int = 1
    errors: bool = False
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= len(NAMES):
            raise InputError(f"needles={self.needles} is not allowed; choose 1 to {len(NAMES)}")


def _cells(settings: Settings) -> list[Cell]:
    cells = []
    for seed in settings.seeds:
        cells.append(Cell(f"seed {seed}, {DENSE}", 3, partial(_measure_whole, settings, seed)))
        cells += [
            Cell(f"seed {seed}, {method.name}", 1, partial(_measure_method, settings, seed, method)) for method in prefilling()
        ]
    return cells


def _measure_whole(settings: Settings, seed: int, place: Place) -> list[Row]:
    """Nothing dropped, and the oracles; the model learns what methods want to know of it."""
    rows = _measure(settings, seed, DENSE, lambda ratio, given: None, place)
    loaded = _loaded(settings.model, place.device)
    ids = _text(settings, loaded)
    read = [ids[start * _READ :][:_READ] for start in range(_TEXTS)]  # behind these the contexts begin
    learnt = _learnt(seed, place)
    learnt.parent.mkdir(parents=True, exist_ok=True)
    inference.calibrate(loaded.model, read, what=("expected_attention_stats", "qfilter"), path=learnt)
    for name in ORACLES:
        told = partial(_oracle, loaded.model, name != "oracle")
        rows += _measure(settings, seed, name, told, place)
    return rows


def _oracle(model: Any, adaptive: bool, ratio: float, given: Asked) -> Any:
    return oracle(future_mass(model, given), ratio, adaptive=adaptive)


def _learnt(seed: int, place: Place) -> Path:
    return place.run_folder(f"seed {seed}") / "learnt.safetensors"


def _measure_method(settings: Settings, seed: int, method: Method, place: Place) -> list[Row]:
    learnt = _learnt(seed, place)
    return _measure(settings, seed, method.name, lambda ratio, given: method.press(ratio, learnt), place)


def _measure(settings: Settings, seed: int, name: str, press: Any, place: Place) -> list[Row]:
    loaded = _loaded(settings.model, place.device)
    given = _given(settings, seed, loaded).to(place.device)
    ratios = (0.0,) if name == DENSE else settings.ratios
    found = measure(loaded.model, press, given, ratios=ratios, kinds=(_KIND,), batch=settings.batch, errors=settings.errors)
    return [{"seed": seed, "phase": "prefill", "method": name} | row for row in found]


@functools.lru_cache(maxsize=1)  # reading it takes longer than a method
def _loaded(model: str, device: torch.device) -> loading.LoadedModel:
    return loading.load(loading.locate(model), device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _text(settings: Settings, loaded: loading.LoadedModel) -> list[int]:
    tokens = (_TEXTS * _READ, *[settings.length] * settings.contexts)
    return texts.tokenize(texts.read(settings.text), loaded.tokenizer, lengths=(sum(tokens),), trials=1)


def _given(settings: Settings, seed: int, loaded: loading.LoadedModel) -> Asked:
    """Contexts of real text with numbers in them, and questions for all numbers.

    Raises:
        InputError: the contexts have no room for text, or names and numbers have different numbers of tokens.
    """
    hay = _text(settings, loaded)[_TEXTS * _READ :]
    random = np.random.default_rng(seed)
    contexts, asked, answers = [], [], []
    for number in range(settings.contexts):
        names = random.choice(NAMES, settings.needles, replace=False)
        keys = random.choice(np.arange(10_000, 100_000), settings.needles, replace=False).astype(str)
        ids = _tokens(loaded.tokenizer)
        told = [NEEDLE.replace("pass key", f"pass key of {name}") for name in names]
        parts = [ids(needle.format(key=key)) for needle, key in zip(told, keys, strict=True)]
        before, after = zip(*(_around(loaded.tokenizer, name) for name in names), strict=True)
        contexts.append(_hidden(ids(before[0]), hay[number * settings.length :], parts, settings.length))
        said = [ids(f" {key}") for key in keys]
        asked.append([[*ids(question), *key[:-1]] for question, key in zip(after, said, strict=True)])
        answers.append(said)
    try:
        context, questions, said_ids = (torch.tensor(each) for each in (contexts, asked, answers))
    except ValueError as error:
        raise InputError(f"{settings.model}: names and numbers have different numbers of tokens; {error}") from error
    counts = torch.ones(questions.shape[:2], dtype=torch.bool)
    return Asked(context, questions, said_ids, counts, torch.zeros(len(contexts), dtype=torch.long))


def _tokens(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _around(tokenizer: Any, name: str) -> tuple[str, str]:
    """What stands before the text and behind it, up to where the answer goes on, in the model's chat template."""
    from attnkit.inference.answers import around

    question, opening = (text.replace("pass key", f"pass key of {name}") for text in (QUESTION, OPENING))
    before, after = around(tokenizer, question)
    return before, after + opening


def _hidden(before: list[int], hay: list[int], parts: list[list[int]], length: int) -> list[int]:
    """`length` tokens: what stands before, and text with a part after each of equally long stretches of it."""
    room = length - len(before) - sum(map(len, parts))
    if room < len(parts):
        raise InputError(f"length={length} has no room for text beside {len(parts)} needles; raise it")
    ends = [round(room * (place + 1) / (len(parts) + 1)) for place in range(len(parts))]
    context = list(before)
    for start, end, part in zip([0, *ends], [*ends, room], [*parts, []], strict=True):
        context += [*hay[start:end], *part]
    return context


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    del settings
    return conclude_rows(rows, learnt=_LEARNT)


CLAIM = Claim(
    name="kv-needles",
    systems=(9,),
    says=(
        "expected attention loses less than other methods when the cache of a language model is compressed without knowing the "
        "question"
    ),
    source="Devoto et al. 2025 (arXiv:2510.00636)",
    protocol=(
        "SmolLM2-135M-Instruct reads real text with several numbers of five digits, each of a city, and is asked for all of "
        "them. " + PROTOCOL
    ),
    minutes=8,
    device="cpu",
    settings=Settings,
    quick={"length": 320, "contexts": 1, "needles": 2},
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
