"""Invariances: what an operator's results must do when its inputs change. An OpSpec declares them, conformance judges them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Invariance", "alone", "permuted", "scaled", "shifted"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Invariance:
    """A change of the inputs whose effect on the results is known.

    Attributes:
        name: what was changed, as conformance reports it.
        change: the public function's arguments -> changed ones, exact in every dtype.
        expect: (an output's name, the output without the change) -> the output with it.
        cases: names of the spec's cases on which it is judged.
        exact: whether the operator's own results must agree bit for bit; otherwise they must stay within the error budget of
            what is expected of the oracle's.
        backends: names of those that promise it; none named means all.
    """

    name: str
    change: Callable[[Inputs], Inputs]
    expect: Callable[[str, Tensor], Tensor]
    cases: tuple[str, ...]
    exact: bool = False
    backends: tuple[str, ...] = ()


def shifted(cases: tuple[str, ...], *, by: float = -256.0) -> Invariance:
    """A constant key bias moves the log-sum-exp and nothing else; on cases with neither a key bias nor sinks.

    Args:
        by: exact in 16 bits; -256 leaves nothing of an exponential whose maximum was not subtracted.
    """

    def change(inputs: Inputs) -> Inputs:
        keys: Tensor = inputs["k"]
        return inputs | {"key_bias": keys.new_full(keys.shape[:-2], by)}

    return Invariance("scores shifted", change, lambda name, output: output + by if name == "lse" else output, cases)


def permuted(what: str, dims: Mapping[str, int], cases: tuple[str, ...]) -> Invariance:
    """The order of what is summed over does not matter.

    Args:
        what: is permuted, in words.
        dims: argument -> the dimension along which it holds that; one permutation for all.
    """

    def change(inputs: Inputs) -> Inputs:
        present = {name: dim for name, dim in dims.items() if name in inputs}
        name, dim = next(iter(present.items()))
        order = torch.randperm(inputs[name].shape[dim], generator=torch.Generator().manual_seed(0)).to(inputs[name].device)
        return inputs | {name: inputs[name].index_select(dim, order) for name, dim in present.items()}

    return Invariance(f"{what} permuted", change, lambda name, output: output, cases)


def scaled(argument: str, cases: tuple[str, ...], *, factor: float = 8.0) -> Invariance:
    """`out` is linear in an argument, and a power of two commutes with rounding: bit for bit, on cases far from underflow."""
    return Invariance(
        f"{argument} x {factor:g}",
        lambda inputs: inputs | {argument: inputs[argument] * factor},
        lambda name, output: output * factor if name == "out" else output,
        cases,
        exact=True,
    )


def alone(dims: Mapping[str, int], cases: tuple[str, ...], backends: tuple[str, ...] = (), *, exact: bool = True) -> Invariance:
    """The last element of a batch gives the same alone.

    Args:
        dims: argument -> its batch dimension; that of outputs is the first.
        backends: those that promise it.
        exact: bit for bit.
    """

    def change(inputs: Inputs) -> Inputs:
        return inputs | {name: _last(inputs[name], dim) for name, dim in dims.items() if name in inputs}

    return Invariance("alone", change, lambda name, output: _last(output, 0), cases, exact, backends)


def _last(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, x.shape[dim] - 1, 1)
