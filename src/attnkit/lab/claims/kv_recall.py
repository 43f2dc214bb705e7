"""System 9: what compressed caches cost a small model that was trained on needles, chains and counts."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnkit import inference
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row
from attnkit.lab.claims.kv_asked import ORACLES, Asked, Method, decoding, future_mass, oracle, prefilling
from attnkit.lab.claims.kv_verdict import DENSE, PROTOCOL, conclude_rows, measure
from attnkit.lab.claims.place import Place

__all__ = ["CLAIM"]

_LEARNT = 0.8
_JUDGED = 1_000_003  # seeds of judging stay apart from those of training
_KINDS = ("single", "multikey", "multivalue", "variables", "frequent")
_ONCE = ("single", "frequent")  # kinds whose questions are all the same
_SPACING = 6  # of training: many statements, so that guessing among a few does not pay
_ALONE = 0.4  # share of the tokens on which two layers learn many needles alone; deeper, or beside easier kinds, it takes long
_WINDOW = 4  # tokens that the first layer sees
_TEXTS = 64  # that are read to learn statistics of queries, questions included
_PASS = 16  # tokens that come in at once after the prefill


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Attributes:
        trained: tokens of training examples, rising; all but the longest for two layers that learn many needles alone, then
            all but the shortest with all kinds.
        length: tokens of an example that is judged, its questions included.
        ratios: shares of the keys that are removed after the prefill.
        decode_ratios: and while the context comes in.
        tokens: to train on.
        row_tokens: of a step.
        dim, layers, heads, kv_heads: of the model, 3 layers or more, the first of which sees 4 tokens; heads have dim / heads
            channels.
        learning_rate: of the recipe.
        examples: judged of each kind.
        questions: of an example that is judged; twice as many in training.
        interval: tokens between two compressions while the context comes in.
        batch: contexts a pass.
        seeds: of weights, training and judging.
    """

    trained: tuple[int, ...] = (48, 88, 216, 512)
    length: int = 512
    ratios: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    decode_ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    tokens: int = 50_000_000
    row_tokens: int = 16_384
    dim: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    learning_rate: float = 1.5e-3
    examples: int = 32
    questions: int = 4
    interval: int = 64
    batch: int = 160
    seeds: tuple[int, ...] = (0,)


def _cells(settings: Settings) -> list[Cell]:
    cells = []
    for seed in settings.seeds:
        name = f"seed {seed}, {DENSE}"
        cells.append(Cell(name, 60, partial(_measure_whole, settings, seed)))
        for phase, methods in (("prefill", prefilling()), ("decode", decoding(settings.interval))):
            for method in methods:
                run = partial(_measure_method, settings, seed, phase, method)
                cells.append(Cell(f"seed {seed}, {phase}, {method.name}", 1, run))
    return cells


def _measure_whole(settings: Settings, seed: int, place: Place) -> list[Row]:
    """Nothing dropped, and the oracles; the model learns what methods want to know of it."""
    from attnkit.training.tasks.ruler import Ruler

    rows = _measure(settings, seed, "prefill", DENSE, lambda ratio, given: None, place)
    model = _model(settings, seed, place)
    texts = Ruler(kinds=_KINDS, questions=settings.questions).generate(seed, _TEXTS, settings.length).input_ids
    inference.calibrate(model, list(texts), what=("expected_attention_stats", "qfilter"), path=_learnt(seed, place))
    for name in ORACLES:
        rows += _measure(settings, seed, "prefill", name, partial(_oracle, model, name != "oracle"), place)
    return rows


def _learnt(seed: int, place: Place) -> Path:
    return place.run_folder(f"seed {seed}") / "learnt.safetensors"


def _measure_method(settings: Settings, seed: int, phase: str, method: Method, place: Place) -> list[Row]:
    learnt = _learnt(seed, place)
    return _measure(settings, seed, phase, method.name, lambda ratio, given: method.press(ratio, learnt), place)


def _oracle(model: Any, adaptive: bool, ratio: float, given: Asked) -> Any:
    return oracle(future_mass(model, given), ratio, adaptive=adaptive)


