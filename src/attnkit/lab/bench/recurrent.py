"""The races of the recurrences: the mLSTM, scalar decay, lightning attention, and their steps.

By default as many sequences run as make 65,536 tokens on a GPU, so that dense attention beside it, which is a baseline, takes
longer with the length and they do not. Layouts matter to peers: NXAI's kernels copy what does not have heads first in memory,
flash-linear-attention what does not have tokens first; `first` says which it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.registry import Registry
from attnkit.lab.bench import recurrent_peers as peers
from attnkit.lab.bench.attention import few_heads, sizes
from attnkit.lab.bench.entmax import choice
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import Axis, Peer, Race, Shape, Sizes
from attnkit.ops.mlstm.call import parts_of

__all__ = ["RACES"]

_GATES: dict[str, dict[str, Any]] = {
    "exp": {"input_gate": "exp"},
    "sigmoid": {"input_gate": "sigmoid"},
    "plain": {"input_gate": "sigmoid", "normalize": False},
}
_COUNTED_CHUNK = 64  # rows of a chunk that work is counted for
_BACKWARD_FACTOR = 3
_STATE_BYTES = 4  # of a number


def _width_v(shape: Shape) -> int:
    return shape.sizes["D"] * int(shape.variant["dv"])


def _times(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("give how many times as wide as keys values are, 1 or more")
    return int(text)


def _rows(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """q, k and v [B, T, H, D]; in memory what is asked for comes first."""
    s, width_v = shape.sizes, _width_v(shape)
    tensors = {}
    for name, heads, width in (("q", s["H"], s["D"]), ("k", s["Hkv"], s["D"]), ("v", s["Hkv"], width_v)):
        if shape.variant["first"] == "heads":
            tensors[name] = normal((s["B"], heads, s["T"], width), generator, shape.dtype).transpose(1, 2)
        else:
            tensors[name] = normal((s["B"], s["T"], heads, width), generator, shape.dtype)
    return tensors


def _gate(shape: Shape, generator: torch.Generator, *rows: int) -> Tensor:
    return torch.randn(shape.sizes["B"], *rows, shape.sizes["Hkv"], generator=generator, device=generator.device)


def _mlstm_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Forget gates around 3, as models have them."""
    length = shape.sizes["T"]
    gates = {"i": _gate(shape, generator, length), "f": 3 + _gate(shape, generator, length)}
    return _rows(shape, generator) | gates | _GATES[str(shape.variant["gates"])]


def _decay_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    g = torch.nn.functional.logsigmoid(3 + _gate(shape, generator, shape.sizes["T"]))
    return _rows(shape, generator) | {"g": g}


def _lightning_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    return _rows(shape, generator) | {"slopes": ops.lightning_slopes(shape.sizes["Hkv"]).to(generator.device)}


def _flops(shape: Shape) -> float:
    """In chunks of 64 rows, whatever the chunks are."""
    s, width_v = shape.sizes, _width_v(shape)
    each = 4 * s["D"] * width_v + 2 * _COUNTED_CHUNK * (s["D"] + width_v)
    return float(s["B"] * s["T"] * s["H"] * each * (_BACKWARD_FACTOR if shape.trains else 1))


def _traffic(shape: Shape) -> float:
    """Bytes of q, k, v and the output."""
    s, width_v = shape.sizes, _width_v(shape)
    return float(s["B"] * s["T"] * (s["H"] + s["Hkv"]) * (s["D"] + width_v) * shape.dtype.itemsize)


def _token(step: str, length: int, width: int, heads: tuple[int, int], batch: int) -> Sizes:
    return {"B": batch, "T": 1, "H": heads[0], "Hkv": heads[1], "D": width}


def _step_rows(shape: Shape, generator: torch.Generator, parts: str) -> dict[str, Any]:
    s, width_v = shape.sizes, _width_v(shape)
    shapes = {"S": (s["D"], width_v), "n": (s["D"],), "m": ()}
    rows = {"q": (s["H"], s["D"]), "k": (s["Hkv"], s["D"]), "v": (s["Hkv"], width_v)}
    low = {name: normal((s["B"], *size), generator, shape.dtype) for name, size in rows.items()}
    return low | {name: normal((s["B"], s["Hkv"], *shapes[name]), generator, torch.float32) for name in parts}


