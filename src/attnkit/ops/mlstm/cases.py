"""The conformance cases of the mLSTM."""

from typing import Any

import torch

from attnkit._core.opspec import Case
from attnkit.ops._chunkwise_core.conformance import Make, draw, packed
from attnkit.ops.mlstm.call import parts_of

__all__ = ["CASES"]

QKV, GATES, STATE = ("q", "k", "v"), ("i", "f"), ("S", "n", "m")
ALL, FIXED = QKV + GATES, GATES + STATE
SIGMOID: dict[str, Any] = {"input_gate": "sigmoid"}
PLAIN = SIGMOID | {"normalize": False}


def _make(
    length: int | list[int],
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 16,
    width_v: int = 24,
    batch: int = 1,
    i: float = 0.0,
    f: float = 3.0,
    spread: float = 1.0,
    state: bool = False,
    mean: float = 0.0,
    positive: bool = False,
    special: bool = False,
    **options: Any,
) -> Make:
    """Gates are drawn around `i` and `f`; `special` sets some to infinity; of `positive` queries and keys all scores are."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        rows = (sum(length),) if isinstance(length, list) else (batch, length)
        parts = parts_of(options.get("input_gate", "exp"), options.get("normalize", True))
        count = (len(length) if isinstance(length, list) else batch) if state else 0
        inputs = draw(generator, rows, heads, width, width_v, states=count, parts=parts, mean=mean, positive=positive)
        for name, centre in (("i", i), ("f", f)):
            inputs[name] = centre + spread * torch.randn(*rows, heads[1], generator=generator)
        if special:
            inputs["i"][:, 3::7] = -torch.inf
            inputs["f"][:, 5::11] = torch.inf
            inputs["f"][:, 29] = -torch.inf
        if isinstance(length, list):
            inputs = packed(inputs, length)
        return inputs | options

    return make


def _extreme(generator: torch.Generator) -> dict[str, Any]:
    """Gates anywhere in -90..90; no score is near 0, which would be divided by where one token outweighs all others."""
    inputs = _make(70, heads=(4, 2), batch=2, positive=True)(generator)
    return inputs | {name: 180 * torch.rand(2, 70, 2, generator=generator) - 90 for name in GATES}


def _strided(generator: torch.Generator) -> dict[str, Any]:
    """Heads before tokens in memory, as Hugging Face models hold them."""
    inputs = _make(65, heads=(4, 2), batch=2)(generator)
    return inputs | {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ALL}


CASES = (
    Case("one token", _make(1), QKV, FIXED),
    Case("grouped heads", _make(127, heads=(4, 2), batch=2), ALL, FIXED),
    Case("sigmoid", _make(100, batch=2, **SIGMOID), ALL, FIXED),
    Case("sigmoid, not normalised", _make(100, heads=(4, 2), **PLAIN), ALL, FIXED),
    Case("from a state", _make(65, heads=(4, 2), batch=2, state=True), ALL + STATE, FIXED),
    Case("sigmoid, from a state", _make(33, state=True, **SIGMOID), (*ALL, "S", "n"), FIXED),
    Case("sigmoid, not normalised, from a state", _make(33, state=True, **PLAIN), (*ALL, "S"), FIXED),
    Case("packed, empty sequences, from states", _make([63, 0, 1, 40, 0], heads=(4, 2), state=True), ALL + STATE, FIXED),
    Case("packed, sigmoid, not normalised", _make([5, 70, 0, 9], **PLAIN), ALL, FIXED),
    Case("chunks of 16", _make(81, chunk_size=16), ALL, FIXED),
    Case("chunks of 256", _make(81, chunk_size=256, **SIGMOID), ALL, FIXED),
    Case("gates anywhere in -90..90", _extreme, ALL, FIXED),
    Case("open and closed gates", _make(70, special=True), ALL, FIXED),
    Case("hardly any input", _make(65, i=-10.0, spread=0.3), ALL, FIXED),
    Case("nothing forgotten", _make(65, f=15.0, i=2.0), ALL, FIXED),
    Case("values narrower than keys", _make(40, width=48, width_v=8), ALL, FIXED),
    Case("values around 2", _make(100, heads=(4, 2), width=64, width_v=64, batch=2, mean=2.0, positive=True), (), FIXED,
         bias=(torch.float16, torch.bfloat16)),
    Case("heads first in memory", _strided, QKV, FIXED),
    Case("no tokens", _make(0, state=True), (), FIXED),
    Case("empty batch", _make(5, batch=0), (), FIXED),
    Case("600 tokens", _make(600, heads=(4, 2), width=64, width_v=128, f=5.0), ALL, FIXED, level="full"),
)  # fmt: skip
