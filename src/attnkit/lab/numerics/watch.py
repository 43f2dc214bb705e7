"""Standing between attention layers and their operators for a while."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnkit._core.errors import InputError, UnsupportedError
from attnkit.lab.numerics.measured import NOT_FINITE, Measured, ProbeReport, reports
from attnkit.lab.numerics.probe import Probed, RoundingBiasProbe
from attnkit.modules import SoftmaxAttention

__all__ = ["Watch", "attention_layers"]


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


class Watch:
    """Probes the first call with a gradient of every layer while it is installed.

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
        self._probed: dict[str, Probed] = {}
        self._measured: dict[str, Measured] = {}
        self._undo = ExitStack()

    def install(self) -> None:
        """Forget what was found, and stand in the place of every layer's operator.

        Compiled parts of any model run uncompiled until `remove`.
        """
        self.found, self.lost, self._probed, self._measured = {}, {}, {}, {}
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it would take seconds
            self._undo.enter_context(torch.compiler.set_stance("force_eager"))
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
        for (name, _), (report, faults) in zip(self._measured.items(), reports(list(self._measured.values())), strict=True):
            inputs = [fault for fault in faults if fault != "d_out"]
            if inputs:
                raise InputError(f"{name}: {inputs[0]} {NOT_FINITE}")
            if faults:
                self.lost[name] = f"d_out {NOT_FINITE}"
            else:
                self.found[name] = report
        self._measured = {}
        self.seconds += time.perf_counter() - started

    def _watched(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            out = operator(q, k, v, **options)
            # what a checkpoint computes again has no backward pass of its own, or its first pass had none
            if name not in self._probed and out.requires_grad and not torch.compiler.is_compiling():
                self._look(name, q, k, v, out, options)
            return out

        return watched

    def _look(self, name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        options.pop("out_dtype", None)
        self._probed[name] = self._probe.look(q, k, v, out=out, **options)
        out.register_hook(partial(self._receive, name))
        self.seconds += time.perf_counter() - started

    def _receive(self, name: str, d_out: Tensor) -> None:
        """The gradient of a layer's output has come."""
        started = time.perf_counter()
        self._measured[name] = self._probed[name].finish(d_out)
        self.seconds += time.perf_counter() - started