def _mlstm_step_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    options = _GATES[str(shape.variant["gates"])]
    parts = parts_of(options["input_gate"], options.get("normalize", True))
    gates = {"i": _gate(shape, generator), "f": 3 + _gate(shape, generator)}
    return _step_rows(shape, generator, parts) | gates | options


def _decay_step_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    return _step_rows(shape, generator, "S") | {"g": -torch.rand(_gate(shape, generator).shape, device=generator.device)}


def _state_traffic(shape: Shape) -> float:
    """Bytes of the matrices, read and written."""
    return 2.0 * _STATE_BYTES * shape.sizes["B"] * shape.sizes["Hkv"] * shape.sizes["D"] * _width_v(shape)


def _axes(times: int, first: str, gates: bool) -> dict[str, Axis]:
    axes = {"dv": Axis("width of values over that of keys", (times,), _times)}
    if first:
        axes["first"] = Axis("what comes first in memory, heads or tokens", (first,), choice(("heads", "tokens")))
    if gates:
        axes["gates"] = Axis("gates: exp, sigmoid, or sigmoid without normaliser (plain)", ("exp",), choice(tuple(_GATES)))
    return axes


def _registry(*members: Peer) -> Registry[Peer]:
    registry: Registry[Peer] = Registry("peer")
    for peer in members:
        registry.register(peer.name, peer)
    return registry


def _sequence_race(
    op: str,
    inputs: Callable[[Shape, torch.Generator], dict[str, Any]],
    gates: tuple[str, ...],
    members: tuple[Peer, ...],
    dims: tuple[int, ...],
    heads: int,
    axes: dict[str, Axis],
) -> Race:
    return Race(
        op=op,
        peers=_registry(*members, *peers.dense_beside()),
        passes=("fwd", "fwd+bwd"),
        lengths={"cuda": (512, 2048, 8192, 32768, 65536), "cpu": (256, 512, 1024)},
        dims=dims,
        heads=(heads, heads),
        sizes=sizes,
        inputs=inputs,
        reduced=few_heads(4),
        grads=("q", "k", "v", *(name for name in gates if name != "slopes")),
        flops=_flops,
        traffic=_traffic,
        axes=axes,
        tokens={"cuda": 65536},
        fixed=gates,
    )


def _step_race(
    op: str, inputs: Callable[[Shape, torch.Generator], dict[str, Any]], gates: tuple[str, ...], peer: Peer, times: int
) -> Race:
    return Race(
        op=op,
        peers=_registry(peer),
        passes=("step",),
        lengths={"cuda": (1,), "cpu": (1,)},
        dims=(128,),
        heads=(8, 8),
        sizes=_token,
        inputs=inputs,
        reduced=few_heads(4),
        grads=(),
        flops=None,
        traffic=_state_traffic,
        axes=_axes(times, "", op == "mlstm_step"),
        batch={"cuda": 32},
        fixed=(*gates, "S", "n", "m"),
    )


RACES = (
    _sequence_race(
        "mlstm",
        _mlstm_inputs,
        ("i", "f"),
        (peers.nxai, peers.nxai_unjudged, peers.fla_mlstm),
        (128, 256),
        8,
        _axes(2, "heads", True),
    ),
    _sequence_race("scalar_decay_attention", _decay_inputs, ("g",), (peers.fla,), (128,), 32, _axes(1, "tokens", False)),
    _sequence_race(
        "lightning_attention", _lightning_inputs, ("slopes",), (peers.fla_lightning,), (128,), 32, _axes(1, "tokens", False)
    ),
    _step_race("mlstm_step", _mlstm_step_inputs, ("i", "f"), peers.nxai_step, 2),
    _step_race("scalar_decay_step", _decay_step_inputs, ("g",), peers.fla_step, 1),
)
