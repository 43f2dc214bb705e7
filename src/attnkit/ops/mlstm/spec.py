"""What the mLSTM publishes about itself: oracle, invariances, capabilities, refusals."""

from typing import Any

from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone
from attnkit._core.opspec import Budget, OpSpec, Refusal
from attnkit.ops._chunkwise_core.conformance import arguments, flattened, linear, rechunked
from attnkit.ops.mlstm.api import mlstm
from attnkit.ops.mlstm.backends import BACKENDS
from attnkit.ops.mlstm.call import prepare
from attnkit.ops.mlstm.cases import CASES
from attnkit.ops.mlstm.reference import recurrent, row_scale

__all__ = ["SPEC", "SPECS"]


def _oracle(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return flattened(recurrent(prepare(*args, **kwargs)))


def _naive(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return flattened(recurrent(prepare(*args, **kwargs), rounded=True))


SPEC = OpSpec(
    name="mlstm",
    summary="a matrix memory with exponential or sigmoid gates and a normaliser, chunk by chunk (mLSTM)",
    source="Beck et al. 2025 (arXiv:2503.14376)",
    function=mlstm,
    outputs=("out", "S", "n", "m"),
    cases=CASES,
    oracle=_oracle,
    naive=_naive,
    prepare=prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=("O_out", "grad_out"),
    row_scale=lambda **kwargs: row_scale(prepare(**kwargs)),
    arguments=arguments,
    wide=("S", "n", "m"),
    # where eps outweighs the least denominator the gradient of a gate is a difference of two that are rounded before; a state
    # is rounded once for all rows of a chunk, where the plain form rounds anew for each
    budget=Budget(backward=3.5, backward_ulps=10.0),
    invariances=(
        linear(("values around 2",)),
        rechunked(16, ("grouped heads", "packed, empty sequences, from states")),
        rechunked(512, ("grouped heads", "from a state")),
        alone(dict.fromkeys(("q", "k", "v", "i", "f", "S", "n", "m"), 0), ("grouped heads", "from a state"), exact=False),
    ),
    capabilities={
        "cpu": "yes, chunk by chunk in plain torch",
        "cuda": "yes, Triton kernels where D is at most 256 and chunks have at most 512 rows, else plain torch",
        "backward": "yes, states and normaliser included; deterministic",
        "packed": "yes, empty sequences included",
        "grouped heads": "any H that is a multiple of Hkv; gates and states belong to the heads of k",
        "compile": "yes, fullgraph",
        "head width": "any, D != Dv",
        "memory": "linear in T: one state a chunk beyond inputs and outputs, in backward two",
        "float64": "yes",
    },
    refusals=(
        Refusal('normalize=False with input_gate="exp"', "sums of exponential gates leave the range of floats"),
        Refusal("chunk_size that is no power of two from 16 on", "kernels have no other tiles"),
        Refusal(
            "an initial_state that lacks a part, or has one too many", "it comes from a call with other gates or normaliser"
        ),
        Refusal("a backward pass of the backward pass", "gradients are first order"),
    ),
)
SPECS = (SPEC,)
