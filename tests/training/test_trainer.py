"""The trainer: what it refuses, how the loss is normalised, schedule, meters, results."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from training_examples import text_data, tiny
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from attnkit import report, training
from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit._core.events import Event
from attnkit.models import AttnkitDecoderConfig
from attnkit.training.data import IGNORED, Work
from attnkit.training.meters import Meters
from attnkit.training.work import attention_channels, counted_parameters, peak_flops, training_flops


def test_it_is_a_plain_trainer(text: Path, tmp_path: Path) -> None:
    trainer = training.make_trainer(tiny(), text_data(text, rows=4), training.Recipe(steps=4), tmp_path, device="cpu")
    assert type(trainer) is Trainer
    trainer.create_optimizer()
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert trainer.optimizer.defaults["fused"]
    decayed, free = trainer.optimizer.param_groups
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_the_loss_is_a_mean_over_real_targets_of_all_rows_of_a_step(text: Path, tmp_path: Path) -> None:
    data = text_data(text, rows=2, row_tokens=96, max_length=17)
    counts = [data.train.work(row).targets for row in range(2)]
    assert counts[0] != counts[1], "the rows must differ for the test to tell a mean of means from a mean"
    model = tiny()
    with torch.no_grad():
        nats = sum(model(**data.train[row], num_items_in_batch=1).loss.item() for row in range(2))
    result = training.train(model, data, training.Recipe(steps=1, accumulate=2), tmp_path / "run", device="cpu")
    assert result["rows"][0]["loss"] == pytest.approx(nats / sum(counts), rel=1e-5)


def test_the_rate_rises_stays_and_falls(text: Path, tmp_path: Path) -> None:
    recipe = training.Recipe(steps=20, learning_rate=0.5e-3, warmup=0.2, decay=0.25, log_every=1)
    result = training.train(tiny(), text_data(text, rows=20), recipe, tmp_path / "run", device="cpu")
    rates = [row["learning_rate"] / 0.5e-3 for row in result["rows"]]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[4:16] == pytest.approx([1] * 12)
    assert rates[15:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_bf16_keeps_weights_and_optimizer_in_fp32(text: Path, tmp_path: Path) -> None:
    model = tiny()
    recipe = training.Recipe(steps=2, precision="bf16")
    trainer = training.make_trainer(model, text_data(text, rows=2), recipe, tmp_path, device="cpu")
    seen: list[torch.dtype] = []
    model.model.layers[0].mixer.q_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    states = list(trainer.optimizer.state.values())
    assert states
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, which it means to hide
def test_compiled_blocks_share_one_graph_and_train_alike(text: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    rows = [line["loss"] for line in _losses_of_three_layers(text, tmp_path / "plain", compile=False)]
    torch._dynamo.utils.counters.clear()
    compiled = [line["loss"] for line in _losses_of_three_layers(text, tmp_path / "compiled", compile=True)]
    assert compiled == pytest.approx(rows, rel=1e-5)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    )  # block and loss, for the first row and for rows of any number of sequences
    assert not torch._dynamo.utils.counters["graph_break"]


def _losses_of_three_layers(text: Path, out: Path, *, compile: bool) -> list[dict[str, Any]]:
    model = training.new_model(vocab_size=260, dim=32, layers=3, heads=2, positions=64)
    names = list(model.state_dict())
    chosen = training.Recipe(steps=4, log_every=1, compile=compile)
    result = training.train(model, text_data(text, rows=4), chosen, out, device="cpu")
    assert list(model.state_dict()) == names
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def test_a_result_follows_its_schema_and_is_drawn(text: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = training.Recipe(steps=8, log_every=2, validate_every=4)
    out = tmp_path / "run"
    result = training.train(tiny(), text_data(text, rows=8), recipe, out, device="cpu", on_event=events.append)
    stored = json.loads((out / "train.json").read_text("utf-8"))
    assert stored == result
    folder = Path(report.__file__).parent / "schemas"
    schema = json.loads((folder / "attnkit.train-1.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(stored, schema)
    del stored["rows"][0]["loss"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stored, schema)
    assert [row["step"] for row in result["rows"]] == [2, 4, 6, 8]
    assert [row["step"] for row in result["rows"] if "validation_loss" in row] == [4, 8]
    assert result["rows"][-1]["tokens"] == 8 * 128
    page = (out / "index.html").read_text("utf-8")
    assert "Training: " in page
    assert "<svg" in page
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (out / "loss.svg").read_text("utf-8")
    assert (events[0].kind, events[0].done, events[0].total) == ("plan", 0, 1024)
    assert [event.done for event in events if event.kind == "step"] == [256, 512, 768, 1024]


def test_a_loss_that_is_no_number_is_told_and_drawn(text: Path, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    events: list[Event] = []
    recipe = training.Recipe(steps=4, log_every=2)
    result = training.train(model, text_data(text, rows=4), recipe, tmp_path, device="cpu", on_event=events.append)
    assert [row["loss"] for row in result["rows"]] == [None, None]
    (warning,) = [event.text for event in events if event.kind == "warning"]
    assert warning == "the loss is nan at step 2; stop, and lower the learning rate"
    assert (tmp_path / "index.html").is_file()


def test_training_lowers_the_loss_and_scores_are_exact(tmp_path: Path) -> None:
    task = training.TASKS["copy"](alphabet=4)
    data = training.TaskData.make(task, [5, 7], row_tokens=256, rows=80, seed=0, validation_rows=1)
    recipe = training.Recipe(steps=80, learning_rate=1e-2)
    result = training.train(tiny(vocab_size=5, positions=7), data, recipe, tmp_path / "run", device="cpu")
    assert result["rows"][-1]["loss"] < 0.8 * result["rows"][0]["loss"]
    assert set(result["rows"][-1]["accuracy"]) == {"5", "7"}
    model, facts = training.load_model(tmp_path / "run")
    assert facts["data"]["task"] == "copy"
    found = training.validate(model, data.validation)
    assert {str(length): score.accuracy for length, score in found.scores.items()} == result["rows"][-1]["accuracy"]
    assert found.loss == pytest.approx(result["rows"][-1]["validation_loss"], rel=1e-6)


def test_validation_is_a_mean_over_targets(text: Path) -> None:
    model, data = tiny(), text_data(text, rows=1, row_tokens=50, max_length=50)
    found = training.validate(model, data.validation)
    with torch.no_grad():
        nats = [model(**data.validation[row], num_items_in_batch=1).loss.item() for row in range(len(data.validation))]
    assert found.targets == sum(int((data.validation[row]["labels"] != IGNORED).sum()) for row in range(len(data.validation)))
    assert found.loss == pytest.approx(sum(nats) / found.targets, rel=1e-5)
    assert training.validate(model, data.validation, limit=2).targets < found.targets
    assert model.training  # as it was before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "precision='fp16' is not allowed"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"learning_rate": 0.0}, "choose a positive number"),
        ({"warmup": 0.9, "decay": 0.2}, "together at most 1"),
        ({"save_every": 15}, "must be 0 or a multiple of log_every=10"),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        training.Recipe(**{"steps": 10} | changes)


def test_data_that_does_not_fit(text: Path, tmp_path: Path) -> None:
    data = text_data(text, rows=4)
    with pytest.raises(InputError, match="sequences of 32 tokens, and the model 16 positions"):
        training.make_trainer(tiny(positions=16), data, training.Recipe(steps=4), tmp_path, device="cpu")
    with pytest.raises(InputError, match="260 token ids, and the model a vocabulary of 100"):
        training.make_trainer(tiny(vocab_size=100), data, training.Recipe(steps=4), tmp_path, device="cpu")
    with pytest.raises(InputError, match="make the data with rows=10"):
        training.make_trainer(tiny(), data, training.Recipe(steps=5, accumulate=2), tmp_path, device="cpu")
    with pytest.raises(UnsupportedError, match="max_steps: exact resuming rests on these"):
        training.make_trainer(tiny(), data, training.Recipe(steps=4), tmp_path, device="cpu", options={"max_steps": 3})


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished model"):
        training.load_model(tmp_path)
    with pytest.raises(OptionError, match="dim=30 is no multiple of heads=4"):
        training.new_model(vocab_size=8, dim=30, layers=1, heads=4, positions=8)
    with pytest.raises(OptionError, match="unknown mixer"):
        training.new_model(vocab_size=8, dim=32, layers=1, heads=2, positions=8, mixer="atention")
    sizes = {"vocab_size": 8, "dim": 32, "layers": 1, "heads": 2, "positions": 8}
    model = training.new_model(**sizes, mixer="hash_sparse_attention:num_buckets=4:qk_shared=true:resample=never")
    mixer = model.model.layers[0].mixer
    assert (mixer.num_buckets, mixer.temperature is None, mixer.hasher.resample) == (4, False, "never")
    with pytest.raises(OptionError, match="'buckets'; it has qk_shared, num_buckets"):
        training.new_model(**sizes, mixer="hash_sparse_attention:buckets=4")
    with pytest.raises(OptionError, match="'attention' takes no options"):
        training.new_model(**sizes, mixer="attention:window=4")


def test_operations_are_counted_by_document() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=16
    )
    model = LlamaForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert counted_parameters(model) == total - 50 * 32
    assert attention_channels(config) == 3 * 2 * 16
    hybrid = AttnkitDecoderConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=3, sliding_window=4,
        mixer_types=["attention", "sliding_attention", "attention_nope"],
    )  # fmt: skip
    assert attention_channels(hybrid) == 2 * 2 * 16
    assert training_flops(1000, 96, Work(tokens=30, targets=28, squares=500)) == 6 * 1000 * 30 + 12 * 96 * 500 / 2
    tied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    assert counted_parameters(tied) == sum(parameter.numel() for parameter in tied.parameters())
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_meters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 4.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meters = Meters(torch.device("cpu"), "fp32", parameters=10, channels=0)
    work = Work(tokens=30, targets=29, squares=900)
    meters.step(None)
    for _ in range(3):
        meters.step(work)
    first = meters.mark()
    assert first["tokens_s"] == pytest.approx(90 / 4)
    assert (first["step_ms_p50"], first["mfu"]) == (1000.0, None)
    assert first["step_ms_p95"] == pytest.approx(1900.0)
    assert first["tflops"] == pytest.approx(6 * 10 * 90 / 4 / 1e12)
    meters.pause()  # 96 s of validation
    assert not meters.running
    meters.step(None)
    meters.step(work)
    assert meters.mark()["tokens_s"] == pytest.approx(30.0)
    total = meters.total()
    assert total["tokens_s"] == pytest.approx(120 / 5)
    assert total["peak_mib"] is not None
    assert total["peak_mib"] > 50
    assert math.isfinite(total["peak_mib"])
    assert meters.mark()["tokens_s"] is None
