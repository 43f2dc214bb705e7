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
from attnkit.lab.numerics.probe import Probed, ProbeReport, RoundingBiasProbe
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
        found: layer -> report, complete after the backward pass.
        lost: layer -> why its gradient could not be used.
        seconds: spent looking, on the host.
    """

    def __init__(self, layers: Mapping[str, SoftmaxAttention], probe: RoundingBiasProbe) -> None:
        self._layers, self._probe = layers, probe
        self.found: dict[str, ProbeReport] = {}
        self.lost: dict[str, str] = {}
        self.seconds = 0.0
        self._probed: dict[str, Probed] = {}
        self._undo = ExitStack()

    def install(self) -> None:
        """Forget what was found, and stand in the place of every layer's operator.

        Compiled parts of any model run uncompiled until `remove`.
        """
        self.found, self.lost, self._probed = {}, {}, {}
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it would take seconds
            self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in self._layers.items():
            self._undo.callback(setattr, layer, "operator", layer.operator)
            layer.operator = self._watched(name, layer.operator)

    def remove(self) -> None:
        """Leave the layers as they were; a second call does nothing."""
        self._undo.close()

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
        try:
            self._probed[name] = self._probe.look(q, k, v, out=out, **options)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        out.register_hook(partial(self._receive, name))
        self.seconds += time.perf_counter() - started

    def _receive(self, name: str, d_out: Tensor) -> None:
        """The gradient of a layer's output has come."""
        started = time.perf_counter()
        try:
            self.found[name] = self._probed[name].finish(d_out)
        except InputError as error:
            self.lost[name] = str(error)
        self.seconds += time.perf_counter() - started
