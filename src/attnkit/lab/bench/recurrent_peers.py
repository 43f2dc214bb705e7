"""Who races the recurrences: NXAI's kernels of the mLSTM, flash-linear-attention, and dense attention of equal width."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.lab.bench.attention import PEERS
from attnkit.lab.bench.race import Operator, Peer, Shape
from attnkit.ops import RecurrentState

__all__ = ["dense_beside", "fla", "fla_lightning", "fla_mlstm", "fla_step", "nxai", "nxai_step", "nxai_unjudged"]

_CHUNK = 128  # rows of a chunk of theirs; longer ones have wrong gradients in 2.0.6
_DENSE_WIDTH = 128
_NXAI: dict[str, Any] = {
    "module": "mlstm_kernels", "install": "run: pip install mlstm-kernels", "package": "mlstm_kernels",
}  # fmt: skip
_FLA: dict[str, Any] = {
    "module": "fla", "install": "run: pip install flash-linear-attention", "package": "flash-linear-attention",
}  # fmt: skip


def _heads_alone(shape: Shape) -> list[str]:
    return ["query heads that share a state"] if shape.sizes["H"] != shape.sizes["Hkv"] else []


def _nxai_limits(shape: Shape) -> list[str]:
    reasons, length = _heads_alone(shape), shape.sizes["T"]
    return [*reasons, f"T={length}; it takes multiples of {_CHUNK}"] if length % _CHUNK else reasons


def _nxai(shape: Shape) -> Operator:
    get: Callable[[str], Operator] = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel
    exponential = shape.variant["gates"] == "exp"
    kernel = get(f"chunkwise--triton_xl_chunk{'' if exponential else '_siging'}")
    options: dict[str, Any] = {"chunk_size": _CHUNK, "return_last_states": True, "autocast_kernel_dtype": shape.dtype}
    if not exponential:
        options["normalize"] = shape.variant["gates"] == "sigmoid"

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **_: Any) -> tuple[Tensor, RecurrentState]:
        heads_first = (t.transpose(1, 2) for t in (q, k, v, i, f))
        out, (S, *rest) = kernel(*heads_first, **options)
        parts = [part.reshape(part.shape[:2] if place else part.shape[:3]) for place, part in enumerate(rest)]
        if shape.variant["gates"] == "plain":
            parts = []  # sums that are not asked for
        return out.transpose(1, 2), RecurrentState(S, *parts)

    return run


def _nxai_step(shape: Shape) -> Operator:
    kernel: Operator = importlib.import_module("mlstm_kernels.torch").get_mlstm_step_kernel("triton")

    def run(
        q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: RecurrentState, **_: Any
    ) -> tuple[Tensor, RecurrentState]:
        assert state.n is not None
        assert state.m is not None
        out, (S, n, m) = kernel(q, k, v, i[..., None], f[..., None], c=state.S, n=state.n, m=state.m[..., None])
        return out, RecurrentState(S, n, m[..., 0])

    return run


def _only_exponential(shape: Shape) -> list[str]:
    return [*_heads_alone(shape), *(["it has exponential gates only"] if shape.variant["gates"] != "exp" else [])]


def _simple_gla(name: str = "chunk_simple_gla") -> Operator:
    function: Operator = getattr(importlib.import_module("fla.ops.simple_gla"), name)
    return function


def _fla(shape: Shape) -> Operator:
    function = _simple_gla()

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, RecurrentState]:
        out, S = function(q, k, v, g=g, output_final_state=True)
        return out, RecurrentState(S)

    return run


def _fla_lightning(shape: Shape) -> Operator:
    function = _simple_gla()

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, RecurrentState]:
        out, S = function(q, k, v, g_gamma=-slopes, output_final_state=True)
        return out, RecurrentState(S)

    return run


def _fla_mlstm(shape: Shape) -> Operator:
    inner = _fla(shape)

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **_: Any) -> Any:
        return inner(q, k * torch.sigmoid(i)[..., None].to(k.dtype), v, F.logsigmoid(f))

    return run


def _fla_mlstm_limits(shape: Shape) -> list[str]:
    reasons = _heads_alone(shape)
    return reasons if shape.variant["gates"] == "plain" else [*reasons, "it has sigmoid gates without a normaliser only"]


def _fla_step(shape: Shape) -> Operator:
    function = _simple_gla("fused_recurrent_simple_gla")

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        rows = (t[:, None] for t in (q, k, v, g))
        out, S = function(*rows, initial_state=state.S, output_final_state=True)
        return out[:, 0], RecurrentState(S)

    return run


class _Beside(torch.autograd.Function):
    """Runs something on tensors of its own, forward and backward, in the place of an operator on other tensors."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[[], Tensor], own: tuple[Tensor, ...], *given: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.out = attend()
        ctx.own, ctx.given = own, given
        return ctx.out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        torch.autograd.grad(ctx.out, ctx.own, upstream[0])
        return None, None, *ctx.given  # some tensors of the right shapes, which nobody judges


