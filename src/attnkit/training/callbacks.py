"""What happens beside training: the log, validation, sealed checkpoints, stopping on a signal, progress."""

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from attnkit._core.errors import OptionError
from attnkit._core.events import Event, Kind
from attnkit._core.files import new_folder
from attnkit.modules import AlphaSchedule, Redrawn
from attnkit.training.checkpoints import seal
from attnkit.training.data.packing import Work
from attnkit.training.evaluate import validate
from attnkit.training.journal import Journal
from attnkit.training.meters import Meters
from attnkit.training.recipe import Recipe
from attnkit.training.work import attention_channels, counted_parameters

__all__ = ["AlphaCallback", "JournalCallback", "RedrawCallback", "SealCallback", "SnapshotCallback", "StopCallback"]

Listener = Callable[[Event], None]


class JournalCallback(TrainerCallback):
    """Writes the log: loss, rate, speed, validation; tells progress in tokens.

    Args:
        data: what is trained on.
        recipe: how.
        out: folder of the run.
        on_event: told what happens.
        validation_rows: rows that a validation reads at most.
    """

    def __init__(self, data: Any, recipe: Recipe, out: Path, *, on_event: Listener, validation_rows: int) -> None:
        self._data, self._recipe, self._on_event = data, recipe, on_event
        self._validation_rows = validation_rows
        self.journal = Journal(out / "log.jsonl")
        self.meters: Meters | None = None
        self._done = self._total = 0
        self._world = 1
        self._before = self._started = 0.0
        self._warned = False
        self._speaks = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin or go on with the log, and say how many tokens are to come."""
        model, self._world = kwargs["model"], args.world_size
        self.meters = Meters(
            args.device, self._recipe.precision,
            parameters=counted_parameters(model), channels=attention_channels(model.config), devices=self._world,
        )  # fmt: skip
        self._speaks = state.is_world_process_zero
        self._done = sum(self._work(step).tokens for step in range(state.global_step))
        self._total = self._done + sum(self._work(step).tokens for step in range(state.global_step, state.max_steps))
        if state.is_world_process_zero:
            self.journal.begin(state.global_step)
        self._before = self.journal.lines[-1]["seconds"] if self.journal.lines else 0.0
        self._started = time.monotonic()
        self._tell("plan", "")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the clock where it stands."""
        assert self.meters is not None
        if not self.meters.running:
            self.meters.step(None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the work of a step."""
        assert self.meters is not None
        work = self._work(state.global_step - 1)
        self.meters.step(work)
        self._done += work.tokens
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One line of the log, with a validation where it is due."""
        if logs is None or "loss" not in logs:
            return  # the Trainer's own summary at the end
        assert self.meters is not None
        line: dict[str, Any] = {"step": state.global_step, "tokens": self._done, "loss": logs["loss"]}
        line |= {"learning_rate": logs["learning_rate"], "grad_norm": logs.get("grad_norm"), **self.meters.mark()}
        line |= {"alpha": logs["alpha"]} if "alpha" in logs else {}
        last = state.global_step >= state.max_steps
        every = self._recipe.validate_every
        if last or (every and state.global_step % every == 0):
            line |= self._validate(kwargs["model"])
            self.meters.pause()
        line["seconds"] = self._before + time.monotonic() - self._started
        if state.is_world_process_zero:
            self.journal.write(line)
        if not math.isfinite(line["loss"]) and not self._warned:
            self._warned = True
            self._tell("warning", f"the loss is {line['loss']} at step {line['step']:,}; stop, and lower the learning rate")
        self._tell("step", _note(line))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saving is no training."""
        assert self.meters is not None
        self.meters.pause()

    def _validate(self, model: Any) -> dict[str, Any]:
        found = validate(model, self._data.validation, limit=self._validation_rows, precision=self._recipe.precision)
        accuracies = {str(length): score.accuracy for length, score in found.scores.items()}
        return {"validation_loss": found.loss} | ({"accuracy": accuracies} if accuracies else {})

    def _work(self, step: int) -> Work:
        return _work(self._data, self._recipe, self._world, step)

    def _tell(self, kind: Kind, text: str) -> None:
        if self._speaks:
            self._on_event(Event(kind, text, self._done, self._total))


class AlphaCallback(TrainerCallback):
    """Moves the alpha of entmax layers along a schedule, by the tokens before each step.

    So the alpha of a step does not depend on where a run was interrupted. The model's configuration follows: checkpoints and
    the saved model hold the alpha that they were left with. Lines of the log say what alpha their last step had.

    Args:
        schedule: where alpha goes.
        data: what is trained on.
        recipe: how. Where it compiles, alpha goes in `LEVELS` jumps, since every new one compiles again.
    """

    LEVELS = 4

    def __init__(self, schedule: AlphaSchedule, data: Any, recipe: Recipe) -> None:
        self._schedule, self._data, self._recipe = schedule, data, recipe
        self._tokens, self._used = 0, schedule.alpha

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the alpha of the first step that is to come."""
        self._tokens = sum(self._work(args, step) for step in range(state.global_step))
        self._set(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the alpha of the next step."""
        self._used = self._schedule.alpha
        self._tokens += self._work(args, state.global_step - 1)
        self._set(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Tell the log, which is written after this."""
        if logs is not None and "loss" in logs:
            logs["alpha"] = self._used

    def _set(self, model: Any) -> None:
        warmup, tokens = self._schedule.warmup_tokens, self._tokens
        if self._recipe.compile and tokens < warmup:
            tokens = tokens * self.LEVELS // warmup * warmup // self.LEVELS
        self._schedule.tokens = tokens
        self._schedule.apply(model)
        model.config.entmax_alpha = self._schedule.alpha

    def _work(self, args: Any, step: int) -> int:
        return _work(self._data, self._recipe, args.world_size, step).tokens


class RedrawCallback(TrainerCallback):
    """Moves the random choices of layers (hashes, dropped rows) on, after every optimiser step or epoch as they ask for."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Those of steps."""
        self._advance(kwargs["model"], "step")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Those of epochs."""
        self._advance(kwargs["model"], "epoch")

    def _advance(self, model: Any, what: str) -> None:
        for part in model.modules():
            if isinstance(part, Redrawn):
                part.advance(what)


class SealCallback(TrainerCallback):
    """Marks checkpoints as complete once every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint of this step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class SnapshotCallback(TrainerCallback):
    """Keeps the weights at the start, every few steps and at the end, as `snapshot-<step>` in the folder of the run.

    Checkpoints are there to go on from, and only the newest stay; snapshots are there to be compared, and all stay. For models
    that are whole on one device.

    Args:
        every: steps between snapshots.
    Raises:
        OptionError: `every` is below 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise OptionError(f"every={every} is not allowed; choose 1 or more")
        self._every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights that training begins with."""
        if state.global_step == 0:
            self._keep(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights where it is time."""
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            self._keep(args, state, kwargs["model"])

    def _keep(self, args: Any, state: Any, model: Any) -> None:
        if state.is_world_process_zero:
            with new_folder(Path(args.output_dir) / f"snapshot-{state.global_step}") as temporary:
                model.save_pretrained(temporary)


class StopCallback(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the present step, with a checkpoint; the second one ends it at once.

    Attributes:
        asked: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop where that was asked for."""
        if self.asked is not None:
            control.should_log = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = number
        self.restore()


def _work(data: Any, recipe: Recipe, world: int, step: int) -> Work:
    """What all devices do in one optimizer step; the dataset's rows are dealt in order."""
    rows = recipe.accumulate * world
    works: list[Work] = [data.train.work(row) for row in range(step * rows, (step + 1) * rows)]
    return sum(works[1:], works[0])


def _note(line: dict[str, Any]) -> str:
    text = f"step {line['step']:,}, loss {line['loss']:.3f}"
    if "validation_loss" in line:
        text += f", validation {line['validation_loss']:.3f}"
    if "accuracy" in line:
        text += ", accuracy " + ", ".join(f"{100 * share:.1f} % at {length}" for length, share in line["accuracy"].items())
    return text
