"""What `mlstm_step` publishes about itself: cases, oracle, capabilities."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone
from attnkit._core.opspec import Case, OpSpec
from attnkit.ops._chunkwise_core.conformance import STEP_CAPABILITIES, Make, draw, flattened, step_arguments, whole
from attnkit.ops._chunkwise_core.step import STEP_BACKENDS
from attnkit.ops.mlstm.api import mlstm_step
from attnkit.ops.mlstm.call import parts_of, prepare, prepare_step
from attnkit.ops.mlstm.reference import recurrent, row_scale

__all__ = ["SPECS"]

FIXED = ("i", "f", "S", "n", "m")


def _make(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    width_v: int = 24,
    *,
    special: bool = False,
    positive: bool = False,
    **options: Any,
) -> Make:
    """Gates of which some are infinite if `special`; of `positive` states, queries and keys all scores are."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        parts = parts_of(options.get("input_gate", "exp"), options.get("normalize", True))
        inputs = draw(generator, (batch,), heads, width, width_v, states=batch, parts=parts, positive=positive)
        if positive:
            inputs["n"] = inputs["n"].abs()
        inputs |= {name: torch.randn(batch, heads[1], generator=generator) for name in "if"}
        if special:
            inputs["i"][0], inputs["f"][1, 0], inputs["f"][1, 1] = -torch.inf, torch.inf, -torch.inf
        return inputs | options

    return make


def _first(result: Any) -> tuple[Tensor, ...]:
    out, *state = flattened(result)
    return out[:, 0], *state


ALL = ("q", "k", "v", "i", "f")
SPECS = (
    OpSpec(
        name="mlstm_step",
        summary="one token of the mLSTM, for decoding",
        source="Beck et al. 2025 (arXiv:2503.14376)",
        function=mlstm_step,
        outputs=("out", "S", "n", "m"),
        cases=(
            Case("grouped heads", _make(), (*ALL, "S", "n", "m"), FIXED),
            Case("sigmoid", _make(input_gate="sigmoid"), ALL, FIXED),
            Case("sigmoid, not normalised", _make(heads=(2, 2), input_gate="sigmoid", normalize=False), ALL, FIXED),
            Case("wide heads", _make(1, (3, 1), 300, 40, positive=True), (), FIXED),
            Case("open and closed gates", _make(special=True, positive=True), (), FIXED),
        ),
        oracle=lambda **inputs: _first(recurrent(prepare(**whole(inputs)))),
        naive=lambda **inputs: _first(recurrent(prepare(**whole(inputs)), rounded=True)),
        prepare=prepare_step,
        backends=STEP_BACKENDS,
        dtypes=FLOATS,
        sites=("O_out", "grad_out"),
        row_scale=lambda **inputs: row_scale(prepare(**whole(inputs)))[:, 0],
        arguments=step_arguments,
        wide=("S", "n", "m"),
        invariances=(alone(dict.fromkeys((*ALL, "S", "n", "m"), 0), ("grouped heads",), ("triton",)),),
        capabilities=STEP_CAPABILITIES,
    ),
)
