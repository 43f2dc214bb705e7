"""transformers' QuantizedCache as a baseline of ragged decoding: a step that decodes everything before it attends."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnkit.lab.bench.attention import PEERS as DENSE
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.machine import copies_beyond_cache
from attnkit.lab.bench.race import Operator, Peer, Shape

__all__ = ["QUANTIZED"]

_BITS = 4
_WINDOW = 64  # raw tokens of a step: half of its window of 128, the average over steps


def _stored(shape: Shape, generator: torch.Generator) -> Any:
    """A layer of the cache one token before the step."""
    from transformers.cache_utils import QuantoQuantizedLayer

    s = shape.sizes
    layer: Any = QuantoQuantizedLayer(nbits=_BITS)
    keys, values = (normal((s["B"], s["Hkv"], s["S"] - 1, s["D"]), generator, shape.dtype) for _ in range(2))
    coded = s["S"] - _WINDOW
    layer.update(keys[:, :, :coded], values[:, :, :coded])
    layer.update(keys[:, :, coded:], values[:, :, coded:])
    return layer


def _steps(decoding: Callable[[Shape], AbstractContextManager[None]]) -> Callable[[Shape], Operator]:
    """The step of one layer. Only names are set back after it: an update makes new tensors and leaves the old ones alone."""

    def make(shape: Shape) -> Operator:
        s, device = shape.sizes, shape.device
        attend = DENSE["sdpa-flash" if device.type == "cuda" else "sdpa"].make(shape)
        generator = torch.Generator(device).manual_seed(0)
        copies = copies_beyond_cache(device, 2 * s["B"] * s["S"] * s["Hkv"] * s["D"] * _BITS // 8)
        token = [normal((s["B"], s["Hkv"], 1, s["D"]), generator, shape.dtype) for _ in range(2)]
        with decoding(shape):
            layers = [_stored(shape, generator) for _ in range(copies)]
        turns = itertools.cycle(layers)

        def run(q: Tensor, **_: Any) -> Tensor:
            layer = next(turns)
            before = layer.keys, layer.values, layer.cumulative_length
            with decoding(shape):
                keys, values = layer.update(*token)
            layer.keys, layer.values, layer.cumulative_length = before
            out: Tensor = attend(q=q, k=keys.transpose(1, 2), v=values.transpose(1, 2), causal=True)
            return out

        return run

    return make


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Two codes of 4 bits from each byte: all the lower halves, then all the upper ones."""
    assert bits == _BITS
    return torch.cat([packed & 15, packed >> 4])


@contextmanager
def _torch_unpacks(shape: Shape) -> Iterator[None]:
    """Torch unpacks in place of the extension that quanto would compile."""
    extensions: Any = importlib.import_module("optimum.quanto.library.extensions")
    extension = extensions.get_extension("quanto_cuda" if shape.device.type == "cuda" else "quanto_cpp")
    before, extension._lib = extension._lib, SimpleNamespace(unpack=_unpack)
    try:
        yield
    finally:
        extension._lib = before


def _limits(shape: Shape) -> list[str]:
    code, kept, tokens = (*shape.variant.values(), shape.sizes["S"])
    reasons = [] if code == "int4" else [f"codec={code} (it is raced with {_BITS} bits)"]
    reasons += [] if kept == "all" else [f"kept={kept} (it drops nothing)"]
    reasons += [] if tokens > _WINDOW else [f"{tokens} tokens (more than its window of {_WINDOW})"]
    return reasons + (DENSE["sdpa-flash"].limits(shape) if shape.device.type == "cuda" else [])


_STEP = "a step of transformers' QuantizedCache of 4 bits (quanto), which decodes all keys and values, then dense attention"
_QUANTO: dict[str, Any] = {
    "limits": _limits,
    "module": "optimum.quanto",
    "install": "run: pip install optimum-quanto",
    "package": "optimum-quanto",
    "same_result": False,
}
QUANTIZED = (
    Peer(
        "quantized-cache",
        f"{_STEP}; unpacked by quanto's own extension, which is compiled at first use",
        _steps(lambda shape: nullcontext()),
        # its kernel always runs in the default stream, which a graph cannot capture
        plain="quanto launches in the default stream",
        **_QUANTO,
    ),
    Peer("quantized-cache-torch", f"{_STEP}; unpacked by torch", _steps(_torch_unpacks), **_QUANTO),
)
