"""One run of one side: `Trainer.train()` from the initial weights, with a stopwatch beside it."""

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from attnkit.lab.bench.training.rows import Batches
from attnkit.lab.bench.training.sides import Setup
from attnkit.lab.compare.measure import PeakMemory, clock
from attnkit.training.meters import Meters
from attnkit.training.model import quiet_transformers
from attnkit.training.work import attention_channels, counted_parameters

__all__ = ["Lap", "run_lap"]


@dataclass(frozen=True)
class Lap:
    """What came out of one run.

    Attributes:
        losses: one a line of the log: means over the steps since the line before.
        seconds: of the steps that count.
        tokens, flops: in those steps.
        first_s: seconds of the first step, with what it compiles.
        peak_mib: largest memory of the run: weights, gradients, optimizer, activations; None where the system does not tell.
    """

    losses: list[float]
    seconds: float
    tokens: int
    flops: float
    first_s: float
    peak_mib: float | None


class _Stopwatch(TrainerCallback):
    """Times the steps after `skipped` ones, on the device."""

    def __init__(self, batches: Batches, precision: str, skipped: int) -> None:
        self._batches, self._precision, self._skipped = batches, precision, skipped
        self._began = self.first_s = 0.0
        self.meters: Meters | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is on its device."""
        model = kwargs["model"]
        sizes = {"parameters": counted_parameters(model), "channels": attention_channels(model.config)}
        self.meters = Meters(args.device, self._precision, **sizes)
        self._began = clock(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or count a step."""
        assert self.meters is not None
        step = state.global_step
        if step == 1:
            self.first_s = clock(args.device) - self._began
        if step >= self._skipped:
            self.meters.step(None if step == self._skipped else self._batches.work(step - 1))


def run_lap(make: Callable[[Setup, Path], Trainer], setup: Setup, skipped: int) -> Lap:
    """Train once.

    Args:
        make: the side, one of `SIDES`.
        setup: what it trains, and on what.
        skipped: steps that do not count, at least 1.
    """
    if setup.recipe.compile:
        torch.compiler.reset()  # a side must not find its code, or its limit of recompilations, used up by the one before
    gc.collect()  # what earlier runs left
    device = setup.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    watch = _Stopwatch(setup.data.train, setup.recipe.precision, skipped)
    with tempfile.TemporaryDirectory(prefix="attnkit-race-") as folder, quiet_transformers(), PeakMemory(device) as peak:
        trainer = make(setup, Path(folder))
        trainer.add_callback(watch)
        trainer.train()
    assert watch.meters is not None
    watch.meters.mark()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Lap(losses, watch.meters.seconds, watch.meters.tokens, watch.meters.flops, watch.first_s, peak.mib)
