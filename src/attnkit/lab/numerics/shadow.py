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
from attnkit._core.errors import OptionError, ShapeError, UnsupportedError
from attnkit.lab.numerics.formats import FloatFormat
from attnkit.lab.numerics.interface_calls import KNOWN, sample_call
from attnkit.lab.numerics.metrics import Deviation, deviation
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.sampled import Sample, pick
from attnkit.lab.numerics.watch import attention_layers, uncompiled
from attnkit.modules import SoftmaxAttention
from attnkit.ops.attention.call import prepare

__all__ = ["SCHEMA", "Shadow"]

SCHEMA = "attnkit.shadow/1"
Implementation = Callable[..., Any]


class Shadow:
    """Compute some calls of every attention layer a second time, and log how far the model's results are from that.

    The model's own results are used as they are. Between sampled calls only a counter runs; outside of the context nothing is
    installed. While it is, compiled parts of any model run uncompiled.

    Args:
        model: any module with `attnkit.modules.SoftmaxAttention` layers, such as the models of `attnkit.models`; or one of
            transformers whose layers call the attention interface, with the implementation "sdpa" or "eager".
        against: "golden" for float64, or another implementation, which gets the whole call, without gradients, and gives the
            output or a tuple that begins with it. It takes the arguments of `attnkit.ops.attention`, or those of functions of
            transformers' attention interface, with masks as the model's own implementation gets them.
        every: calls of a layer from one sample to the next; its first call is sampled.
        rows: sampled rows of a call, shared among at most two sequences of the batch.
        fmt: the format whose units errors are counted in; None means that of q.

    Attributes:
        rows: {"call", "layer", "head"} and the fields of `Deviation`, for every sampled call, layer and head; `call` counts
            the calls of the layer from 1.
        left_out: {"call", "layer", "why"} of sampled calls that could not be compared: softcaps, sinks, dropout, NaN.
    Raises:
        UnsupportedError: no such layer, or another implementation.
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
        self._weight = next(model.parameters(), torch.empty(0))
        self._foreign: dict[str, nn.Module] = {}
        self._layers: dict[str, SoftmaxAttention] = {}
        if any(isinstance(part, SoftmaxAttention) for part in model.modules()):
            self._layers = attention_layers(model)
        else:
            self._foreign = _interface_modules(model)
        self._against = against if callable(against) else None
        self._every, self._probe = every, RoundingBiasProbe(rows, fmt)
        self._calls = dict.fromkeys([*self._layers, *self._foreign], 0)
        self._undo = ExitStack()
        self._began, self._spent = time.perf_counter(), 0.0
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        uncompiled(self._undo)
        for name, layer in self._layers.items():
            self._undo.callback(setattr, layer, "operator", layer.operator)
            layer.operator = self._followed(name, layer.operator)
        if self._foreign:
            from attnkit.inference import compat

            names = {compat.get_attention_name(module.config) for module in self._foreign.values()}
            self._undo.enter_context(compat.intercept(names, self._intercepted()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def report(self, command: str = "attnkit.lab.numerics.Shadow(...)") -> dict[str, Any]:
        """The envelope of attnkit.shadow/1, whose rows are `rows`.

        Args:
            command: the command line to record.
        """
        return report.envelope(
            SCHEMA,
            self.rows,
            command=command,
            seed=self._probe.seed,
            device=device_name(self._weight.device),
            dtype=str(self._weight.dtype).removeprefix("torch."),
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
            plain = {key: value for key, value in options.items() if key != "out_dtype"}
            self._heard(
                name, out, lambda: self._probe.take(prepare(q, k, v, **plain), out), lambda against: against(q, k, v, **options)
            )
            return out

        return followed

    def _intercepted(self) -> Implementation:
        from attnkit.inference import compat

        names = {id(module): name for name, module in self._foreign.items()}

        def intercepted(
            run: Implementation, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
        ) -> Any:
            result = run(module, query, key, value, mask, **options)
            if id(module) in names:
                implementation = compat.get_attention_name(module.config)
                self._heard(
                    names[id(module)],
                    result[0],
                    lambda: sample_call(self._probe, implementation, module, (query, key, value), mask, options, result[0]),
                    lambda against: against(module, query, key, value, mask, **options),
                )
            return result

        return intercepted

    @torch.no_grad()
    def _heard(self, name: str, out: Tensor, sample: Callable[[], Sample], again: Callable[[Implementation], Any]) -> None:
        """A layer has been called: compare, if it is time to."""
        self._calls[name] += 1
        if (self._calls[name] - 1) % self._every:
            return
        started = time.perf_counter()
        where = {"call": self._calls[name], "layer": name}
        try:
            found = self._compare(name, out, sample(), again)
        except UnsupportedError as error:
            found = str(error)
        if isinstance(found, str):
            self.left_out.append(where | {"why": found})
        else:
            self.rows += [where | {"head": head} | vars(each) for head, each in enumerate(found)]
        self._spent += time.perf_counter() - started

    def _compare(self, name: str, out: Tensor, sample: Sample, again: Callable[[Implementation], Any]) -> list[Deviation] | str:
        """The deviation of every head, or why there is none."""
        true, scale, seen = sample.outputs()
        other = true
        if self._against is not None:
            result = again(self._against)
            result = result[0] if isinstance(result, tuple) else result
            if result.shape != out.shape:
                raise ShapeError(f"{name}: against gives shape {tuple(result.shape)}; the layer's is {tuple(out.shape)}")
            other = pick(result, sample.sequences, sample.rows)
        return _by_head(sample, other, scale, seen)


def _interface_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Of a model of transformers."""
    found: dict[str, nn.Module] = {}
    if any(hasattr(part, "config") for part in model.modules()):  # else transformers need not be there
        from attnkit.inference import compat

        found = compat.interface_modules(model)
        for implementation in sorted({str(compat.get_attention_name(part.config)) for part in found.values()}):
            if implementation not in KNOWN:
                raise UnsupportedError(
                    f"attention implementation {implementation!r}: known here are {', '.join(KNOWN)}; call "
                    f"model.set_attn_implementation('sdpa') first"
                )
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no attnkit.modules.SoftmaxAttention layer, and none that calls the attention "
            f"interface of transformers"
        )
    return found


def _name(function: Implementation) -> str:
    if isinstance(function, partial):
        return f"{_name(function.func)}({', '.join(f'{name}={value!r}' for name, value in function.keywords.items())})"
    return getattr(function, "__name__", type(function).__name__)


def _by_head(sample: Sample, other: Tensor, scale: Tensor, seen: Tensor) -> list[Deviation] | str:
    """The deviation of every head, or why there is none; a row that sees no key has no meaning, and implementations differ."""
    assert sample.out is not None
    if not seen.any():
        return "no sampled row sees a key"
    # one wait for a device instead of twelve a head
    out, other, scale = (t[seen].double().cpu() for t in (sample.out, other, scale))
    for what, tensor in (("the result", out), ("what it is compared with", other), ("the true value", scale)):
        if not torch.isfinite(tensor).all():
            return f"{what} has NaN or infinities"
    return [deviation(out[:, head], other[:, head], sample.fmt, scale[:, head]) for head in range(out.shape[1])]
