"""The conformance cases of entmax attention."""

from collections.abc import Callable
from typing import Any

import torch

from attnkit._core.opspec import Case

__all__ = ["CASES"]

Make = Callable[[torch.Generator], dict[str, Any]]
HALVES = (torch.float16, torch.bfloat16)
QKV = ("q", "k", "v")


def _dense(
    num_q: int,
    num_k: int | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 32,
    width_v: int | None = None,
    batch: int = 1,
    sharp: float = 1.0,
    mean: float = 0.0,
    bias: str = "",
    learned: bool = False,
    **options: Any,
) -> Make:
    """`sharp` multiplies scores, `mean` is added to values, `learned` gives each head an alpha."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        keys = num_q if num_k is None else num_k
        shapes = {"q": (num_q, heads[0], width), "k": (keys, heads[1], width), "v": (keys, heads[1], width_v or width)}
        inputs: dict[str, Any] = {name: torch.randn(batch, *s, generator=generator) for name, s in shapes.items()}
        inputs["q"] *= sharp
        inputs["v"] += mean
        if bias:
            shape = (batch, keys, heads[1]) if bias == "per head" else (batch, keys)
            hidden = torch.rand(*shape, generator=generator) < 0.3
            if bias == "all masked":
                hidden[0] = True
            inputs["key_bias"] = torch.zeros(shape).masked_fill(hidden, -torch.inf)
            if bias == "NaN":
                inputs["k"][hidden], inputs["v"][hidden] = torch.nan, torch.nan
        if learned:
            # near 2 the weights U of pairs at the threshold rise so steeply that their gradients are ill-conditioned
            inputs["alpha"] = 1.2 + 0.5 * torch.rand(heads[0], generator=generator)
        return inputs | options

    return make


def _packed(lengths_q: list[int], lengths_k: list[int] | None = None, **options: Any) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        lengths = (lengths_q, lengths_k or lengths_q)
        inputs = _dense(sum(lengths[0]), sum(lengths[1]), heads=(4, 2), sharp=2.0, **options)(generator)
        inputs |= {name: inputs[name][0] for name in QKV}
        boundaries = (torch.tensor([0, *part]).cumsum(0).int() for part in lengths)
        return inputs | dict(zip(("cu_seqlens_q", "cu_seqlens_k"), boundaries, strict=True))

    return make


def _strided(generator: torch.Generator) -> dict[str, Any]:
    """Heads before tokens in memory, as Hugging Face models hold them."""
    inputs = _dense(65, heads=(4, 2), batch=2, causal=True)(generator)
    return inputs | {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in QKV}


CASES = (
    Case("one token", _dense(1, causal=True, return_aux=True), ("v",)),
    Case("causal, grouped heads", _dense(127, heads=(6, 2), batch=2, causal=True, return_aux=True), QKV),
    Case("dense, one key head", _dense(65, 130, heads=(4, 1), return_aux=True), QKV),
    Case("sharp scores", _dense(200, heads=(4, 2), sharp=6.0, causal=True, return_aux=True), QKV),
    Case("flat scores", _dense(130, 600, sharp=0.1, return_aux=True), QKV),
    *(
        Case(f"alpha {alpha:.4g}", _dense(97, 130, heads=(4, 2), sharp=2.0, causal=True, alpha=alpha, return_aux=True), QKV)
        for alpha in (1.1, 1.25, 4 / 3, 1.75, 2)
    ),
    Case("alpha 1: softmax", _dense(97, heads=(4, 2), causal=True, alpha=1), QKV),
    Case("an alpha for each head", _dense(97, heads=(4, 2), batch=2, causal=True, learned=True), (*QKV, "alpha"), ("alpha",)),
    Case("causal, fewer queries than keys", _dense(33, 333, heads=(4, 2), sharp=2.0, causal=True), QKV),
    Case("causal, more queries than keys", _dense(150, 65, causal=True, return_aux=True), QKV),
    Case("one query on many keys", _dense(1, 700, heads=(8, 2), width=64, causal=True), QKV),
    Case("several tiles", _dense(700, width=16, causal=True), QKV),
    Case("window", _dense(200, causal=True, sharp=2.0, window_size=(64, 0)), QKV),
    Case("two-sided window", _dense(130, 150, window_size=(17, 40)), QKV),
    Case("softcap", _dense(129, causal=True, sharp=3.0, softcap=2.0), QKV),
    Case("masked keys", _dense(127, 200, heads=(4, 2), batch=2, bias="shared", return_aux=True), QKV),
    Case("masked keys per head, causal", _dense(127, heads=(4, 2), bias="per head", causal=True), QKV),
    Case("rows that see nothing", _dense(65, batch=2, bias="all masked", causal=True, return_aux=True), QKV),
    Case("NaN under the mask", _dense(65, heads=(4, 2), batch=2, bias="NaN", causal=True), ("q",)),
    Case("values wider than keys", _dense(65, width=32, width_v=80, causal=True), QKV),
    Case("values narrower than keys", _dense(65, width=96, width_v=64), QKV),
    Case("width 256", _dense(33, width=256, causal=True), QKV, level="full"),
    Case("heads first in memory", _strided, QKV),
    Case("packed", _packed([63, 1, 130], causal=True, return_aux=True), QKV),
    Case(
        "packed, empty sequences, T != S",
        _packed([5, 0, 64, 7], [9, 12, 64, 0], causal=True, window_size=(20, None), return_aux=True),
        QKV,
    ),
    Case("packed, an alpha for each head", _packed([40, 0, 33], learned=True), (*QKV, "alpha"), ("alpha",)),
    Case("values around 2", _dense(127, 192, heads=(4, 2), batch=2, width=64, mean=2.0, return_aux=True), QKV, bias=HALVES),
    Case("no queries", _dense(0, 7, causal=True), QKV),
    Case("no keys", _dense(7, 0), QKV),
    Case("empty batch", _dense(5, batch=0, causal=True), QKV),
    Case("500 tokens", _dense(500, heads=(4, 2), width=64, sharp=3.0, causal=True), QKV, level="full"),
)
