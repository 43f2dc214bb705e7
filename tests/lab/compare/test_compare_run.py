import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit import report
from attnkit._core.errors import AttnkitError, InputError, OptionError
from attnkit.lab import compare
from attnkit.lab.compare import METHODS, Event, LoadedModel

QUALITY = ("loss", "loss_low", "loss_high", "passkey_hits", "passkey_trials", "passkey_low", "passkey_high", "agreement", "kl")
COST = ("prefill_s", "decode_tok_s", "peak_mib", "kv_mib")
LENGTH = 448


@pytest.fixture
def run(loaded: LoadedModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A small comparison, its page without figures; arguments replace its own."""
    monkeypatch.setattr(report.page, "_has_matplotlib", lambda: False)

    def call(**arguments: Any) -> dict[str, Any]:
        given = {
            "model": loaded,
            "text": text,
            "lengths": [LENGTH],
            "methods": ["window", "window-decode"],
            "out": tmp_path / "out",
        }
        return compare.run(**{**given, **arguments})

    return call


def quality(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("method", "length", "policy", "trials", *QUALITY)} for row in document["rows"]]


def refusal(call: Callable[[], object], kind: type[AttnkitError]) -> str:
    """The message of an error that must be one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Stop:
    """Interrupts a comparison after some steps, as Ctrl-C does, and counts those it has seen."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.steps, self.events = after, list[str](), list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "step":
            self.steps.append(event.text)
            if len(self.steps) == self.after:
                raise KeyboardInterrupt


def test_one_row_for_each_length_and_method_with_everything_in_it(run: Callable[..., Any]) -> None:
    document = run(lengths=[640, LENGTH], methods=None)
    assert document["schema"] == "attnkit.compare/1"
    default = [method.name for method in METHODS.values() if method.default]
    assert [(row["length"], row["method"]) for row in document["rows"]] == [
        (n, name) for n in (LENGTH, 640) for name in default
    ]
    for row in document["rows"]:
        assert set(row) == {"method", "length", "policy", "trials", "press", "ratio", "codec", "kept", "asked", *QUALITY, *COST}
        assert row["loss_low"] <= row["loss"] <= row["loss_high"]
        assert 0 <= row["passkey_low"] <= row["passkey_hits"] / row["passkey_trials"] <= row["passkey_high"] <= 1
        assert [trial["depth"] for trial in row["trials"]] == [0.1, 0.5, 0.9]
        assert all(row[name] > 0 for name in COST if name != "peak_mib")
        assert row["kl"] >= 0
    assert document["tail"] == LENGTH // 8
    assert document["shared_prefill"] == ["dense", "window-decode"]
    assert document["model"] == "tiny"
    assert (document["device"], document["dtype"], document["seed"]) == ("cpu", "float32", 0)
    assert len(document["text_sha256"]) == 64
    keys = {trial["key"] for row in document["rows"] for trial in row["trials"]}
    assert len(keys) == 2 * 3  # the same for all methods, another for each length and depth


def test_files_hold_what_is_returned(run: Callable[..., Any], tmp_path: Path) -> None:
    document = run(command="attnkit compare --some options")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document
    page = (tmp_path / "out" / "index.html").read_text()
    assert "window-decode" in page
    assert "attnkit compare --some options" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "results.json", "state.json"]


def test_without_out_nothing_is_written(run: Callable[..., Any], tmp_path: Path) -> None:
    assert len(run(out=None)["rows"]) == 3
    assert not (tmp_path / "out").exists()


def test_windows_of_all_lengths_score_the_same_tokens(run: Callable[..., Any], loaded: LoadedModel, text: str) -> None:
    """A model that looks at the last token only has the same losses, whatever the length of the context."""
    for layer in loaded.model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    rows = run(lengths=[LENGTH, 900], methods=["dense"], trials=2)["rows"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def test_methods_read_each_input_in_turn(run: Callable[..., Any]) -> None:
    stop = Stop()
    run(on_event=stop)
    read = [step.rsplit(": ", 1) for step in stop.steps]
    assert [name for place, name in read if "text" in place] == ["dense", "window", "window-decode"]
    asked = [name for place, name in read if "pass-key" in place]
    rotated = ("dense window window-decode", "window window-decode dense", "window-decode dense window")
    assert asked == " ".join(rotated).split()
    places = [place for place, _ in read]
    assert all(len(set(places[i : i + 3])) == 1 for i in range(0, 12, 3))


def test_events_count_from_the_plan_to_the_end(run: Callable[..., Any]) -> None:
    stop = Stop()
    run(on_event=stop)
    assert [event.kind for event in stop.events[:2]] == ["phase", "plan"]
    assert stop.events[1].done == 0
    assert [event.done for event in stop.events if event.kind == "step"] == list(range(1, 13))
    assert {event.total for event in stop.events} == {12}


@pytest.mark.parametrize("after", [1, 2, 7])
def test_an_interrupted_run_resumes_to_the_same_quality(run: Callable[..., Any], tmp_path: Path, after: int) -> None:
    whole = run(out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(on_event=Stop(after))
    assert not (tmp_path / "out" / "results.json").exists()
    rest = Stop()
    resumed = run(resume=True, on_event=rest)
    assert quality(resumed) == quality(whole)
    prefill = {row["method"]: (row["prefill_s"], row["peak_mib"]) for row in resumed["rows"]}
    assert prefill["window-decode"] == prefill["dense"] != prefill["window"]
    assert rest.events[0].done == after
    assert len(rest.steps) == 12 - after


def test_a_finished_comparison_resumes_to_itself_and_is_replaced_without_resume(run: Callable[..., Any]) -> None:
    first, stop = run(), Stop()
    again = run(resume=True, on_event=stop)
    assert again["rows"] == first["rows"]
    assert again["wall_s"] == first["wall_s"]
    assert stop.events == []
    assert run(on_event=stop)["rows"] != first["rows"]
    assert len(stop.steps) == 12


def test_an_unfinished_comparison_is_not_thrown_away(run: Callable[..., Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(on_event=Stop(2))
    message = refusal(run, OptionError)
    assert "unfinished comparison; continue it with resume (--resume)" in message
    assert len(run(resume=True)["rows"]) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "seed=0, this call has 3"),
        ({"lengths": [LENGTH, 640]}, f"lengths={LENGTH}, this call has {LENGTH},640"),
        ({"methods": ["window"]}, "methods=dense,window,window-decode, this call has dense,window"),
        ({"trials": 2}, "trials=1, this call has 2"),
    ],
)
def test_other_arguments_are_not_resumed(run: Callable[..., Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(on_event=Stop(2))
    assert named in refusal(lambda: run(resume=True, **change), OptionError)
    assert len(run(resume=True)["rows"]) == 3


def test_another_text_model_or_version_is_not_resumed(
    run: Callable[..., Any], loaded: LoadedModel, text: str, tmp_path: Path
) -> None:
    run()
    other = LoadedModel("other", loaded.model, loaded.tokenizer)
    assert "model=tiny, this call has other" in refusal(lambda: run(resume=True, model=other), OptionError)
    state = tmp_path / "out" / "state.json"
    state.write_text(state.read_text().replace('"attnkit version": "', '"attnkit version": "9.'))
    assert "attnkit version=9." in refusal(lambda: run(resume=True), OptionError)
    Path(text).write_text(Path(text).read_text() + "The end.")
    run()
    Path(text).write_text(Path(text).read_text() + "Not yet.")
    assert "text_sha256=" in refusal(lambda: run(resume=True), OptionError)


def test_a_damaged_state_is_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ("{", "[]", '{"schema": "attnkit.compare.state/0"}'):
        (tmp_path / "out" / "state.json").write_text(content)
        assert "state.json" in refusal(lambda: run(resume=True), InputError)


def test_a_length_beyond_the_positions_is_a_warning(run: Callable[..., Any], loaded: LoadedModel) -> None:
    loaded.model.config.max_position_embeddings = 500
    stop = Stop()
    run(lengths=[LENGTH, 640], methods=["dense"], on_event=stop)
    warnings = [event.text for event in stop.events if event.kind == "warning"]
    assert warnings == ["length 640 is beyond the 500 positions that the model was made for"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"methods": ["windw"]}, OptionError, "unknown method 'windw'; did you mean 'window'?"),
        ({"lengths": []}, OptionError, "lengths=none is not allowed"),
        ({"lengths": [2048, 32]}, OptionError, "lengths=2048,32 is not allowed; give at least one, each 64 or more"),
        ({"lengths": [128]}, InputError, "length 128 is too short: the pass-key prompt itself takes"),
        ({"lengths": [4096]}, InputError, "length 4096 with 1 trial(s) needs 4,096; give a longer text"),
        ({"trials": 40}, InputError, f"length {LENGTH} with 40 trial(s) needs 2,632; give a longer text"),
        ({"trials": 0}, OptionError, "trials=0 is not allowed"),
        ({"text": "no-such-file.txt"}, OptionError, "text 'no-such-file.txt' is not a file"),
        ({"model": "no-such-model"}, OptionError, "model 'no-such-model' is neither a folder nor a .gguf file"),
        ({"device": "cpu"}, OptionError, "device and dtype are those of the loaded model"),
        ({"resume": True, "out": None}, OptionError, "resume=True needs out"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line_that_names_the_fix(
    run: Callable[..., Any], arguments: dict[str, Any], kind: type[AttnkitError], message: str
) -> None:
    assert message in refusal(lambda: run(**arguments), kind)
