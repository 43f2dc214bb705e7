"""The monitor: what alarms it, what does not, and that it leaves the run alone."""

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from watched_models import batches, plant_drift, run, tiny

from attnkit._core.errors import CheckFailed, InputError, OptionError, UnsupportedError
from attnkit.lab.numerics import StabilityMonitor
from attnkit.lab.numerics.drift import MIN_SAMPLES, Drift, normal_score
from attnkit.lab.numerics.spectral import SpectralNorms
from attnkit.modules import SoftmaxAttention
from attnkit.ops import attention

FIRST, SECOND = "model.layers.0.mixer", "model.layers.1.mixer"


def mixers(model: Any) -> list[Any]:
    return [layer.mixer for layer in model.model.layers]


# --- alarms


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clean_training_alarms_nobody(seed: int) -> None:
    """Shortened from 2,000 steps to 100, all of them sampled: as many samples as 5,000 steps give at every=50."""
    model = tiny(seed)
    monitor = StabilityMonitor(model, every=1, rows=32)
    losses = run(model, 100, monitor.step, seed=seed)
    monitor.close()
    assert losses[-1] < losses[0]
    assert {event["level"] for event in monitor.events} <= {"watch"}
    assert max(abs(row["z"]) for row in monitor.history if row["step"] >= MIN_SAMPLES) < 5
    assert {row["samples"] for row in monitor.report()["rows"]} == {100}


def test_a_planted_drift_alarms_within_a_hundred_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_drift(monkeypatch, head=2, share=1e-3)
    model = tiny()
    monitor = StabilityMonitor(model, every=1, rows=32)
    run(model, 60, monitor.step)
    monitor.close()
    alarms = [event for event in monitor.events if event["level"] in ("warn", "act")]
    assert {event["layer"] for event in alarms} == {FIRST, SECOND}
    assert all(event["heads"] == [2] for event in alarms)
    rows = {(row["layer"], row["head"]): row for row in monitor.report()["rows"]}
    assert rows[FIRST, 2]["eps_mean"] == pytest.approx(1e-3, rel=0.3)
    assert monitor.level(FIRST) in ("warn", "act")


def test_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_drift(monkeypatch, head=0, share=1e-2)
    model = tiny()
    monitor = StabilityMonitor(model, every=1, action="raise")
    with pytest.raises(CheckFailed, match=rf"{FIRST}, step {MIN_SAMPLES - 1}: level (warn|act), heads 0: eps leans one way"):
        run(model, 60, monitor.step)
    assert all(layer.operator is attention for layer in mixers(model))


def test_switch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    monitor = StabilityMonitor(model, every=1, action="switch")
    plant_drift(monkeypatch, head=1, share=1e-2)
    run(model, 40, monitor.step)
    monitor.close()
    assert [layer.stable for layer in mixers(model)] == ["delta", "delta"]
    assert "stable was 'off' and is 'delta' from here on" in caplog.text
    assert {row["stable"] for row in monitor.report()["rows"]} == {"delta"}


# --- leaving the run alone


@pytest.mark.parametrize("action", ["log", "switch"])
def test_a_watched_run_is_the_same_run(action: Any) -> None:
    plain, watched = tiny(), tiny()
    expected = run(plain, 5)
    monitor = StabilityMonitor(watched, every=2, action=action)
    assert run(watched, 5, monitor.step) == expected
    monitor.close()