def _dense_shape(shape: Shape) -> Shape:
    """Heads of width 128 that together are as wide as the values."""
    values = shape.sizes["H"] * shape.sizes["D"] * int(shape.variant["dv"])
    heads = max(values // _DENSE_WIDTH, 1)
    sizes = {"B": shape.sizes["B"], "T": shape.sizes["T"], "H": heads, "Hkv": heads, "D": values // heads}
    return dataclasses.replace(shape, sizes=sizes, variant={})


def _dense(name: str) -> Callable[[Shape], Operator]:
    def make(shape: Shape) -> Operator:
        dense = _dense_shape(shape)
        attend = PEERS[name].make(dense)
        size = (dense.sizes["B"], dense.sizes["T"], dense.sizes["H"], dense.sizes["D"])
        own = tuple(torch.randn(size, dtype=shape.dtype, device=shape.device, requires_grad=shape.trains) for _ in "qkv")

        def run(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
            def call() -> Tensor:
                out: Tensor = attend(q=own[0], k=own[1], v=own[2], causal=True)
                return out.reshape(*q.shape[:-1], -1)

            if not shape.trains:
                return call()
            gates = (t for t in others.values() if isinstance(t, Tensor) and t.requires_grad)
            out: Tensor = _Beside.apply(call, own, q, k, v, *gates)  # type: ignore[no-untyped-call]
            return out

        return run

    return make


def _dense_limits(name: str) -> Callable[[Shape], list[str]]:
    return lambda shape: PEERS[name].limits(_dense_shape(shape))


def dense_beside() -> list[Peer]:
    """Dense causal attention as wide as the values, in heads of 128, on tensors of its own: from which length it loses."""
    return [
        dataclasses.replace(
            PEERS[name],
            summary=f"dense causal softmax attention in heads of {_DENSE_WIDTH} as wide as the values, {PEERS[name].summary}",
            make=_dense(name),
            limits=_dense_limits(name),
            same_result=False,
        )
        for name in ("sdpa", "sdpa-flash", "cudnn", "fa4")
    ]


nxai = Peer("mlstm-kernels", f"NXAI's Triton kernels, chunks of {_CHUNK}", _nxai, _nxai_limits, **_NXAI)
nxai_unjudged = dataclasses.replace(
    nxai,
    name="mlstm-kernels-unjudged",
    summary=f"{nxai.summary}, whose gradients leave the normaliser's out",
    limits=lambda shape: _nxai_limits(shape) if shape.trains else ["mlstm-kernels is who runs forward"],
    same_result=False,
)
nxai_step = Peer("mlstm-kernels", "NXAI's Triton kernel of a step", _nxai_step, _only_exponential, **_NXAI)
fla = Peer("fla", "chunk_simple_gla of flash-linear-attention", _fla, _heads_alone, **_FLA)
fla_lightning = Peer("fla", "the same with a constant decay", _fla_lightning, _heads_alone, **_FLA)
fla_mlstm = Peer("fla", "chunk_simple_gla, keys times sigmoid(i) beforehand", _fla_mlstm, _fla_mlstm_limits, **_FLA)
fla_step = Peer("fla", "fused_recurrent_simple_gla", _fla_step, _heads_alone, **_FLA)
