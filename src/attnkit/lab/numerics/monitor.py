"""Watching a training run for the error that drives low-precision attention apart, before the loss shows it."""

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from attnkit import report
from attnkit._core.checks import check_choice
from attnkit._core.devices import device_name
from attnkit._core.errors import CheckFailed, OptionError
from attnkit.lab.numerics.drift import score
from attnkit.lab.numerics.formats import FloatFormat
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.spectral import SpectralNorms
from attnkit.lab.numerics.track import LEVELS, Track
from attnkit.lab.numerics.watch import Watch, attention_layers

__all__ = ["SCHEMA", "Action", "StabilityMonitor"]

SCHEMA = "attnkit.stability/1"
Action = Literal["log", "raise", "switch"]
_WARN = LEVELS.index("warn")
_logger = logging.getLogger("attnkit")


class StabilityMonitor:
    """Looks at the attention layers of a model in every so many training steps.

    Call `step()` after each step, and `close()` after the last, or use it as a context manager: what waits for a sampled step
    stays installed until then.

    A sampled step is one whose first forward pass with a gradient is looked at by `RoundingBiasProbe`: rows are copied in it,
    and layers alike are looked at together when the step is over.
    Between sampled steps nothing is installed and nothing is done. In a sampled step compiled parts of the model run
    uncompiled (`torch.compiler.set_stance`), which takes longer and more memory; what is judged is that form of them. Under
    gradient checkpointing a layer is looked at once. In distributed training the first process looks, and all act alike.

    The measure is eps in terms of abs(delta), one number a head and sample. Levels, from what is seen of a head and a layer:

    - watch: in 5 % of the rows or more two probabilities round to 1, and a channel's values lie two standard deviations off 0;
    - warn: over the last 50 samples (20 at least) eps leans one way by 6 standard deviations;
    - act: warn, and a spectral norm of the layer's weights grows by 10 % in 100 steps.

    Args:
        model: any module with `attnkit.modules.SoftmaxAttention` layers, such as the models of `attnkit.models`.
        every: steps from one sample to the next; the first step is sampled.
        rows: sampled rows of a call.
        action: what a layer at warn or above meets, beside a line in the log (`logging.getLogger("attnkit")`) and in
            `events`: "log" nothing, "raise" an error, "switch" stable="delta" from then on.
        fmt: what outputs are rounded to; None means the format of their dtype. Emulated attention needs it.

    Attributes:
        events: {"step", "layer", "level", "heads", "text"} of every rise of a layer's level, and of gradients that were not
            finite and so were left out (level "left out").
        history: {"step", "layer", "head", "stable", "eps_total", "z", "norm_q" ..} of every sample, for the head with the
            largest abs(z).
    Raises:
        UnsupportedError: no such layer.
        OptionError: a number below 1, or an unknown action.
    Source: Qiu & Yao 2025 (arXiv:2510.04212). Levels and the test are ours.
    """

    def __init__(
        self, model: nn.Module, every: int = 50, rows: int = 64, action: Action = "log", *, fmt: FloatFormat | None = None
    ) -> None:
        check_choice("action", action, get_args(Action))
        if every < 1:
            raise OptionError(f"every={every} must be at least 1")
        self._layers = attention_layers(model)
        self.every, self.action = every, action
        self.events: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self._rows = rows
        self._watch = Watch(self._layers, RoundingBiasProbe(rows, fmt))
        self._tracks = {name: Track(name) for name in self._layers}
        self._levels = dict.fromkeys(self._layers, 0)
        self._norms = SpectralNorms()
        self._done, self._due = 0, True
        self._began, self._spent = time.perf_counter(), 0.0
        self._looks = not _distributed() or torch.distributed.get_rank() == 0
        self._arm()

    def step(self) -> None:
        """Say that a training step is over; after a sampled one, judge it.

        Raises:
            CheckFailed: a layer rose to warn or above and `action` is "raise".
            InputError: a layer was given NaN or infinities.
        """
        if self._due:
            self._watch.remove()
            self._watch.collect()
            started = time.perf_counter()
            self._judge()
            self._spent += time.perf_counter() - started
        self._done += 1
        self._due = self._done % self.every == 0
        if self._due:
            self._arm()

    def close(self) -> None:
        """Leave the model as it was, but for switched layers; `step` must not be called any more."""
        self._watch.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def level(self, layer: str) -> str:
        """The level of a layer: its worst head's when it was last looked at."""
        return LEVELS[self._levels[layer]]

    def report(self, command: str = "attnkit.lab.numerics.StabilityMonitor(...)") -> dict[str, Any]:
        """The envelope of attnkit.stability/1: a row for each layer and head, `history` and `events`.

        Args:
            command: the command line to record.
        """
        rows = [row for name, track in self._tracks.items() for row in track.rows(self._layers[name].stable)]
        weight = next(iter(self._layers.values())).q_proj.weight
        return report.envelope(
            SCHEMA,
            rows,
            command=command,
            seed=None,
            device=device_name(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            wall_s=time.perf_counter() - self._began,
            extra={
                "every": self.every, "sampled_rows": self._rows, "action": self.action, "steps": self._done,
                "monitor_s": self._spent + self._watch.seconds, "history": self.history, "events": self.events,
            },
        )  # fmt: skip

    def plot(self, path: Path) -> None:
        """Write one page with the report's table and curves."""
        report.write_html(path, [self.report()])

    def _arm(self) -> None:
        if self._looks:
            self._watch.install()

    def _judge(self) -> None:
        for name, reason in self._watch.lost.items():
            self._tell(name, "left out", [], reason)
        norms = self._norms.measure(
            {
                f"{name}.{side}": getattr(self._layers[name], f"{side}_proj").weight
                for name in self._watch.found
                for side in "qkvo"
            }
        )
        for name, found in self._watch.found.items():
            self._tracks[name].add(self._done, found, {side: norms[f"{name}.{side}"] for side in "qkvo"})
        score(self._tracks[name].drift for name in self._watch.found)
        for name in self._watch.found:
            layer, track = self._layers[name], self._tracks[name]
            self.history.append(track.moment(self._done, layer.stable))
        now = {
            name: int(self._tracks[name].levels().max()) if name in self._watch.found else self._levels[name]
            for name in self._layers
        }
        for name, level in self._agree(now).items():
            rose, self._levels[name] = level > self._levels[name], level
            if rose:
                self._react(name, level)

    def _react(self, name: str, level: int) -> None:
        layer, track = self._layers[name], self._tracks[name]
        heads: list[int] = []
        text = f"level {LEVELS[level]}"
        if self._looks:
            heads = (track.levels() == level).nonzero().flatten().tolist()
            text = f"{text}, heads {', '.join(map(str, heads))}: {track.reason(level)}"
        if level >= _WARN and self.action == "switch" and layer.stable in ("off", "dynamic_max"):
            text += f"; stable was {layer.stable!r} and is 'delta' from here on"
            layer.stable = "delta"
            track.drift.forget()
        self._tell(name, LEVELS[level], heads, text)
        if level >= _WARN and self.action == "raise":
            raise CheckFailed(f"{name}, step {self._done}: {text}; set its stable to 'delta'")

    def _agree(self, levels: dict[str, int]) -> dict[str, int]:
        """The first process's levels, in every process."""
        if not _distributed():
            return levels
        weight = next(iter(self._layers.values())).q_proj.weight
        shared = torch.tensor(list(levels.values()), device=weight.device)
        torch.distributed.broadcast(shared, 0)
        return dict(zip(levels, shared.tolist(), strict=True))

    def _tell(self, name: str, level: str, heads: list[int], text: str) -> None:
        self.events.append({"step": self._done, "layer": name, "level": level, "heads": heads, "text": text})
        _logger.warning("%s, step %d: %s", name, self._done, text)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