def test_nothing_is_installed_between_samples() -> None:
    model = tiny()
    monitor = StabilityMonitor(model, every=3)
    installed = []

    def after() -> None:
        monitor.step()
        installed.append(all(layer.operator is not attention for layer in mixers(model)))

    run(model, 7, after)
    assert installed == [False, False, True, False, False, True, False]
    assert [row["step"] for row in monitor.history if row["layer"] == FIRST] == [0, 3, 6]
    monitor.close()
    assert all(layer.operator is attention for layer in mixers(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    reports = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        monitor = StabilityMonitor(model, every=1)
        run(model, 3, monitor.step)
        monitor.close()
        reports.append(monitor.report()["rows"])
    assert [row["samples"] for row in reports[1]] == [3] * 8
    assert reports[0] == reports[1]


def test_the_first_pass_of_a_step_is_the_one_that_is_looked_at() -> None:
    """Steps that add up the gradients of several batches."""
    found = []
    for passes in (1, 3):
        model, read = tiny(), batches()
        with StabilityMonitor(model, every=1) as monitor:
            for _ in range(passes):
                with torch.autocast("cpu", torch.bfloat16):
                    model(**next(read)).loss.backward()
            monitor.step()
        found.append(monitor.report()["rows"])
    assert found[0] == found[1]
    assert found[0][0]["samples"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's tracer looks at it
def test_compiled_models_run_uncompiled_in_sampled_steps_only() -> None:
    compiled = 0

    def count(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal compiled
            compiled += 1
            return graph(*args)

        return call

    layer = SoftmaxAttention(32, 2, rope=False)
    layer.compile(backend=count)
    monitor = StabilityMonitor(layer, every=3)
    calls = []
    for _ in range(6):
        layer(torch.randn(2, 16, 32)).square().sum().backward()
        monitor.step()
        calls.append(compiled)
    monitor.close()
    gained = [b - a for a, b in zip([0, *calls], calls, strict=False)]
    assert [bool(steps) for steps in gained] == [False, True, True, False, True, True]
    assert {row["samples"] for row in monitor.report()["rows"]} == {2}


def test_two_processes_look_once_and_act_alike(tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, torch\n"
        "import torch.distributed as dist\n"
        "from attnkit.lab.numerics import Probed, StabilityMonitor\n"
        "from attnkit.modules import SoftmaxAttention\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "finish = Probed.finish\n"
        "def planted(self, d_out=None):\n"
        "    self.used.mul_(1.01).sub_(self.true, alpha=0.01).add_(d_out[self.sequences[:, None], self.rows], alpha=0.1)\n"
        "    return finish(self, d_out)\n"
        "Probed.finish = planted\n"
        "torch.manual_seed(0)\n"
        "layer = SoftmaxAttention(32, 2, rope=False)\n"
        "model = torch.nn.parallel.DistributedDataParallel(layer)\n"
        "monitor = StabilityMonitor(model, every=1, action='switch')\n"
        "for step in range(25):\n"
        "    model(torch.randn(2, 16, 32)).square().sum().backward()\n"
        "    monitor.step()\n"
        "print(layer.stable, len(monitor.history))\n"
        "dist.destroy_process_group()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), tmp_path / "meeting"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=60) for process in processes]
    assert [out.split() for out, _ in results] == [["delta", "25"], ["delta", "0"]], results


# --- what is wrong with the run


def test_nan_is_named() -> None:
    model = tiny()
    with torch.no_grad():
        mixers(model)[1].k_proj.weight[0, 0] = torch.nan
    monitor = StabilityMonitor(model, every=1)
    with pytest.raises(InputError, match=f"{SECOND}: k holds NaN or infinities"):
        run(model, 1, monitor.step)
    monitor.close()


def test_gradients_that_overflow_are_left_out() -> None:
    model = tiny()
    monitor = StabilityMonitor(model, every=1)
    handle = mixers(model)[1].o_proj.register_full_backward_pre_hook(lambda part, grads: (grads[0] * torch.inf,))
    run(model, 1, monitor.step)
    monitor.close()
    handle.remove()
    assert {(event["layer"], event["level"]) for event in monitor.events} >= {(SECOND, "left out")}
    assert SECOND not in {row["layer"] for row in monitor.history}


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r"no attnkit\.modules\.SoftmaxAttention layer"):
        StabilityMonitor(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match="every=0"):
        StabilityMonitor(tiny(), every=0)
    with pytest.raises(OptionError, match="rows=0"):
        StabilityMonitor(tiny(), rows=0)
    with pytest.raises(OptionError, match="action='stop'"):
        StabilityMonitor(tiny(), action="stop")  # type: ignore[arg-type]


# --- its parts


def test_the_score_is_that_of_a_normal_distribution() -> None:
    """Student's t from tables: 3.250 with 9 and 4.032 with 5 degrees of freedom are 1 % on two sides, 2.093 with 19 are 5 %."""
    for count, t, expected in ((10, 3.250, 2.576), (20, 2.093, 1.960), (6, 4.032, 2.576)):
        x = torch.linspace(-1, 1, count, dtype=torch.float64)
        x = x / x.std() + t / count**0.5
        assert normal_score(torch.stack([x, -x], 1)).tolist() == pytest.approx([expected, -expected], abs=0.02)
    assert normal_score(torch.zeros(9, 1)).item() == 0
    assert normal_score(torch.ones(1, 1)).item() == 0
    assert normal_score(torch.ones(9, 1, dtype=torch.float64)).item() > 20
    drift = Drift(window=4)
    for value in (9.0, 1.0, -1.0, 1.0, -1.0):
        drift.add(torch.tensor([value], dtype=torch.float64))
    assert drift.total is not None
    assert (drift.total.item(), drift.z().item(), drift.window) == (9.0, 0.0, 4)


def test_spectral_norms_follow_a_matrix_that_moves() -> None:
    torch.manual_seed(0)
    norms, matrix = SpectralNorms(), torch.randn(24, 40)
    for _ in range(20):
        matrix = matrix + 0.02 * torch.outer(torch.ones(24), torch.ones(40))
        found = norms.measure({"w": matrix})["w"]
        assert found == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=0.01)


def test_spectral_norms_of_many_matrices_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two shapes, two or one at a time, some of them newly come."""
    monkeypatch.setattr("attnkit.lab.numerics.spectral._TOGETHER", 2 * 24 * 40)
    torch.manual_seed(0)
    sizes = [(24, 40)] * 5 + [(36, 40)] * 2
    matrices = {f"w{i}": (i + 1) * torch.randn(*size) for i, size in enumerate(sizes)}
    norms = SpectralNorms()
    for names in (["w5", "w0", "w2"], ["w2", "w6", "w1", "w0", "w3", "w5", "w4"]):
        found = norms.measure({name: matrices[name] for name in names})
        assert list(found) == names
    for name, value in found.items():
        assert value == pytest.approx(torch.linalg.matrix_norm(matrices[name], 2).item(), rel=0.02)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    model = tiny()
    monitor = StabilityMonitor(model, every=2)
    run(model, 6, monitor.step)
    monitor.close()
    return monitor.report("attnkit test")


def test_report_follows_its_schema(document: dict[str, Any]) -> None:
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.stability-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    assert len(document["rows"]) == 8
    assert (document["steps"], document["every"], document["command"]) == (6, 2, "attnkit test")


def test_plot(tmp_path: Path) -> None:
    model = tiny()
    monitor = StabilityMonitor(model, every=1)
    monitor.plot(tmp_path / "empty.html")
    assert "No step was looked at" in (tmp_path / "empty.html").read_text()
    run(model, 3, monitor.step)
    monitor.close()
    monitor.plot(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Spectral norm of W_q" in page
    assert f"{SECOND}, head" in page


def test_a_training_that_breaks_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnkit import training
    from attnkit.lab.numerics.callback import StabilityCallback

    torch.compile(lambda x: x, backend="eager")  # loads what would be switched off
    (tmp_path / "text").write_text("\n\n".join(f"paragraph {number}" for number in range(200)))
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))
    data = training.load_text_data(
        str(tmp_path / "text"), training.load_tokenizer("bytes"), row_tokens=32, max_length=32, rows=4
    )
    model = training.new_model(vocab_size=260, dim=32, layers=2, heads=2, positions=32)
    operators = [mixer.operator for mixer in mixers(model)]

    def broken(*args: Any, **options: Any) -> None:
        assert [mixer.operator for mixer in mixers(model)] != operators, "nobody watches"
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(model, "loss_function", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.train(
            model, data, training.Recipe(steps=2), tmp_path / "run", device="cpu", validation_rows=1,
            callbacks=[StabilityCallback(every=1)],
        )  # fmt: skip
    assert [mixer.operator for mixer in mixers(model)] == operators
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_callback(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from attnkit.lab.numerics.callback import StabilityCallback

    rows = [{name: value[0] for name, value in batch.items() if name != "use_cache"} for batch, _ in zip(batches(), range(8))]  # noqa: B905
    callback = StabilityCallback(every=2, rows=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=tiny(), args=arguments, train_dataset=rows, callbacks=[callback]).train()  # type: ignore[arg-type]
    found = json.loads((tmp_path / "stability.json").read_text())
    assert (found["steps"], {row["samples"] for row in found["rows"]}) == (4, {2})
    assert "Stability of attention" in (tmp_path / "stability.html").read_text()
