"""Conformance cases of expected attention."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.opspec import Case

__all__ = ["CASES"]

_FIXED = ("mean", "cov", "output_gram")


def _spread(generator: torch.Generator, *shape: int) -> Tensor:
    """Positive definite matrices [*shape, n, n] with an average variance of 1, a few directions of them large."""
    width = shape[-1]
    root = torch.randn(*shape, width, generator=generator) / width**0.5
    root[..., : max(1, width // 8)] *= 2
    return torch.matmul(root, root.mT)


def _case(
    name: str,
    batch: int,
    keys: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    *,
    level: str = "fast",
    bias: tuple[torch.dtype, ...] = (),
    without: tuple[str, ...] = (),
    valid: str = "",
    size: float = 1.0,
    **options: Any,
) -> Case:
    """heads (H, Hkv), widths (D, Dv); `valid` is "", "left", "right" or "heads"; `size` of queries."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        h, kv_heads = heads
        d, dv = widths
        inputs: dict[str, Any] = {
            "k": torch.randn(batch, keys, kv_heads, d, generator=generator),
            "v": torch.randn(batch, keys, kv_heads, dv, generator=generator),
            "mean": size * torch.randn(batch, h, d, generator=generator),
            "cov": size**2 * _spread(generator, batch, h, d),
        }
        if "cov" in without:
            inputs["cov"] = None
        if options.get("value_norm") == "output":
            inputs["output_gram"] = _spread(generator, h, dv)
        position = torch.arange(keys)
        if valid in ("left", "right"):
            length = torch.linspace(0, keys, batch).long()[:, None]
            inputs["valid"] = position < length if valid == "right" else position >= keys - length
        elif valid == "heads":
            inputs["valid"] = torch.rand(batch, keys, kv_heads, generator=generator) < 0.6
            inputs["valid"][0, :, 0] = False
        return inputs | options

    return Case(name, make, fixed=_FIXED, level=level, bias=bias)


CASES = (
    _case("grouped heads", 2, 150, (8, 2), (64, 64)),
    _case("every head its own keys, no sinks", 1, 130, (3, 3), (32, 48), sinks=0),
    _case("one key head", 2, 129, (4, 1), (16, 16), eps=0.02),
    _case("narrow heads, odd widths", 1, 70, (6, 3), (9, 17)),
    _case("wide heads", 1, 65, (2, 1), (136, 200)),
    _case("the widest heads", 1, 40, (2, 1), (256, 256)),
    _case("the mean alone", 2, 100, (4, 2), (64, 64), without=("cov",), eps=0.01),
    _case("sizes of outputs", 2, 90, (4, 2), (64, 32), value_norm="output", eps=0.01),
    _case("no values", 1, 90, (4, 2), (32, 32), value_norm="none"),
    _case("padding on the left, a row of nothing", 3, 80, (4, 2), (32, 32), valid="left", eps=0.02),
    _case("padding on the right, a row of nothing", 3, 80, (4, 2), (32, 32), valid="right", value_norm="none"),
    _case("a head's own keys", 2, 140, (4, 2), (32, 32), valid="heads"),
    _case("few keys, all sinks", 2, 3, (2, 1), (16, 16)),
    _case("steep logits", 1, 140, (4, 2), (64, 64), size=4.0),
    _case("own scale", 1, 70, (2, 2), (32, 32), scale=0.05),
    _case("no keys", 2, 0, (2, 1), (16, 16)),
    _case("no rows", 0, 7, (2, 1), (16, 16)),
    _case("many tiles", 1, 5000, (2, 1), (32, 32), level="full"),
)
