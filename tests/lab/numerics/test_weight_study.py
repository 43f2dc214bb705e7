"""The baseline that stores what flash attention does not, and the study that compares trainings with both."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from attnkit import report, training
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.numerics.snapshots import SavedWeights, snapshots
from attnkit.lab.numerics.stored_attention import BASELINE, StoredAttention
from attnkit.lab.numerics.weight_study import ARMS, WeightStudy
from attnkit.modules import MixerContext, SoftmaxAttention

# --- the baseline


def pair(dtype: torch.dtype, **options: Any) -> tuple[SoftmaxAttention, StoredAttention]:
    torch.manual_seed(0)
    flash = SoftmaxAttention(64, 4, num_kv_heads=2, rope=False, **options)
    stored = StoredAttention(64, 4, num_kv_heads=2, rope=False, **options)
    stored.load_state_dict(flash.state_dict())
    return flash.to(dtype), stored.to(dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_the_baseline_is_attention(packed: bool) -> None:
    flash, stored = pair(torch.float64)
    x = torch.randn(1 if packed else 2, 50, 64, dtype=torch.float64, requires_grad=True)
    borders = torch.tensor([0, 7, 8, 50], dtype=torch.int32)
    context = MixerContext(cu_seqlens=borders, max_seqlen=42) if packed else MixerContext()
    outs = [layer(x, context) for layer in (flash, stored)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_rows_are_aligned_with_the_last_key() -> None:
    flash, stored = pair(torch.float64)
    q, k, v = (torch.randn(1, length, heads, 16, dtype=torch.float64) for length, heads in ((3, 4), (9, 2), (9, 2)))
    torch.testing.assert_close(
        stored._attend(q, k, v, MixerContext()), flash._attend(q, k, v, MixerContext()), rtol=1e-12, atol=1e-12
    )


def test_the_baseline_rounds_scores_and_probabilities() -> None:
    """The result is nearer to one from probabilities and scores in bf16 than to one from probabilities that are exact."""
    _, stored = pair(torch.bfloat16)
    q, k, v = (torch.randn(1, 40, 4, 16).bfloat16() for _ in range(3))
    out = stored._attend(q, k, v, MixerContext())
    assert out.dtype == torch.bfloat16
    heads = [t.transpose(1, 2).double() for t in (q, k, v)]
    scores = (heads[0] @ heads[1].transpose(-1, -2)).bfloat16().double()
    scaled = (scores / 4).bfloat16().double().masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    p = torch.softmax(scaled, -1)
    exact, rounded = ((t @ heads[2]).transpose(1, 2) for t in (p, p.bfloat16().double()))
    near, far = ((out.double() - value).abs().mean() for value in (rounded.bfloat16().double(), exact.bfloat16().double()))
    assert near < far / 5


@pytest.mark.gpu
def test_autocast_changes_nothing() -> None:
    """On a GPU it would keep probabilities in float32 for the backward pass, which reads them as they were stored."""
    _, stored = pair(torch.bfloat16)
    q, k, v = (torch.randn(1, 40, 4, 16, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    grads = []
    for enabled in (False, True):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            out = stored._attend(q, k, v, MixerContext())
        grads.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- the study

TINY = WeightStudy(steps=6, every=2, dim=32, layers=1, context=32, batch=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{i} times {i % 7} makes {i * (i % 7)} and not {i * i}" for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study(text: Path) -> WeightStudy:
    return dataclasses.replace(TINY, text=str(text))


@pytest.fixture(scope="module")
def done(study: WeightStudy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Event]]:
    out, events = tmp_path_factory.mktemp("study"), list[Event]()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        document = study.run(out, device="cpu", on_event=events.append)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    return out, document, events


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(SavedWeights(folder))


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_arms_differ_in_one_thing_each(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    out, _, _ = done
    facts = {name: json.loads((out / name / "run.json").read_text()) for name in ARMS}
    mixers = {name: " ".join(fact["model"]["mixer_types"]) for name, fact in facts.items()}
    assert mixers == dict.fromkeys(ARMS, BASELINE) | {"flash": "attention"}
    precisions = {name: fact["recipe"]["precision"] for name, fact in facts.items()}
    assert precisions == dict.fromkeys(ARMS, "bf16") | {"fp32": "fp32"}
    assert len({json.dumps(fact["data"]) for fact in facts.values()}) == 1
    assert len({fact["recipe"]["seed"] for fact in facts.values()}) == 1
    starts = {name: same(out / name / "snapshot-0", out / "baseline" / "snapshot-0") for name in ARMS}
    assert starts == dict.fromkeys(ARMS, True) | {"other-init": False}
    ends = {name: same(out / name / "snapshot-6", out / "baseline" / "snapshot-6") for name in ARMS}
    assert ends == dict.fromkeys(ARMS, False) | {"baseline": True, "repeat": True}


def test_snapshots_hold_the_weights_of_their_step(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    out, _, _ = done
    assert list(snapshots(out / "flash")) == [0, 2, 4, 6]
    assert same(out / "flash" / "snapshot-6", out / "flash" / "model")
    assert same(out / "flash" / "snapshot-6", out / "flash" / "checkpoint-6")
    assert not same(out / "flash" / "snapshot-4", out / "flash" / "snapshot-6")
    fresh = training.new_model(vocab_size=260, dim=32, layers=1, heads=2, positions=32, mixer="attention")
    saved = weights(out / "flash" / "snapshot-0")
    assert all(torch.equal(weight, saved[name]) for name, weight in fresh.state_dict().items() if name in saved)


def test_the_result_says_what_was_measured(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    out, document, events = done
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.weights-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    assert report.read_envelope(out / "weights.json") == document
    last = {row["pair"]: row for row in document["rows"] if row["step"] == 6}
    assert all(last["repeat"][metric] == 0 for metric in ("max_abs", "w1", "max_abs_std", "w1_update"))
    assert 0 < last["runs"]["max_abs"] < last["random_init"]["max_abs"]
    assert 0 < last["precision"]["max_abs"] < last["random_init"]["max_abs"]
    assert [entry["step"] for entry in document["significance"]] == [2, 4, 6]
    for metric in ("max_abs", "w1"):
        ratio = document["significance"][-1][metric]
        assert ratio["value"] == pytest.approx(last["runs"][metric] / last["precision"][metric])
    for pair, row in last.items():
        assert max(tensor["max_abs"] for tensor in document["tensors"] if tensor["pair"] == pair) == row["max_abs"]
    assert set(document["losses"]) == set(ARMS)
    assert document["losses"]["repeat"] == document["losses"]["baseline"] != document["losses"]["flash"]
    assert (document["threads"], document["verdict"], document["study"]["steps"]) == (1, None, 6)
    assert {path.name for path in out.iterdir()} == {*ARMS, "study.json", *(f"weights.{kind}" for kind in FILES)}
    steps = [event for event in events if event.kind == "step"]
    assert [event.kind for event in events if event.kind in ("plan", "step")].count("plan") == 1
    total = 5 * 6 * 2 * 32
    assert (steps[0].done, steps[-1].done) == (2 * 2 * 32, total)
    assert {event.total for event in steps} == {total}
    assert [event.done for event in steps] == sorted(event.done for event in steps)


FILES = ("json", "html", "svg", "png")


def stop_at(arm: str, step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.text.startswith(f"{arm}, step {step},"):
            raise KeyboardInterrupt

    return listen


def test_a_study_goes_on_where_it_stopped(
    study: WeightStudy, done: tuple[Path, dict[str, Any], list[Event]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, device="cpu", on_event=stop_at("other-init", 4))
    finished = {name: (tmp_path / name / "train.json").is_file() for name in ARMS}
    assert finished == dict.fromkeys(ARMS, False) | {"baseline": True, "flash": True}
    with pytest.raises(OptionError, match=r"holds a study; go on with resume"):
        study.run(tmp_path, device="cpu")
    with pytest.raises(OptionError, match=r"it was started with steps=6, this call has 8"):
        dataclasses.replace(study, steps=8).run(tmp_path, device="cpu", resume=True)
    times = {name: (tmp_path / name / "train.json").stat().st_mtime_ns for name in ("baseline", "flash")}
    events: list[Event] = []
    document = study.run(tmp_path, device="cpu", resume=True, on_event=events.append)
    assert {name: (tmp_path / name / "train.json").stat().st_mtime_ns for name in times} == times
    plan = next(event for event in events if event.kind == "plan")
    assert (plan.done, plan.total) == (2 * 6 * 64, 5 * 6 * 64)
    assert next(event for event in events if event.kind == "step").text.startswith("other-init")
    assert document["rows"] == done[1]["rows"]
    assert document["tensors"] == done[1]["tensors"]


@pytest.mark.parametrize("change", [{"steps": 0}, {"every": 0}, {"batch": 0}])
def test_refusals(change: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="is not allowed; choose 1 or more"):
        dataclasses.replace(TINY, **change)


def test_snapshots_need_a_distance() -> None:
    with pytest.raises(OptionError, match="every=0 is not allowed"):
        training.SnapshotCallback(0)


# --- the page


def test_the_page_says_what_came_out(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    _, document, _ = done
    section = report.SECTIONS["attnkit.weights/1"].draw(document)
    assert [block.title for block in section.blocks] == [
        "Over steps", "Significance", "Distances at step 6", "Tensors at the last step",
    ]  # fmt: skip
    assert section.lead[-1] == "The same run done again is identical."
    table = section.blocks[2]
    assert isinstance(table, report.Table)
    assert [row[:2] for row in table.rows] == [
        ["attention", "flash"], ["random start", "other-init"], ["precision", "fp32"], ["nothing (repeated)", "repeat"],
    ]  # fmt: skip
    assert table.rows[0][2] == report.number(next(row for row in document["rows"] if row["step"] == 6)["max_abs"])
    page = report.render_html([document])
    assert page.count("<svg") == 2
    assert "Distances of weights at step 6: attention: D_max" in page


@pytest.mark.parametrize(("value", "place"), [(0.19, "outside"), (0.2, "inside"), (0.5, "inside"), (0.51, "outside")])
def test_the_page_says_where_the_significance_lies(
    done: tuple[Path, dict[str, Any], list[Event]], value: float, place: str
) -> None:
    ratio = {"value": value, "low": value - 0.1, "high": value + 0.1}
    document = done[1] | {"significance": [{"step": 6, "max_abs": ratio, "w1": ratio}]}
    lead = report.SECTIONS["attnkit.weights/1"].draw(document).lead
    wanted = f"{value:.2f} ({value - 0.1:.2f} to {value + 0.1:.2f}) of what a change of precision causes, {place} the paper's"
    assert lead[0].startswith(f"Step 6, D_max: {wanted} 0.2 to 0.5; smaller in ")
    count = sum(
        a["max_abs"] < b["max_abs"]
        for a in document["tensors"]
        for b in document["tensors"]
        if (a["pair"], b["pair"], a["name"]) == ("runs", "precision", b["name"])
    )
    assert lead[0].endswith(f"smaller in {count} of {len(document['tensors']) // 4} tensors.")


def test_a_verdict_is_drawn_and_a_repetition_that_differs(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    verdict = {"outcome": "reject", "ratios": {}, "margin": 1.0, "reason": "w1 above 1 times the smaller band"}
    rows = [row | {"max_abs": 0.5} if row["pair"] == "repeat" else row for row in done[1]["rows"]]
    lead = report.SECTIONS["attnkit.weights/1"].draw(done[1] | {"verdict": verdict, "rows": rows}).lead
    assert lead[-2] == "The same run done again differs by 0.500."
    assert lead[-1].startswith("Verdict: reject (w1 above 1 times the smaller band). This bounds how similar")


def test_an_interval_without_an_end_is_drawn(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    ratio = {"value": 0.25, "low": 0.1, "high": None}
    found = [{"step": step, "max_abs": ratio, "w1": ratio} for step in (2, 4)]
    assert "Significance at step 4: D_max 0.250, W1 0.250" in report.render_html([done[1] | {"significance": found}])


def test_a_result_without_rows(done: tuple[Path, dict[str, Any], list[Event]]) -> None:
    assert report.SECTIONS["attnkit.weights/1"].draw(done[1] | {"rows": []}).lead == ["Nothing was compared."]
