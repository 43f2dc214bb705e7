"""The implementations of ragged decode attention, in order of preference, each with its reasons to refuse a call."""

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.ragged_decode._register import run_torch
from attnkit.ops.ragged_decode.call import RaggedCall
from attnkit.ops.ragged_decode.reference import reference, reference_refuses

__all__ = ["BACKENDS"]

BACKENDS: tuple[Backend[RaggedCall], ...] = (
    Backend("torch", run_torch, lambda call: []),
    Backend("reference", reference, reference_refuses, avoids=only_when_named),
)
