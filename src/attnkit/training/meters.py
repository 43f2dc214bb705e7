"""Speed and memory of a run: real tokens a second, step times, model-FLOPs utilisation, peak memory."""

import resource
import sys
import time
from typing import Any

import numpy as np
import torch

from attnkit.training.data.packing import Work
from attnkit.training.work import peak_flops, training_flops

__all__ = ["Meters", "peak_mib"]

_KEPT = 10_000  # step times that percentiles are taken over, the newest


class Meters:
    """Counts work and time between calls of `mark`, and over the run.

    The clock of a GPU runs on the device: an event is recorded a step and read when the step has ended, so that measuring
    makes nobody wait.

    Args:
        device: where the model is.
        precision: of the matrix products, for the device's peak.
        parameters, channels: see `attnkit.training.work.training_flops`.
        devices: that share the work.
    """

    def __init__(self, device: torch.device, precision: str, *, parameters: int, channels: int, devices: int = 1) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._parameters, self._channels = parameters, channels
        peak = peak_flops(device, precision)
        self._peak = None if peak is None else peak * devices
        self._stamps: list[Any] = []
        self._works: list[Work] = []
        self.steps_ms: list[float] = []
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0

    @property
    def running(self) -> bool:
        """Whether the clock runs."""
        return bool(self._stamps)

    def step(self, work: Work | None) -> None:
        """A step has ended; None begins the clock."""
        if self._cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record(torch.cuda.current_stream(self._device))
            self._stamps.append(stamp)
        else:
            self._stamps.append(time.perf_counter())
        if work is not None:
            self._works.append(work)

    def mark(self) -> dict[str, float | None]:
        """Rates since the last mark: tokens_s, tflops, mfu, step_ms_p50, step_ms_p95; None where there was no full step."""
        if self._cuda and self._stamps:
            self._stamps[-1].synchronize()
        pairs = zip(self._stamps[:-1], self._stamps[1:], strict=True)
        times = [first.elapsed_time(second) if self._cuda else 1e3 * (second - first) for first, second in pairs]
        works, self._works, self._stamps = self._works[-len(times) :] if times else [], [], self._stamps[-1:]
        tokens = sum(work.tokens for work in works)
        flops = sum(training_flops(self._parameters, self._channels, work) for work in works)
        seconds = sum(times) / 1e3
        self.steps_ms = [*self.steps_ms, *times][-_KEPT:]
        self.tokens, self.flops, self.seconds = self.tokens + tokens, self.flops + flops, self.seconds + seconds
        return self._rates(tokens, flops, seconds, times)

    def pause(self) -> None:
        """What follows until the next `step` is no training: validation, saving."""
        self._stamps = []

    def total(self) -> dict[str, float | None]:
        """Rates over the session, and `peak_mib`."""
        return {**self._rates(self.tokens, self.flops, self.seconds, self.steps_ms), "peak_mib": peak_mib(self._device)}

    def _rates(self, tokens: int, flops: float, seconds: float, times: list[float]) -> dict[str, float | None]:
        if not seconds:
            return dict.fromkeys(("tokens_s", "tflops", "mfu", "step_ms_p50", "step_ms_p95"))
        middle, slow = np.percentile(times, [50, 95])
        return {
            "tokens_s": tokens / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            "step_ms_p50": float(middle),
            "step_ms_p95": float(slow),
        }


def peak_mib(device: torch.device) -> float:
    """Peak memory, MiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
