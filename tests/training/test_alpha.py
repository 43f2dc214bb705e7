"""Alpha on its way in training: along the schedule, in the log, in what is saved, and the same after an interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training_examples import text_data, tiny

from attnkit import training
from attnkit._core.errors import InputError, OptionError
from attnkit._core.events import Event
from attnkit.cli import main
from attnkit.modules import AlphaSchedule
from attnkit.training.callbacks import AlphaCallback

STEPS, TOKENS = 8, 128


def entmax(mixer: str = "entmax") -> Any:
    return training.new_model(vocab_size=260, dim=32, layers=1, heads=2, positions=64, mixer=mixer, seed=0)


def run(text: Path, out: Path, *, resume: bool = False, warmup: int = 4, model: Any = None, **options: Any) -> dict[str, Any]:
    recipe = training.Recipe(steps=STEPS, learning_rate=3e-3, log_every=1, save_every=3)
    schedule = AlphaSchedule(1.5, warmup_tokens=warmup * TOKENS)
    data = text_data(text, rows=STEPS, row_tokens=TOKENS)
    return training.train(model or entmax(), data, recipe, out, resume=resume, device="cpu", alpha=schedule, **options)


def test_every_step_has_the_alpha_of_its_place(text: Path, tmp_path: Path) -> None:
    document = run(text, tmp_path / "run")
    assert [row["alpha"] for row in document["rows"]] == [1.0, 1.125, 1.25, 1.375, 1.5, 1.5, 1.5, 1.5]
    assert document["alpha"] == {"start": 1.0, "target": 1.5, "warmup_tokens": 512}
    saved = training.load_model(tmp_path / "run")[0]
    assert saved.config.entmax_alpha == saved.model.layers[0].mixer.alpha == 1.5


def test_the_first_steps_are_those_of_softmax(text: Path, tmp_path: Path) -> None:
    """The log does not only name the alpha: at 1 the losses are a softmax model's, and later they are not."""
    rows = run(text, tmp_path / "run")["rows"]
    recipe = training.Recipe(steps=STEPS, learning_rate=3e-3, log_every=1)
    plain = training.train(tiny(), text_data(text, rows=STEPS, row_tokens=TOKENS), recipe, tmp_path / "soft", device="cpu")
    assert rows[0]["loss"] == pytest.approx(plain["rows"][0]["loss"], rel=1e-6)
    assert rows[-1]["loss"] != pytest.approx(plain["rows"][-1]["loss"], rel=1e-6)


def test_an_interrupted_run_goes_on_with_its_alpha(text: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.text.startswith("step 5,"):
            raise RuntimeError("the machine goes off here")

    whole = run(text, tmp_path / "whole", warmup=6)["rows"]
    with pytest.raises(RuntimeError, match="goes off"):
        run(text, tmp_path / "broken", warmup=6, on_event=stop)
    broken = run(text, tmp_path / "broken", warmup=6, resume=True)["rows"]
    names = ("step", "alpha", "loss", "grad_norm")
    assert [[row[name] for name in names] for row in broken] == [[row[name] for name in names] for row in whole]
    first, second = (training.load_model(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match=r"alpha.warmup_tokens: 768, now 256"):
        run(text, tmp_path / "broken", warmup=2, resume=True)


def test_a_compiled_model_sees_few_alphas(text: Path, tmp_path: Path) -> None:
    model, schedule = entmax(), AlphaSchedule(1.5, warmup_tokens=100 * TOKENS)
    data = text_data(text, rows=120, row_tokens=TOKENS)
    recipe = training.Recipe(steps=120, compile=True)
    callback = AlphaCallback(schedule, data, recipe)
    args, state = type("Args", (), {"world_size": 1}), type("State", (), {"global_step": 0})
    callback.on_train_begin(args, state, None, model=model)
    seen = [model.model.layers[0].mixer.alpha]
    for step in range(1, 121):
        state.global_step = step
        callback.on_step_end(args, state, None, model=model)
        seen.append(model.model.layers[0].mixer.alpha)
    assert sorted(set(seen)) == [1.0, 1.125, 1.25, 1.375, 1.5]
    assert [seen.index(alpha) for alpha in sorted(set(seen))] == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("mixer", ["attention", "hash_sparse_attention"])
def test_models_without_entmax_are_refused(text: Path, tmp_path: Path, mixer: str) -> None:
    with pytest.raises(OptionError, match="has no EntmaxAttention layer"):
        run(text, tmp_path / "run", model=entmax(mixer))


def test_the_command_continues_a_softmax_model(text: Path, tmp_path: Path) -> None:
    def train(out: str, *more: object) -> Any:
        line = [
            "train", "lm", "--text", text, "--context", 32, "--batch", 4, "--tokens", 512, "--dim", 32, "--heads", 2,
            "--layers", 1, "--device", "cpu", "--out", tmp_path / out, *more,
        ]  # fmt: skip
        return CliRunner().invoke(main, [str(part) for part in line])

    assert train("soft").exit_code == 0
    done = train("ent", "--mixer", "entmax", "--init", tmp_path / "soft", "--alpha-schedule", "1:1.25:2", "--lr", "1e-9")
    assert done.exit_code == 0, done.output
    before, after = (training.load_model(tmp_path / name)[0] for name in ("soft", "ent"))
    assert after.config.entmax_alpha == 1.25
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs), "the weights are those of the softmax model"
    other = train("other", "--mixer", "hash_sparse_attention:qk_shared=true", "--init", tmp_path / "soft")
    assert other.exit_code == 4
    assert "that model has other parameters" in other.stderr
    wrong = train("wrong", "--alpha-schedule", "1:1.5")
    assert wrong.exit_code == 2
    assert "write START:TARGET:STEPS" in wrong.stderr
