"""The implementations of the mLSTM, in order of preference, each with its reasons to refuse a call."""

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.mlstm.call import MLSTMCall
from attnkit.ops.mlstm.chunkwise import chunkwise
from attnkit.ops.mlstm.reference import recurrent

__all__ = ["BACKENDS"]

BACKENDS: tuple[Backend[MLSTMCall], ...] = (
    Backend("torch", chunkwise, lambda call: []),
    Backend("reference", recurrent, lambda call: [], avoids=only_when_named),
)
