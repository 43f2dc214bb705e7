"""The claims of system 9: questions behind a compressed context, the oracle, and the verdict on planted rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit import inference, kv
from attnkit._core.errors import InputError
from attnkit.lab.claims import CLAIMS, run
from attnkit.lab.claims.kv_asked import ADAPTED, MAIN, Asked, Method, ask, decoding, future_mass, oracle, prefilling
from attnkit.lab.claims.kv_needles import _hidden
from attnkit.lab.claims.kv_verdict import conclude_rows, measure
from attnkit.testing import tiny_model

KINDS = ("one", "two")


def some(rows: int = 3, context: int = 40) -> Asked:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 61, (rows, context + 12), generator=draw)
    blocks = ids[:, context:].unflatten(1, (4, 3))
    kinds = torch.arange(rows) % 2
    return Asked(ids[:, :context], blocks[..., :2], blocks[..., 1:], torch.ones(rows, 4, dtype=torch.bool), kinds)


def greedy(model: Any, given: Asked) -> Asked:
    """The same questions, whose answers are what the model says with the whole cache."""
    rows = []
    for row in range(len(given)):
        for question in range(given.asked.shape[1]):
            ids = torch.cat([given.context[row], given.asked[row, question]])[None]
            with torch.no_grad():
                rows.append(model(ids).logits[0, -2:].argmax(-1))
    answers = torch.stack(rows).unflatten(0, given.asked.shape[:2])
    return Asked(given.context, given.asked, answers, given.counts, given.kinds)


def test_the_whole_cache_answers_as_one_pass_and_questions_do_not_see_each_other() -> None:
    model = tiny_model("llama")
    given = greedy(model, some())
    hits, held = ask(model, None, given)
    assert bool(hits.all())
    assert held == 1
    pieces, _ = ask(model, None, given, pieces=(24, 8, 8))
    assert torch.equal(hits, pieces)
    changed = given.answers.clone()
    changed[1, 2, 1] += 1
    wrong, _ = ask(model, None, Asked(given.context, given.asked, changed, given.counts, given.kinds))
    assert (~wrong).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(("spec", "held"), [("knorm", 0.25), ("adakv:knorm", 0.25), ("think", 1.0)])
def test_what_is_held_is_counted(spec: str, held: float) -> None:
    model = tiny_model("llama")
    assert ask(model, kv.press(spec, ratio=0.75), some())[1] == pytest.approx(held)


def test_decoding_compresses_to_the_ratio_at_the_end_of_the_context() -> None:
    model = tiny_model("llama")
    (method,) = [method for method in decoding(8) if method.name == "decode:knorm"]
    assert ask(model, method.press(0.5, Path()), some(), pieces=(24, 8, 8))[1] == pytest.approx(0.5)


def test_mass_is_the_attention_of_the_questions() -> None:
    model = tiny_model("llama")
    given = some()
    found = future_mass(model, given)
    expected = [torch.zeros(3, 2, 40) for _ in found]
    model.set_attn_implementation("eager")
    for question in range(4):
        ids = torch.cat([given.context, given.asked[:, question]], 1)
        with torch.no_grad():
            for layer, weights in enumerate(model(ids, output_attentions=True).attentions):
                expected[layer] += weights[:, :, 40:, :40].sum(2).unflatten(1, (2, -1)).mean(2)
    for mass, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mass, other)


def test_the_oracle_keeps_what_gets_most() -> None:
    model = tiny_model("llama")
    given = some()
    mass = future_mass(model, given)
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=oracle(mass, 0.75))) as h:
        cache = h.new_cache()
        model(given.context, past_key_values=cache)
    for layer, weights in zip(cache.kv_layers, mass, strict=True):
        assert torch.equal(layer.view().positions[..., :10], weights.topk(10).indices.sort().values)
        assert layer.view().length.unique().tolist() == [10]
    assert oracle(mass, 0.5, adaptive=True).budget != oracle(mass, 0.5).budget


def test_a_refusal_is_a_row() -> None:
    (row,) = measure(tiny_model("llama"), lambda ratio, part: kv.press("kvzap"), some(), ratios=(0.5,), kinds=KINDS, batch=2)
    assert "kvzap needs weights" in row["refused"]


def test_rows_count_by_kind_over_batches() -> None:
    model = tiny_model("llama")
    given = greedy(model, some())
    (row,) = measure(model, lambda ratio, part: None, given, ratios=(0.0,), kinds=KINDS, batch=2)
    assert row["right"] == row["answers"] == {"one": 8, "two": 4}


def test_everything_registered_is_swept() -> None:
    named = {method.name for method in prefilling()}
    assert set(kv.methods()) <= named
    assert len(named) == len(prefilling()) >= 20
    assert {f"decode:{name}" for name in kv.methods()} <= {method.name for method in decoding(64)}
    assert isinstance(Method("knorm", "knorm").press(0.3, Path()), kv.Press)
    (shared,) = [method for method in prefilling() if method.name == "adakv:expected_attention, eps 0.02"]
    assert shared.press(0.5, Path()) == kv.press("adakv:expected_attention", ratio=0.5, eps=0.02)


def planted(**accuracies: float) -> Any:
    """All methods at 0.5 but those named; 0.9 with the whole cache."""
    names = [*MAIN, *(f"adakv:{name}" for name in ADAPTED), "keydiff", "expected_attention, mean", "oracle", "think"]
    found = dict.fromkeys(names, 0.5) | {"dense": 0.9} | accuracies
    return [
        {
            "seed": 0, "phase": "prefill", "method": name, "ratio": 0.0 if name == "dense" else 0.5,
            "right": {"one": 100 * value, "two": 100 * value}, "answers": {"one": 100, "two": 100},
            "held": 1.0 if name == "think" else 0.5, "error": 0.1,
        }
        for name, value in found.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "outcome"),
    [
        ({}, "holds"),
        ({"tova": 0.6, "oracle": 0.6}, "holds in part"),
        ({"think": 0.8}, "holds"),  # holds more than half
        ({"random": 0.51}, "holds in part"),
        ({"adakv:tova": 0.4}, "holds in part"),
        ({"adakv:tova": 0.4, "tova": 0.6, "expected_attention, mean": 0.6}, "does not hold"),
        ({"dense": 0.3}, "undecided"),
    ],
)
def test_the_verdict(accuracies: dict[str, float], outcome: str) -> None:
    verdict = conclude_rows(planted(**accuracies), learnt=0.8).verdict
    assert verdict.outcome == outcome, verdict.reason


def test_part_of_the_rows_decides_nothing() -> None:
    rows = planted()
    for count in range(len(rows)):
        assert conclude_rows(rows[:count], learnt=0.8).verdict.outcome == "undecided"


def test_the_quick_form_runs(tmp_path: Path) -> None:
    document = run(CLAIMS["kv-recall"], tmp_path, quick=True, only="knorm")
    assert {(row["phase"], row["method"]) for row in document["rows"]} == {
        ("prefill", "knorm"), ("prefill", "adakv:knorm"), ("decode", "decode:knorm"),
    }  # fmt: skip
    assert all(row["held"] == 0.5 for row in document["rows"])


def test_needles_stand_between_stretches_of_text() -> None:
    found = _hidden([1, 2], list(range(100, 200)), [[7, 7], [8, 8]], 15)
    assert found == [1, 2, 100, 101, 102, 7, 7, 103, 104, 105, 8, 8, 106, 107, 108]
    with pytest.raises(InputError, match="length=7 has no room"):
        _hidden([1, 2], list(range(100, 200)), [[7, 7], [8, 8]], 7)
