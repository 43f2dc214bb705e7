"""Conformance cases of query moments."""

from typing import Any

import torch

from attnkit._core.opspec import Case

__all__ = ["CASES"]

_FIXED = ("inv_freq", "shift")


def _case(
    name: str,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    level: str = "fast",
    turning: int | None = None,
    start: int = 0,
    alike: bool = True,
    shifted: bool = True,
    real: str = "",
    skip: int = 0,
    **options: Any,
) -> Case:
    """`turning` channels of `width` (all of them; 0 is no rotation), from position `start`, rows `alike` or each its own;
    `real` is "", "left", "right" or "some".
    """

    def make(generator: torch.Generator) -> dict[str, Any]:
        level = 4 * torch.randn(batch, heads, width, generator=generator) * shifted
        inputs: dict[str, Any] = {"q": torch.randn(batch, tokens, heads, width, generator=generator) + level[:, None]}
        pairs = (width if turning is None else turning) // 2
        position = torch.arange(tokens)
        if pairs:
            inputs["inv_freq"] = 10_000.0 ** -(torch.arange(pairs) / pairs)
            own = position + 37 * torch.arange(batch)[:, None]
            inputs["positions"] = start + (position if alike else own)
        if shifted:
            inputs["shift"] = level + 0.1 * torch.randn(batch, heads, width, generator=generator)
        if real in ("left", "right"):
            length = torch.linspace(0, tokens, batch).long()[:, None]
            inputs["real"] = position < length if real == "right" else position >= tokens - length
        elif real == "some":
            inputs["real"] = torch.rand(batch, tokens, generator=generator) < 0.6
        if skip:
            inputs["skip"] = skip * torch.arange(batch)
        return inputs | options

    return Case(name, make, fixed=_FIXED, level=level)


CASES = (
    _case("queries that were turned", 2, 150, 3, 64),
    _case("far away", 1, 70, 2, 64, start=100_000),
    _case("interleaved pairs", 2, 130, 2, 32, interleaved=True),
    _case("some channels turn", 2, 90, 2, 80, turning=32),
    _case("some interleaved channels turn", 1, 90, 2, 48, turning=20, interleaved=True),
    _case("an odd width", 1, 65, 2, 17, turning=8),
    _case("one channel", 2, 20, 2, 1, turning=0),
    _case("the usual width", 1, 100, 2, 128),
    _case("wide heads", 1, 70, 1, 200, turning=100),
    _case("the widest heads, interleaved", 1, 40, 1, 256, interleaved=True),
    _case("no rotation", 2, 129, 2, 64, turning=0),
    _case("queries as they are", 2, 129, 2, 64, turning=0, shifted=False),
    _case("no shift", 2, 80, 2, 32, shifted=False),
    _case("padding on the left, a row of nothing", 3, 80, 2, 32, real="left", alike=False, skip=4),
    _case("padding on the right, a row of nothing", 3, 80, 2, 32, real="right", skip=30),
    _case("tokens here and there", 2, 100, 2, 32, real="some", start=500, alike=False),
    _case("first tokens left out", 4, 60, 2, 32, skip=25),
    _case("one token", 2, 1, 2, 16),
    _case("no tokens", 2, 0, 2, 16),
    _case("no rows", 0, 7, 2, 16),
    _case("several parts", 1, 5000, 1, 32, level="full"),
)
