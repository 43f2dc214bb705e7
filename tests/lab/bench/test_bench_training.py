"""The race of training on a tiny model: what both sides have in common, what is compared, what is written."""

import copy
import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import Trainer

from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit._core.events import Event
from attnkit.lab import bench
from attnkit.lab.bench.training import lap, rows
from attnkit.lab.bench.training.sides import PEER, SIDES, Setup, initial_llama, make_recipe
from attnkit.models import PRESETS
from attnkit.training.work import attention_channels, counted_parameters, training_flops

CPU = torch.device("cpu")
CONTEXT, BATCH, STEPS = 32, 2, 8
Make = Callable[[Setup, Path], Trainer]


def config(**sizes: Any) -> Any:
    return PRESETS["decoder-tiny"](**sizes)


def setup(form: str = "packed", compiled: bool = False) -> Setup:
    tokens = rows.random_tokens(STEPS * BATCH * CONTEXT, 64, CONTEXT, seed=0)
    data = rows.make_data(tokens, form, batch=BATCH, context=CONTEXT, steps=STEPS, seed=0)
    recipe = make_recipe(steps=STEPS, precision="fp32", seed=0, compiled=compiled)
    return Setup(initial_llama(config(), 0), recipe, CPU, data)


def race(**options: Any) -> dict[str, Any]:
    return bench.run_training(config(), **{"context": CONTEXT, "batch": BATCH, "steps": STEPS, **options})


def test_a_race_writes_rows_of_the_schema_and_a_page(tmp_path: Path) -> None:
    events: list[Event] = []
    document = race(out=tmp_path, on_event=events.append, seed=3)
    schema = json.loads(resources.files("attnkit.report").joinpath("schemas", "attnkit.race-1.json").read_text("utf-8"))
    jsonschema.validate(document, schema)
    assert json.loads((tmp_path / "training.json").read_text()) == document
    page = (tmp_path / "training.html").read_text()
    assert all(text in page for text in ("Race: training", "Tokens a second", "Losses over steps"))
    assert [row["shape"]["form"] for row in document["rows"]] == ["rows", "packed"] == document["finished"]
    assert (document["complete"], document["skipped"], document["seed"], document["device"]) == (True, [], 3, "cpu")
    assert {"torch", "transformers", "accelerate"} <= document["versions"].keys()
    for row in document["rows"]:
        assert row["loss_difference"] <= 1e-6
        assert len(row["losses"]) == len(row["peer_losses"]) == STEPS
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        assert row["tokens_s"] * row["ours_ms"] == pytest.approx(1e3 * BATCH * CONTEXT)
        assert row["peer_tokens_s"] * row["peer_ms"] == pytest.approx(1e3 * BATCH * CONTEXT)
        assert row["tflops"] / row["peer_tflops"] == pytest.approx(row["ratio"])
        assert row["mfu"] is None
    whole, packed = document["rows"]
    model = initial_llama(config(), 0)
    work = rows.Work(BATCH * CONTEXT, 0, BATCH * CONTEXT**2)
    flops = training_flops(counted_parameters(model), attention_channels(model.config), work)
    assert whole["tflops"] * whole["ours_ms"] * 1e9 == pytest.approx(flops)
    assert packed["tflops"] * packed["ours_ms"] < whole["tflops"] * whole["ours_ms"], "short sequences attend to less"
    assert "note" not in whole
    assert "writes the mask out" in packed["note"]
    assert [(event.kind, event.done) for event in events if event.kind != "phase"] == [("plan", 0), ("step", 1), ("step", 2)]


