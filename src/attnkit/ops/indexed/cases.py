"""The conformance cases of the indexed operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.opspec import Case

__all__ = ["HASH_CASES", "INDEXED_CASES", "QK_CASES"]

Make = Callable[[torch.Generator], dict[str, Any]]
Options = Callable[[torch.Generator, tuple[int, ...], tuple[int, ...]], dict[str, Any]]
QKV = ("q", "k", "v")
ALONE = ("v",)  # of rows that see one key; the other gradients are differences of equal sums


def _case(
    options: Options,
    num_q: int,
    num_k: int | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 32,
    width_v: int | None = None,
    batch: int = 1,
    mean: float = 0.0,
    **fixed: Any,
) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        rows = (batch, num_q, heads[0]), (batch, num_q if num_k is None else num_k, heads[1])
        shapes = {"q": (*rows[0], width), "k": (*rows[1], width), "v": (*rows[1], width_v or width)}
        inputs: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        inputs["v"] += mean
        return inputs | {"return_lse": True} | options(generator, *rows) | fixed

    return make


def _any(groups: int, *, drop: float = 0.0) -> Options:
    """Positions in any order, with ties, and groups that a head has for itself."""

    def options(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, shape in zip("qk", rows, strict=True):
            found[f"{name}_pos"] = torch.randint(-50, 2 * shape[1] + 1, shape, generator=generator)
            found[f"{name}_group"] = torch.randint(-1 if drop else 0, groups, shape, generator=generator).int()
            if drop:
                found[f"{name}_keep"] = torch.rand(shape, generator=generator) >= drop
        return found | {"num_groups": groups}

    return options


def _shared(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
    """Positions and groups that heads and batch elements share."""
    found: dict[str, Any] = {}
    for name, shape in zip("qk", rows, strict=True):
        found[f"{name}_pos"] = torch.randperm(shape[1], generator=generator) * 100_000_000 % (2**31 - 1)
        found[f"{name}_group"] = torch.randint(0, 3, shape[:2], generator=generator)
    return found


def _default(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
    return {"q_pos": None, "k_pos": None}


def _kept(share: float, *, whole_heads: bool = False) -> Options:
    def options(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
        keep = {f"{name}_keep": torch.rand(shape, generator=generator) < share for name, shape in zip("qk", rows, strict=True)}
        if whole_heads:
            keep["q_keep"][..., 0] = False
            keep["k_keep"][..., -1] = False
        return keep

    return options


def _buckets(count: int, *, skew: float = 1.0, rounds: int = 0, same: bool = False, drop: bool = False) -> Options:
    """Uniform buckets, or with a skew above 1 ever more rows in the first; `same`: a token's query and key share theirs."""

    def options(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
        def draw(shape: tuple[int, ...]) -> Tensor:
            shape = (rounds, *shape) if rounds else shape
            return (torch.rand(shape, generator=generator) ** skew * count).int().clamp(max=count - 1)

        found: dict[str, Any] = {f"{name}_bucket": draw(shape) for name, shape in zip("qk", rows, strict=True)}
        if same:
            found["k_bucket"] = found["q_bucket"]
        if drop:
            found |= _kept(0.7)(generator, *rows)
        return found | {"num_buckets": count}

    return options


def _alone(generator: torch.Generator, *rows: tuple[int, ...]) -> dict[str, Any]:
    """Every token a bucket of its own."""
    order = torch.randperm(rows[0][1], generator=generator)
    return {"q_bucket": order, "k_bucket": order, "num_buckets": rows[0][1]}


def _spoilt(generator: torch.Generator) -> dict[str, Any]:
    """Dropped keys that hold NaN must not be felt."""
    inputs = _case(_kept(0.5), 65)(generator)
    for name in ("k", "v"):
        inputs[name][~inputs["k_keep"]] = torch.nan
    return inputs


INDEXED_CASES = (
    Case("positions and groups of each head", _case(_any(3), 70, 90), QKV),
    Case("strict, grouped heads, dropped rows", _case(_any(2, drop=0.3), 65, heads=(4, 2), batch=2, causal="strict"), QKV),
    Case("no order, grouped heads, dropped rows", _case(_any(2, drop=0.3), 33, 65, heads=(4, 1), causal=None), QKV),
    Case("shared positions far apart, groups not counted", _case(_shared, 65, heads=(2, 1), batch=2), QKV),
    Case("default positions, softcap", _case(_default, 40, 65, softcap=2.0), QKV),
    Case("wider values around 2", _case(_any(2), 65, width=24, width_v=40, mean=2.0), QKV),
    Case("one token", _case(_default, 1), ALONE),
    Case("no queries", _case(_any(2), 0, 7), QKV),
    Case("no keys", _case(_any(2), 7, 0), QKV),
    Case("no lse", _case(_any(2), 65, return_lse=False), QKV),
    Case("width 256", _case(_any(1), 100, width=256), QKV, level="full"),
    Case("300 tokens, grouped heads", _case(_any(5, drop=0.2), 300, heads=(6, 2)), QKV, level="full"),
)
QK_CASES = (
    Case("half kept", _case(_kept(0.5), 150), QKV),
    Case("half kept, grouped heads, fewer queries than keys", _case(_kept(0.5), 65, 100, heads=(4, 2), batch=2), QKV),
    Case("all kept", _case(_kept(2.0), 65), QKV),
    Case("none kept", _case(_kept(-1.0), 33), QKV),
    Case("heads without a kept row", _case(_kept(0.5, whole_heads=True), 65, heads=(4, 2)), QKV),
    Case("not causal", _case(_kept(0.4), 65, causal=False), QKV),
    Case("NaN in dropped keys", _spoilt, ("q",)),
    Case("values around 2", _case(_kept(0.7), 200, width=64, mean=2.0), QKV, bias=FLOATS),
    Case("no lse", _case(_kept(0.5), 65, return_lse=False), QKV),
    Case("more queries than keys", _case(_kept(0.5), 100, 65), QKV, level="full"),
    Case("one kept in ten, 500 tokens", _case(_kept(0.1), 500, width=80), QKV, level="full"),
)
HASH_CASES = (
    Case("8 buckets", _case(_buckets(8), 150), QKV),
    Case("shared buckets, grouped heads", _case(_buckets(4), 65, heads=(4, 2), batch=2), QKV),
    Case("strict", _case(_buckets(4, same=True), 65, self_attend=False), QKV),
    Case("one bucket", _case(_buckets(1), 65), QKV),
    Case("one bucket holds most rows", _case(_buckets(8, skew=6.0), 150), QKV),
    Case("every token alone", _case(_alone, 33), ALONE),
    Case("every token alone, strict", _case(_alone, 17, self_attend=False), QKV),
    Case("two rounds, values around 2", _case(_buckets(4, rounds=2), 65, heads=(4, 2), mean=2.0), QKV),
    Case("dropped rows, fewer queries than keys", _case(_buckets(3, drop=True), 20, 65, heads=(4, 2)), QKV),
    Case("no lse", _case(_buckets(4), 65, return_lse=False), QKV),
    Case("three rounds, strict", _case(_buckets(5, rounds=3), 100, self_attend=False), QKV, level="full"),
    Case("64 buckets, 600 tokens", _case(_buckets(64), 600, width=64), QKV, level="full"),
)
