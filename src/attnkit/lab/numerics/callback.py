"""The monitor as a callback of transformers' Trainer."""

from pathlib import Path
from typing import Any

from attnkit import report
from attnkit._core.lazy import require
from attnkit.lab.numerics.monitor import Action, StabilityMonitor

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers import TrainerCallback  # noqa: E402

__all__ = ["StabilityCallback"]


class StabilityCallback(TrainerCallback):
    """Runs a `StabilityMonitor` over a training; at its end writes stability.json and stability.html.

    A run that goes on from a checkpoint begins its statistics anew. The Trainer does not tell callbacks that a run broke off:
    call `close` then. `attnkit.training.train` does.

    Args:
        every, rows, action: see `StabilityMonitor`.
        out: folder for the two files; None means the Trainer's output folder.

    Attributes:
        monitor: of the run; None before it begins.
    """

    def __init__(self, every: int = 50, rows: int = 64, action: Action = "log", *, out: Path | None = None) -> None:
        self.monitor: StabilityMonitor | None = None
        self._settings, self._out = (every, rows, action), out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self.monitor = StabilityMonitor(kwargs["model"], *self._settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the step, if it was sampled."""
        assert self.monitor is not None
        self.monitor.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was found."""
        assert self.monitor is not None
        self.close()
        if state.is_world_process_zero:
            out = self._out or Path(args.output_dir)
            report.write_json(out / "stability.json", self.monitor.report())
            self.monitor.plot(out / "stability.html")

    def close(self) -> None:
        """Leave the model as it was, and compiled parts of any model as fast; a second call does nothing."""
        if self.monitor is not None:
            self.monitor.close()
