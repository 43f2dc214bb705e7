"""Whole runs: train, resume, write the result file, its page, the loss curve and the model."""

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.errors import InputError
from attnkit._core.events import Event
from attnkit.modules import AlphaSchedule
from attnkit.report.train_plots import save_curves
from attnkit.training.callbacks import StopCallback
from attnkit.training.checkpoints import last_complete
from attnkit.training.model import quiet_transformers, save_model
from attnkit.training.recipe import Recipe
from attnkit.training.trainer import VALIDATION_ROWS, TrainingData, journal_of, make_trainer

__all__ = ["train"]

RUN_FILE = "run.json"  # what the folder was begun with


def train(
    model: Any,
    data: TrainingData,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    validation_rows: int = VALIDATION_ROWS,
    command: str = "attnkit.training.train(...)",
    on_event: Callable[[Event], None] = lambda event: None,
    alpha: AlphaSchedule | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a model in a folder, or go on where the folder's newest whole checkpoint stands.

    Writes `log.jsonl`, `checkpoint-*`, and at the end `train.json` (schema attnkit.train/1), `index.html`, `loss.svg`,
    `loss.png` (where matplotlib is installed) and `model/`.

    Args:
        model, data, recipe, device, validation_rows, on_event, alpha, callbacks: see `make_trainer`. Callbacks that have a
            method `close` are closed when the training ends, in whatever way.
        out: folder of the run.
        resume: go on; a folder without a whole checkpoint begins anew.
        command: for the result file.
    Returns:
        the result, as written to `train.json`.
    Raises:
        InputError: the folder holds a run and `resume` is off, or a run with another model, data or recipe; a broken
            checkpoint; data that does not fit the model.
        OptionError: a schedule of alpha for a model without entmax.
        KeyboardInterrupt: a signal asked to stop; a checkpoint was written before.
    """
    started = time.monotonic()
    facts = run_facts(model, data, recipe, alpha)
    checkpoint = _check_folder(out, facts, resume)
    trainer = make_trainer(
        model, data, recipe, out,
        device=device, validation_rows=validation_rows, on_event=on_event, alpha=alpha, callbacks=callbacks,
    )  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process has looked at the folder before one of them writes there
    if trainer.is_world_process_zero():
        report.write_json(out / RUN_FILE, facts)
    callback = journal_of(trainer)
    stop = next(found for found in trainer.callback_handler.callbacks if isinstance(found, StopCallback))
    with quiet_transformers():
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            stop.restore()
            for given in callbacks:
                if hasattr(given, "close"):
                    given.close()
    if stop.asked is not None and trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(signal.Signals(stop.asked).name)
    assert callback.meters is not None
    document = report.envelope(
        "attnkit.train/1",
        callback.journal.lines,
        command=command,
        seed=recipe.seed,
        device=device_name(trainer.args.device),
        dtype=recipe.precision,
        wall_s=time.monotonic() - started,
        extra=facts | {"speed": callback.meters.total(), "devices": trainer.args.world_size},
    )
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # every process has a share to give
    if trainer.is_world_process_zero():
        with quiet_transformers():
            save_model(trainer.accelerator.unwrap_model(trainer.model), out / "model", facts, weights)
        _write(out, document)
    return document


def run_facts(model: Any, data: TrainingData, recipe: Recipe, alpha: AlphaSchedule | None) -> dict[str, Any]:
    """What must be the same when a training goes on, as it stands in its files."""
    facts = report.plain({"model": _model_facts(model), "data": data.facts, "recipe": recipe.facts()})
    if alpha is not None:
        facts["alpha"] = {"start": alpha.start, "target": alpha.target, "warmup_tokens": alpha.warmup_tokens}
    assert isinstance(facts, dict)
    return facts


def _check_folder(out: Path, facts: Mapping[str, Any], resume: bool) -> Path | None:
    """Check the folder against the run, and return the checkpoint to go on from."""
    path = out / RUN_FILE
    if not path.is_file():
        if resume and any(out.glob("checkpoint-*")):
            raise InputError(f"{out} has checkpoints but no {RUN_FILE}; it is no run of attnkit train, choose another --out")
        return None
    if not resume:
        raise InputError(f"{out} holds a run already; add --resume to go on with it, or choose another --out")
    changed = _differences(report.plain(_load(path)), facts)
    if changed:
        raise InputError(f"{out} was begun with other settings ({'; '.join(changed)}); repeat them, or choose another --out")
    return last_complete(out)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON; choose another --out") from error


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Leaves that differ, as `recipe.steps: 100, now 200`."""
    if isinstance(before, dict) and isinstance(now, Mapping):
        return [
            line
            for key in sorted({*before, *now})
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name}: {before}, now {now}"]


def _model_facts(model: Any) -> dict[str, Any]:
    config = model.config
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "mixer_types",
        "sparse",
    )  # fmt: skip
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: getattr(config, name) for name in kept if hasattr(config, name)},
    }


def _write(out: Path, document: dict[str, Any]) -> None:
    report.write_json(out / "train.json", document)
    report.write_html(out / "index.html", [document])
    save_curves(out, document)
