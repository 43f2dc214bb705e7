"""Standing between attention layers and their operators for a while."""

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnkit._core.errors import InputError, UnsupportedError
from attnkit.lab.numerics.measured import NOT_FINITE, ProbeReport, reports
from attnkit.lab.numerics.probe import Probed, RoundingBiasProbe, look_at
from attnkit.lab.numerics.sampled import Sample, pick, stacked
from attnkit.modules import SoftmaxAttention
from attnkit.ops.attention.call import prepare

__all__ = ["Watch", "attention_layers", "uncompiled"]

_TOGETHER = 2**25  # scores, keys and values that are looked at together, 256 MiB in float64; as many at most are kept


def attention_layers(model: nn.Module) -> dict[str, SoftmaxAttention]:
    """Name -> layer, in the order of the model.

    Raises:
        UnsupportedError: there is none.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, SoftmaxAttention)}
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no attnkit.modules.SoftmaxAttention layer; give a model of attnkit.models"
        )
    return layers


def uncompiled(undo: ExitStack) -> None:
    """Run compiled parts of any model uncompiled until `undo` is closed."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it would take seconds
        undo.enter_context(torch.compiler.set_stance("force_eager"))


class Watch:
    """Probes the first call with a gradient of every layer while it is installed.

    During the passes it copies rows, and of two sequences all keys and values; `collect` looks at calls of one kind together,
    which launches as many kernels as one look. What would be more than 2^25 numbers is looked at earlier.

    Args:
        layers: name -> layer.
        probe: what looks.

    Attributes:
        found: layer -> report, as of `collect`.
        lost: layer -> why its gradient could not be used.
        seconds: spent looking, on the host.
    """

    def __init__(self, layers: Mapping[str, SoftmaxAttention], probe: RoundingBiasProbe) -> None:
        self._layers, self._probe = layers, probe
        self.found: dict[str, ProbeReport] = {}
        self.lost: dict[str, str] = {}
        self.seconds = 0.0
        self._seen: set[str] = set()
        self._kept: dict[str, Sample] = {}
        self._probed: list[tuple[list[str], Probed]] = []
        self._grads: dict[str, Tensor] = {}
        self._undo = ExitStack()

    def install(self) -> None:
        """Forget what was found, and stand in the place of every layer's operator.

        Compiled parts of any model run uncompiled until `remove`.
        """
        self.found, self.lost = {}, {}
        self._forget()
        uncompiled(self._undo)
        for name, layer in self._layers.items():
            self._undo.callback(setattr, layer, "operator", layer.operator)
            layer.operator = self._watched(name, layer.operator)

    def remove(self) -> None:
        """Leave the layers as they were; a second call does nothing."""
        self._undo.close()

    def collect(self) -> None:
        """Fill `found` and `lost` after a backward pass: here, and only here, the host waits for the device.

        Raises:
            InputError: a layer was given NaN or infinities.
        """
        started = time.perf_counter()
        self._kept = {name: sample for name, sample in self._kept.items() if name in self._grads}
        self._look()
        measured = [probed.finish(self._gradients(names, probed)) for names, probed in self._probed]
        names = [name for names, _ in self._probed for name in names]
        results = dict(zip(names, reports(measured), strict=True))
        for name in self._grads:
            report, faults = results[name]
            inputs = [fault for fault in faults if fault != "d_out"]
            if inputs:
                raise InputError(f"{name}: {inputs[0]} {NOT_FINITE}")
            if faults:
                self.lost[name] = f"d_out {NOT_FINITE}"
            else:
                self.found[name] = report
        self._forget()
        self.seconds += time.perf_counter() - started

    def _watched(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            out = operator(q, k, v, **options)
            # what a checkpoint computes again has no backward pass of its own, or its first pass had none
            if name not in self._seen and out.requires_grad and not torch.compiler.is_compiling():
                self._take(name, q, k, v, out, options)
            return out

        return watched

    def _take(self, name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        options.pop("out_dtype", None)
        sample = self._probe.take(prepare(q, k, v, **options), out)
        if sum(kept.elements for kept in self._kept.values()) + sample.elements > _TOGETHER:
            self._look()
        self._seen.add(name)
        self._kept[name] = sample
        out.register_hook(partial(self._receive, name, sample.sequences, sample.rows))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _receive(self, name: str, sequences: Tensor, rows: Tensor, d_out: Tensor) -> None:
        """The gradient of a layer's output has come."""
        started = time.perf_counter()
        self._grads[name] = pick(d_out, sequences, rows)
        self.seconds += time.perf_counter() - started

    def _look(self) -> None:
        """Turn all that is kept into what waits for gradients, calls of one kind together."""
        alike: dict[Hashable, list[str]] = {}
        for name, sample in self._kept.items():
            alike.setdefault(sample.kind, []).append(name)
        for names in alike.values():
            self._probed.append((names, look_at(stacked([self._kept[name] for name in names]))))
        self._kept = {}

    def _gradients(self, names: Sequence[str], probed: Probed) -> Tensor:
        """Gradients of the sampled rows of some layers, 0 where none came."""
        parts = probed.true.unflatten(0, (len(names), -1))
        return torch.cat([
            self._grads[name] if name in self._grads else torch.zeros_like(part)
            for name, part in zip(names, parts, strict=True)
        ])  # fmt: skip

    def _forget(self) -> None:
        self._seen, self._kept, self._probed, self._grads = set(), {}, [], {}
