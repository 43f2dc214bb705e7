"""The race of the entmax of rows: AdaSplash's kernel, the package entmax, and torch's softmax as a baseline."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.registry import Registry
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import Axis, Operator, Peer, Race, Shape, Sizes

__all__ = ["RACE", "alpha_axis", "choice", "package_entmax"]

_SPREAD = {"gauss": 6**0.5, "flat": 0.01}  # standard deviation of scores
_PASSES = {"fwd": 2, "fwd+bwd": 5}  # tensors read or written: x, p; then p and dp again, and dx


def choice(values: tuple[str, ...]) -> Callable[[str], str]:
    """Text that is one of some values."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"choose one of {', '.join(values)}")
        return text

    return parse


def alpha_axis() -> Axis:
    """Which entmax: 1.5 unless asked otherwise."""

    def parse(text: str) -> str:
        try:
            alpha = float(text)
        except ValueError:
            alpha = 0.0
        if not 1 < alpha <= 2:
            raise ValueError("give a number above 1 and at most 2")
        return f"{alpha:g}"

    return Axis("alpha of the entmax", ("1.5",), parse)


def package_entmax(alpha: float) -> Callable[[Tensor], Tensor]:
    """The function of the package entmax that is made for an alpha, along the last dimension."""
    package: Any = importlib.import_module("entmax")
    if alpha in (1.5, 2.0):
        sorting: Callable[..., Tensor] = package.entmax15 if alpha == 1.5 else package.sparsemax
        return lambda x: sorting(x, dim=-1)
    bisect: Callable[..., Tensor] = package.entmax_bisect
    return lambda x: bisect(x, alpha, dim=-1)


def _sizes(step: str, length: int, width: int, heads: tuple[int, int], batch: int) -> Sizes:
    return {"B": batch, "T": length}


def _inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    x = normal((shape.sizes["B"], shape.sizes["T"]), generator, shape.dtype)
    return {"x": x.mul_(_SPREAD[str(shape.variant["scores"])]), "alpha": float(shape.variant["alpha"])}


def _reduced(sizes: Sizes) -> Sizes:
    return {"B": min(sizes["B"], 16), "T": min(sizes["T"], 1024)}


def _traffic(shape: Shape) -> float:
    return _PASSES[shape.step] * shape.sizes["B"] * shape.sizes["T"] * shape.dtype.itemsize


def _adasplash(shape: Shape) -> Operator:
    activate: Operator = importlib.import_module("adasplash").triton_entmax
    return lambda x, alpha: activate(x, alpha=alpha)


def _bisection(shape: Shape) -> Operator:
    bisect: Operator = importlib.import_module("entmax").entmax_bisect
    return lambda x, alpha: bisect(x, alpha, dim=-1)


def _sorting(shape: Shape) -> Operator:
    activate = package_entmax(float(shape.variant["alpha"]))
    return lambda x, alpha: activate(x)


def _sorting_limits(shape: Shape) -> list[str]:
    alpha = shape.variant["alpha"]
    return [] if float(alpha) in (1.5, 2.0) else [f"alpha={alpha}; sorting is known for 1.5 and 2"]


def _softmax(shape: Shape) -> Operator:
    return lambda x, alpha: x.softmax(-1)


_PACKAGE: dict[str, Any] = {
    "devices": ("cpu", "cuda"),
    "module": "entmax",
    "install": "run: pip install entmax",
    "package": "entmax",
}
PEERS: Registry[Peer] = Registry("peer")
for _peer in (
    Peer(
        "adasplash",
        "AdaSplash's triton_entmax",
        _adasplash,
        module="adasplash",
        install="run: pip install adasplash",
        package="adasplash",
    ),
    Peer("entmax-sort", "the package entmax, exact after sorting", _sorting, _sorting_limits, **_PACKAGE),
    Peer("entmax-bisect", "the package entmax, 50 bisections", _bisection, **_PACKAGE),
    Peer("softmax", "torch's softmax", _softmax, devices=("cpu", "cuda"), same_result=False),
):
    PEERS.register(_peer.name, _peer)

RACE = Race(
    op="entmax",
    peers=PEERS,
    passes=("fwd", "fwd+bwd"),
    lengths={"cuda": (1024, 8192, 65536), "cpu": (256, 1024, 4096)},
    dims=(),
    heads=(1, 1),
    sizes=_sizes,
    inputs=_inputs,
    reduced=_reduced,
    grads=("x",),
    flops=None,
    traffic=_traffic,
    axes={"scores": Axis("what scores look like", ("gauss",), choice(tuple(_SPREAD))), "alpha": alpha_axis()},
    batch={"cuda": 8192, "cpu": 64},
)
