"""The implementations of entmax, in order of preference, each with its reasons to refuse a call."""

import torch
from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops.entmax._register import run_torch, run_triton
from attnkit.ops.entmax.call import EntmaxCall
from attnkit.ops.entmax.reference import dense_entmax

__all__ = ["BACKENDS"]


def _is_softmax(call: EntmaxCall) -> bool:
    return call.alphas is None and call.alpha == 1


def _triton_refuses(call: EntmaxCall) -> list[str]:
    own = ["alpha=1, which is torch's softmax"] if _is_softmax(call) else []
    return kernels_refuse(call.rows.device, call.rows.dtype, *own)


def _triton_avoids(call: EntmaxCall) -> list[str]:
    return kernels_avoid(call.rows.device)


def _triton(call: EntmaxCall) -> Tensor:
    prob: Tensor = run_triton(call.rows, call.alphas, call.alpha)
    return prob


def _torch(call: EntmaxCall) -> Tensor:
    if _is_softmax(call):
        empty = torch.isneginf(call.rows).all(-1, keepdim=True)
        return torch.softmax(call.rows.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    prob: Tensor = run_torch(call.rows, call.alphas, call.alpha)
    return prob


def _reference(call: EntmaxCall) -> Tensor:
    wide = call.rows.to(torch.promote_types(call.rows.dtype, torch.float32))
    return dense_entmax(wide, call.alpha if call.alphas is None else call.alphas)[0].to(call.rows.dtype)


BACKENDS: tuple[Backend[EntmaxCall], ...] = (
    Backend("triton", _triton, _triton_refuses, _triton_avoids),
    Backend("torch", _torch, lambda call: []),
    Backend("reference", _reference, lambda call: [], avoids=only_when_named),
)