def test_both_sides_have_the_same_arguments_weights_optimizer_and_data(tmp_path: Path) -> None:
    begin = setup()
    trainers = {side: make(begin, tmp_path) for side, make in SIDES.items()}
    ours, theirs = trainers.values()
    assert type(ours) is type(theirs) is Trainer
    arguments = [trainer.args.to_dict() for trainer in (ours, theirs)]
    apart = {name for name in arguments[0] if arguments[0][name] != arguments[1][name]}
    assert apart <= {"tf32", "save_steps", "save_total_limit", "ddp_find_unused_parameters"}, "one GPU, and nothing is saved"
    assert theirs.model.config._attn_implementation == "sdpa"
    groups = []
    for trainer in (ours, theirs):
        trainer.create_optimizer()
        groups.append(
            [(sorted(p.numel() for p in group["params"]), group["weight_decay"]) for group in trainer.optimizer.param_groups]
        )
    assert groups[0] == groups[1]
    sums = [sorted(p.detach().double().abs().sum().item() for p in trainer.model.parameters()) for trainer in (ours, theirs)]
    assert sums[0] == sums[1]
    for step in range(STEPS):
        mine, other = (trainer.train_dataset[step] for trainer in (ours, theirs))
        assert other.keys() == {"input_ids", "labels", "position_ids"}
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_neither_side_changes_what_both_begin_with() -> None:
    begin = setup()
    before = copy.deepcopy(begin.llama.state_dict())
    first, again = (lap.run_lap(SIDES[PEER], begin, 1) for _ in range(2))
    lap.run_lap(SIDES[bench.OWN], begin, 1)
    assert first.losses == again.losses
    assert all(torch.equal(before[name], value) for name, value in begin.llama.state_dict().items())
    assert first.tokens == (STEPS - 1) * BATCH * CONTEXT


def other_recipe(**changes: Any) -> Callable[[Setup], Setup]:
    return lambda begin: dataclasses.replace(begin, recipe=dataclasses.replace(begin.recipe, **changes))


def swapped(begin: Setup) -> Setup:
    llama = copy.deepcopy(begin.llama)
    for layer in llama.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    return dataclasses.replace(begin, llama=llama)


def borderless(begin: Setup) -> Setup:
    batches = begin.data.train.only("input_ids", "labels")
    return dataclasses.replace(begin, data=dataclasses.replace(begin.data, train=batches))


