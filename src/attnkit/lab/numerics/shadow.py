"""Following a live model's attention with a second computation of the same calls."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError, ShapeError
from attnkit.lab.numerics.formats import FloatFormat
from attnkit.lab.numerics.metrics import Deviation, deviation
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.sampled import Sample, pick
from attnkit.lab.numerics.watch import attention_layers, uncompiled
from attnkit.ops.attention.call import prepare

__all__ = ["SCHEMA", "Shadow"]

SCHEMA = "attnkit.shadow/1"
Implementation = Callable[..., Any]


class Shadow:
    """Compute some calls of every attention layer a second time, and log how far the model's results are from that.

    The model's own results are used as they are. Between sampled calls only a counter runs; outside of the context nothing is
    installed. While it is, compiled parts of any model run uncompiled.

    Args:
        model: any module with `attnkit.modules.SoftmaxAttention` layers, such as the models of `attnkit.models`.
        against: "golden" for float64, or another implementation with the arguments of `attnkit.ops.attention`, which gets the
            whole call, without gradients.
        every: calls of a layer from one sample to the next; its first call is sampled.
        rows: sampled rows of a call, shared among at most two sequences of the batch.
        fmt: the format whose units errors are counted in; None means that of q.

    Attributes:
        rows: {"call", "layer", "head"} and the fields of `Deviation`, for every sampled call, layer and head; `call` counts
            the calls of the layer from 1.
        left_out: {"call", "layer", "why"} of sampled calls that could not be compared.
    Raises:
        UnsupportedError: no such layer; at a call, softcaps, sinks and q_pos.
        OptionError: a number below 1, or something else than "golden" that cannot be called.
        ShapeError: at a call, `against` gives another shape.
    Complexity: O(rows S D) a head and sampled call, in float64, for the S keys of a sequence; and what `against` costs.

    >>> import torch
    >>> from attnkit.training import new_model
    >>> model = new_model(vocab_size=64, dim=64, layers=2, heads=4, positions=32)
    >>> with Shadow(model, every=1, rows=16) as log:
    ...     _ = model(torch.arange(32)[None])
    >>> len(log.rows), max(row["ulp_row_max"] for row in log.rows) < 16
    (8, True)
    """

    def __init__(
        self,
        model: nn.Module,
        against: Literal["golden"] | Implementation = "golden",
        every: int = 100,
        rows: int = 64,
        *,
        fmt: FloatFormat | None = None,
    ) -> None:
        if every < 1:
            raise OptionError(f"every={every} must be at least 1")
        if against != "golden" and not callable(against):
            raise OptionError(f"against={against!r}: give 'golden' or a function with the arguments of attnkit.ops.attention")
        self._layers = attention_layers(model)
        self._against = against if callable(against) else None
        self._every, self._probe = every, RoundingBiasProbe(rows, fmt)
        self._calls = dict.fromkeys(self._layers, 0)
        self._undo = ExitStack()
        self._began, self._spent = time.perf_counter(), 0.0
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        uncompiled(self._undo)
        for name, layer in self._layers.items():
            self._undo.callback(setattr, layer, "operator", layer.operator)
            layer.operator = self._followed(name, layer.operator)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def report(self, command: str = "attnkit.lab.numerics.Shadow(...)") -> dict[str, Any]:
        """The envelope of attnkit.shadow/1, whose rows are `rows`.

        Args:
            command: the command line to record.
        """
        weight = next(iter(self._layers.values())).q_proj.weight
        return report.envelope(
            SCHEMA,
            self.rows,
            command=command,
            seed=self._probe.seed,
            device=device_name(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            wall_s=time.perf_counter() - self._began,
            extra={
                "against": "golden" if self._against is None else _name(self._against),
                "every": self._every, "sampled_rows": self._probe.rows, "calls": max(self._calls.values()),
                "shadow_s": self._spent, "left_out": self.left_out,
            },
        )  # fmt: skip

    def _followed(self, name: str, operator: Implementation) -> Implementation:
        def followed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            out = operator(q, k, v, **options)
            if self._calls[name] % self._every == 0:
                self._compare(name, q, k, v, out, options)
            self._calls[name] += 1
            return out

        return followed

    @torch.no_grad()
    def _compare(self, name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        plain = {key: value for key, value in options.items() if key != "out_dtype"}
        sample = self._probe.take(prepare(q, k, v, **plain), out)
        true, scale = sample.outputs()
        other = true
        if self._against is not None:
            result = self._against(q, k, v, **options)
            result = result[0] if isinstance(result, tuple) else result
            if result.shape != out.shape:
                raise ShapeError(f"{name}: against gives shape {tuple(result.shape)}; the layer's is {tuple(out.shape)}")
            other = pick(result, sample.sequences, sample.rows)
        where = {"call": self._calls[name] + 1, "layer": name}
        found = _by_head(sample, other, scale)
        if isinstance(found, str):
            self.left_out.append(where | {"why": found})
        else:
            self.rows += [where | {"head": head} | vars(each) for head, each in enumerate(found)]
        self._spent += time.perf_counter() - started


def _name(function: Implementation) -> str:
    if isinstance(function, partial):
        return f"{_name(function.func)}({', '.join(f'{name}={value!r}' for name, value in function.keywords.items())})"
    return getattr(function, "__name__", type(function).__name__)


def _by_head(sample: Sample, other: Tensor, scale: Tensor) -> list[Deviation] | str:
    """The deviation of every head, or why there is none."""
    assert sample.out is not None
    out, other, scale = (t.double().cpu() for t in (sample.out, other, scale))  # one wait for a device instead of twelve a head
    for what, tensor in (("the result", out), ("what it is compared with", other), ("the true value", scale)):
        if not torch.isfinite(tensor).all():
            return f"{what} has NaN or infinities"
    return [deviation(out[:, :, head], other[:, :, head], sample.fmt, scale[:, :, head]) for head in range(out.shape[2])]
