"""What the specs of recurrent operators share: inputs of cases, and changes of inputs whose effect is known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.invariance import Invariance
from attnkit.ops._chunkwise_core.state import RecurrentState

__all__ = [
    "STATE", "STEP_CAPABILITIES", "Make", "arguments", "draw", "flattened", "linear", "packed", "rechunked", "step_arguments",
    "whole",
]  # fmt: skip

Inputs = dict[str, Any]
Make = Callable[[torch.Generator], Inputs]
STATE = ("S", "n", "m")
STEP_CAPABILITIES = {
    "cpu": "yes, in plain torch",
    "cuda": "yes, one kernel that reads and writes a state once",
    "backward": "yes, in plain torch",
    "grouped heads": "any H that is a multiple of Hkv",
    "compile": "yes, fullgraph; in CUDA graphs too",
    "head width": "any, D != Dv",
    "float64": "yes, in plain torch",
}


def arguments(inputs: Inputs) -> Inputs:
    """A case's inputs with the tensors of a state -> the operator's arguments."""
    plain = {name: value for name, value in inputs.items() if name not in STATE}
    if "S" in inputs:
        plain["initial_state"] = RecurrentState(inputs["S"], inputs.get("n"), inputs.get("m"))
    return plain


def step_arguments(inputs: Inputs) -> Inputs:
    """The same of a step, which calls it `state`."""
    plain = arguments(inputs)
    return plain | {"state": plain.pop("initial_state")}


def whole(inputs: Inputs) -> Inputs:
    """Arguments of a step -> those of the operator on a sequence of one token."""
    plain = {name: value[:, None] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return plain | {"initial_state": plain.pop("state")}


def flattened(result: tuple[Tensor, RecurrentState]) -> tuple[Tensor, ...]:
    """(out, state) as tensors."""
    return result[0], *result[1].tensors()


def draw(
    generator: torch.Generator,
    rows: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    width_v: int,
    *,
    states: int = 0,
    parts: str = "S",
    mean: float = 0.0,
    positive: bool = False,
) -> Inputs:
    """q, k, v [*rows, heads, ...], `mean` added to v, q and k not negative if `positive`, and the parts of `states` states."""
    inputs: Inputs = {
        name: torch.randn(*rows, count, size, generator=generator)
        for name, count, size in (("q", heads[0], width), ("k", heads[1], width), ("v", heads[1], width_v))
    }
    inputs["v"] += mean
    if positive:
        inputs |= {name: inputs[name].abs() for name in "qk"}
    shapes = {"S": (heads[1], width, width_v), "n": (heads[1], width), "m": (heads[1],)}
    if states:
        inputs |= {name: torch.randn(states, *shapes[name], generator=generator) for name in parts}
    return inputs


def packed(inputs: Inputs, lengths: list[int]) -> Inputs:
    """Boundaries of sequences of these lengths."""
    return inputs | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}


def linear(cases: tuple[str, ...], *, factor: float = 8.0) -> Invariance:
    """Outputs and the state S are linear in values, and a power of two commutes with rounding: bit for bit."""
    return Invariance(
        f"v x {factor:g}",
        lambda inputs: inputs | {"v": inputs["v"] * factor},
        lambda name, output: output * factor if name in ("out", "S") else output,
        cases,
        exact=True,
    )


def rechunked(size: int, cases: tuple[str, ...]) -> Invariance:
    """Where sequences are cut changes nothing."""
    return Invariance(
        f"chunks of {size}",
        lambda inputs: inputs | {"chunk_size": size},
        lambda name, output: output,
        cases,
        False,
        ("triton", "torch"),
    )