@pytest.mark.parametrize(
    ("wrong", "precision"),
    [
        (swapped, "fp32"),
        (borderless, "bf16"),
        (other_recipe(learning_rate=1.1e-3), "bf16"),
        (other_recipe(weight_decay=0.0), "fp32"),
        (other_recipe(seed=1, clip=0.0), "fp32"),
    ],
    ids=["weights swapped", "borders lost", "learning rate", "weight decay", "clipping"],
)
def test_a_peer_that_computes_something_else_is_not_timed(
    wrong: Callable[[Setup], Setup], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, runs = SIDES[PEER], 0

    def make(begin: Setup, out: Path) -> Trainer:
        nonlocal runs
        runs += 1
        return right(wrong(begin), out)

    monkeypatch.setitem(SIDES, PEER, make)
    document = race(forms=["packed"], precision=precision, steps=12, context=64, batch=4)
    assert document["rows"] == []
    (entry,) = document["skipped"]
    assert (entry["peer"], entry["shape"]["form"], entry["pass"]) == ("attnkit", "packed", "step")
    assert entry["reason"].startswith("the losses of both sides differ: in step ")
    assert runs == 1


def test_a_side_that_goes_on_where_it_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, kept = SIDES[PEER], []

    def make(begin: Setup, out: Path) -> Trainer:
        trainer = right(begin, out)
        if kept:
            trainer.model.load_state_dict(kept[-1].model.state_dict())
        kept.append(trainer)
        return trainer

    monkeypatch.setitem(SIDES, PEER, make)
    (entry,) = race(forms=["rows"])["skipped"]
    assert entry["peer"] == PEER
    assert entry["reason"].startswith("its mean loss is ")
    assert "in round 1 and was" in entry["reason"]


@pytest.mark.parametrize(("side", "forms"), [(bench.OWN, ["packed"]), (PEER, ["rows", "packed"])])
def test_a_side_that_breaks_is_listed_and_does_not_end_the_race(
    side: str, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SIDES[side]

    def make(begin: Setup, out: Path) -> Trainer:
        if "position_ids" in begin.data.train[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return right(begin, out)

    monkeypatch.setitem(SIDES, side, make)
    document = race(forms=forms)
    assert [row["shape"]["form"] for row in document["rows"]] == forms[:-1]
    assert document["finished"] == forms
    assert [(entry["peer"], entry["reason"]) for entry in document["skipped"]] == [(side, "out of memory")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forms": ["row"]}, OptionError, "forms='row' is not allowed"),
        ({"forms": []}, OptionError, "forms='' is not allowed"),
        ({"precision": "fp16"}, OptionError, "precision='fp16' is not allowed"),
        ({"context": 1}, OptionError, "context=1 is not allowed; choose 2 or more"),
        ({"batch": 0}, OptionError, "batch=0 is not allowed; choose 1 or more"),
        ({"steps": 3}, OptionError, "steps=3 is not allowed; choose 4 or more"),
        ({"rounds": 2}, OptionError, "rounds=2 is not allowed; choose 3 or more"),
        ({"text": "absent.txt"}, InputError, "text 'absent.txt' is not a file"),
        ({"context": 1024}, InputError, "sequences of 1024 tokens, and the model 512 positions"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        race(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_llama_is_not_is_refused() -> None:
    sliding = config(mixer_types="sliding_attention", sliding_window=8)
    with pytest.raises(UnsupportedError, match=r"mixer_types=.* is no Llama's"):
        bench.run_training(sliding, context=CONTEXT, batch=BATCH)


def test_several_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match=r"2 GPUs are visible.*set CUDA_VISIBLE_DEVICES"):
        race(device="cuda")


def test_random_tokens_are_documents_of_all_lengths() -> None:
    tokens = rows.random_tokens(20_000, 50, 256, seed=1)
    sizes = np.diff(tokens.spans, axis=1)[:, 0]
    assert 20_000 <= sizes.sum() == len(tokens.ids) < 20_000 + 256
    assert tokens.spans[0, 0] == 0
    assert (tokens.spans[1:, 0] == tokens.spans[:-1, 1]).all()
    assert 16 <= sizes.min() < 24
    assert 200 < sizes.max() <= 256
    assert set(np.unique(tokens.ids)) == set(range(50))
    again, other = rows.random_tokens(20_000, 50, 256, seed=1), rows.random_tokens(20_000, 50, 256, seed=2)
    assert (tokens.ids == again.ids).all()
    assert len(tokens.ids) != len(other.ids) or (tokens.ids != other.ids).any()


def test_a_text_is_cut_into_rows_without_borders_and_packed_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {number}" for number in range(40)), encoding="utf-8")
    tokens = rows.load_tokens(str(path), on_phase=lambda text: None)
    assert tokens.vocab_size == 260
    sizes = {"batch": 4, "context": 16, "steps": 20, "seed": 0}
    whole, packed = (rows.make_data(tokens, form, **sizes) for form in rows.FORMS)
    stream = torch.cat([whole.train[step]["input_ids"].flatten() for step in range(20)])
    assert stream.tolist() == np.resize(tokens.ids, 20 * 64).tolist(), "begins again where it ends"
    assert whole.train[0].keys() == {"input_ids", "labels"}
    assert whole.train[0]["input_ids"].shape == (4, 16)
    assert packed.train[0]["input_ids"].shape == (1, 64)
    assert int(packed.train[0]["cu_seq_lens_q"][-1]) == packed.train.work(0).tokens == 64
    assert (len(whole.train), len(packed.validation)) == (20, 0)


def test_both_sides_are_compiled_or_none(tmp_path: Path) -> None:
    for compiled in (True, False):
        ours, theirs = (make(setup(compiled=compiled), tmp_path) for make in SIDES.values())
        assert [layer._compiled_call_impl is not None for layer in ours.model.model.layers] == [compiled] * 2
        assert (ours.args.torch_compile, theirs.args.torch_compile) == (False, compiled)
        assert all(layer._compiled_call_impl is None for layer in theirs.model.model.layers)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, which it means to hide
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_in_bf16_losses_agree_and_rates_are_counted(compiled: bool) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "vocab_size": 1024}
    document = bench.run_training(config(**sizes), context=512, batch=4, device="cuda", compiled=compiled)
    assert [each["reason"] for each in document["skipped"]] == []
    assert [row["dtype"] for row in document["rows"]] == ["bfloat16"] * 2
    for row in document["rows"]:
        assert row["loss_difference"] <= 1e-3
        assert row["peak_mib"] > 10
        assert row["first_call_s"] is None or row["first_call_s"] > 0
    assert torch.backends.cuda.matmul.allow_tf32 is False, "what transformers sets must not reach others"
