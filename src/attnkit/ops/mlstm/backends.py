"""The implementations of the mLSTM, in order of preference, each with its reasons to refuse a call."""

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops._chunkwise_core._register import run_chunkwise_triton, run_gate_scan_triton
from attnkit.ops._chunkwise_core.refusals import triton_avoids, triton_refuses
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.mlstm.call import MLSTMCall
from attnkit.ops.mlstm.chunkwise import chunkwise
from attnkit.ops.mlstm.reference import recurrent

__all__ = ["BACKENDS"]


def _triton(call: MLSTMCall) -> tuple[Tensor, RecurrentState]:
    return chunkwise(call, run_chunkwise_triton, run_gate_scan_triton)


BACKENDS: tuple[Backend[MLSTMCall], ...] = (
    Backend("triton", _triton, triton_refuses, triton_avoids),
    Backend("torch", chunkwise, lambda call: []),
    Backend("reference", recurrent, lambda call: [], avoids=only_when_named),
)
