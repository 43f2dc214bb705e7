"""A race of attention on small shapes against peers made for tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.registry import Registry
from attnkit.lab.bench import Peer, Race, Shape
from attnkit.lab.bench.races import RACES

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"lengths": [64], "dims": [16], "heads": (4, 2), "rounds": 3}


def shape(step: str = "fwd", length: int = 64, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(step, RACES["attention"].sizes(step, length, 16, (4, 2), 1), dtype, CPU)


def peer(name: str, operator: Callable[..., Tensor], **options: Any) -> Peer:
    return Peer(name, "for tests", lambda shape: operator, devices=("cpu",), **options)


def right(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out = ops.attention(q, k, v, causal=causal, backend="torch")
    assert isinstance(out, Tensor)
    return out


def race(*peers: Peer) -> Race:
    registry: Registry[Peer] = Registry("peer")
    for each in peers:
        registry.register(each.name, each)
    return dataclasses.replace(RACES["attention"], peers=registry)