def _measure(
    settings: Settings, seed: int, phase: str, name: str, press: Callable[[float, Asked], Any], place: Place
) -> list[Row]:
    model = _model(settings, seed, place)
    given = _given(settings, seed, place.device)
    size, pieces, ratios = given.context.shape[1], None, (0.0,) if name == DENSE else settings.ratios
    if phase == "decode":
        ratios = settings.decode_ratios
        later = size // 2 // settings.interval * settings.interval
        pieces = [size - later, *[_PASS] * (later // _PASS)]
    found = measure(model, press, given, ratios=ratios, kinds=_KINDS, batch=settings.batch, pieces=pieces)
    return [{"seed": seed, "phase": phase, "method": name} | row for row in found]


def _model(settings: Settings, seed: int, place: Place) -> Any:
    """Trained here, or found trained."""
    folder = place.run_folder(f"seed {seed}")
    if not (folder / "train.json").is_file():
        _train(settings, seed, place)
    return _loaded(folder, place.device)


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, device: torch.device) -> Any:
    from attnkit import training

    return training.load_model(folder)[0].to(device)


def _train(settings: Settings, seed: int, place: Place) -> None:
    """Two layers learn many needles alone, then all layers all kinds."""
    name = f"seed {seed}, two layers"
    _learn(settings, seed, place, name, _fresh(settings, 2, seed), ("multikey",), settings.trained[:-1], _ALONE)
    small, whole = place.load(name), _fresh(settings, settings.layers, seed)
    whole.load_state_dict(small.cpu().state_dict(), strict=False)
    for layer in whole.model.layers[2:]:  # which say nothing yet
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    _learn(settings, seed, place, f"seed {seed}", whole, _KINDS, settings.trained[1:], 1 - _ALONE)


def _fresh(settings: Settings, layers: int, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from attnkit.training.tasks.ruler import Ruler

    config = Qwen3Config(
        vocab_size=Ruler().vocab_size,
        hidden_size=settings.dim,
        intermediate_size=2 * settings.dim,
        num_hidden_layers=layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.dim // settings.heads,
        use_sliding_window=True,
        sliding_window=_WINDOW,  # without it finding the token before takes most of the training
        layer_types=["sliding_attention", *["full_attention"] * (layers - 1)],
        max_position_embeddings=2 * max(settings.length, *settings.trained),  # some methods read the context again
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _learn(
    settings: Settings,
    seed: int,
    place: Place,
    name: str,
    model: Any,
    kinds: tuple[str, ...],
    lengths: tuple[int, ...],
    share: float,
) -> None:
    from attnkit import training
    from attnkit.training.tasks.ruler import Ruler

    steps = max(1, int(share * settings.tokens) // settings.row_tokens)
    task = Ruler(kinds=kinds, questions=2 * settings.questions, spacing=_SPACING)
    data = training.TaskData.make(task, lengths, row_tokens=settings.row_tokens, rows=steps, seed=seed, validation_rows=1)
    recipe = training.Recipe(
        steps=steps, learning_rate=settings.learning_rate, precision=place.precision, seed=seed, log_every=min(50, steps)
    )
    place.train(name, model, data, recipe)


def _given(settings: Settings, seed: int, device: torch.device) -> Asked:
    """Contexts of all kinds in turns."""
    from attnkit.training.tasks.ruler import Ruler

    parts = [
        Ruler(kinds=(kind,), questions=settings.questions)
        .generate(_JUDGED + seed, settings.examples, settings.length)
        .input_ids
        for kind in _KINDS
    ]
    ids = torch.from_numpy(np.stack(parts, 1).reshape(-1, settings.length))
    blocks = ids[:, -3 * settings.questions :].unflatten(1, (-1, 3))
    kinds = torch.arange(len(_KINDS)).repeat(settings.examples)
    once = torch.tensor([kind in _ONCE for kind in _KINDS])[kinds]
    counts = ~once[:, None] | (torch.arange(settings.questions) == 0)
    given = Asked(ids[:, : -3 * settings.questions], blocks[..., :2], blocks[..., 2:], counts, kinds)
    return given.to(device)


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    del settings
    return conclude_rows(rows, learnt=_LEARNT)


CLAIM = Claim(
    name="kv-recall",
    systems=(9,),
    says=(
        "expected attention loses less than other methods when the cache is compressed without knowing the question, and "
        "budgets that heads share lose less than equal ones"
    ),
    source="Devoto et al. 2025 (arXiv:2510.00636)",
    protocol=(
        "A Qwen3 of four layers, the first of which sees a window of 4 tokens and is not compressed, is trained on needles "
        "(one, many, two of a name), chains of two and the most common of many tokens, its first two layers beforehand on many "
        "needles; contexts of 500 tokens. " + PROTOCOL
    ),
    minutes=3,
    device="cuda",
    settings=Settings,
    quick={
        "trained": (48, 96), "length": 96, "ratios": (0.5,), "tokens": 20_000, "row_tokens": 512, "dim": 64, "layers": 3,
        "heads": 2, "kv_heads": 1, "examples": 4, "interval": 16, "batch": 20, "decode_ratios": (0.5,),
    },
    cells=_cells,
    conclude=_conclude,
)  # fmt: skip
