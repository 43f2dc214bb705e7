"""Checks that the recurrent operators share, and sequences before they are cut into chunks."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype, check_same, dims
from attnkit._core.errors import InputError, OptionError, ShapeError
from attnkit.ops._chunkwise_core.layout import check_chunk_size
from attnkit.ops._chunkwise_core.state import RecurrentState

__all__ = ["RecurrentCall", "auto_chunk_size", "check_gate", "check_recurrent", "check_state", "check_step", "sequences"]


@dataclass
class RecurrentCall:
    """Checked arguments that recurrent operators share.

    Attributes:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv]; packed [R, ...].
        scale: of q.
        state: at the beginning, all parts that the operator keeps, one entry for each sequence; None: nothing yet.
        cu_seqlens: [N + 1] int32, or None.
        chunk_size: rows of a chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    state: RecurrentState | None
    cu_seqlens: Tensor | None
    chunk_size: int

    def parts(self) -> dict[str, Any]:
        """All of it, which an operator's own call has too (not `vars`, which torch 2.11 does not compile)."""
        return {
            "q": self.q, "k": self.k, "v": self.v, "scale": self.scale, "state": self.state, "cu_seqlens": self.cu_seqlens,
            "chunk_size": self.chunk_size,
        }  # fmt: skip

    @property
    def longest(self) -> int:
        """Tokens of a sequence at most."""
        return self.q.shape[0 if self.cu_seqlens is not None else 1]


def check_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    state: RecurrentState | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | str,
    parts: str,
) -> RecurrentCall:
    """Check what every recurrent operator is given.

    Args:
        parts: letters of what its state has, "S", "Sn" or "Snm".
    """
    rows = "B T" if cu_seqlens is None else "R"
    if cu_seqlens is not None and q.dim() == 4:
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and cu_seqlens was given; packed sequences are [R, H, D], without a batch dimension"
        )
    sizes = _check_heads(q, k, v, rows)
    if cu_seqlens is not None:
        _check_boundaries(cu_seqlens, sizes["R"])
    check_chunk_size(chunk_size)
    count = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None:
        state = check_state(state, q, k, v, count, parts)
    longest = sizes["T"] if cu_seqlens is None else sizes["R"]
    chosen = auto_chunk_size(sizes["D"], sizes["Dv"], longest) if isinstance(chunk_size, str) else chunk_size
    return RecurrentCall(q, k, v, sizes["D"] ** -0.5 if scale is None else float(scale), state, cu_seqlens, chosen)


def auto_chunk_size(width: int, width_v: int, longest: int) -> int:
    """Rows of a chunk: 64, for wide states 128, since each chunk writes one; fewer where no sequence is that long.

    Packed sequences and separate ones of other lengths may differ in it, and so in the last bits.
    """
    most = 128 if width * width_v >= 128 * 128 else 64
    return min(most, max(16, 1 << max(longest - 1, 0).bit_length()))


def check_step(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: RecurrentState, parts: str
) -> tuple[float, RecurrentState]:
    """Check one token [B, H, D] beside its state, and resolve the scale."""
    sizes = _check_heads(q, k, v, "B")
    return sizes["D"] ** -0.5 if scale is None else float(scale), check_state(state, q, k, v, sizes["B"], parts)


def check_gate(name: str, gate: Tensor, k: Tensor) -> Tensor:
    """A number for each row and key head, in the accumulation dtype.

    Raises:
        ShapeError, DTypeError, InputError: it is not, or stands on another device.
    """
    if gate.shape != k.shape[:-1]:
        raise ShapeError(
            f"{name} has shape {tuple(gate.shape)}; expected {tuple(k.shape[:-1])}, one number for each row and head of k"
        )
    check_dtype(name, gate, k.dtype, accumulator_dtype(k.dtype))
    if gate.device != k.device:
        raise InputError(f"{name} is on {gate.device} but k is on {k.device}; move one of them")
    return gate.to(accumulator_dtype(k.dtype))


def check_state(state: RecurrentState, q: Tensor, k: Tensor, v: Tensor, count: int, parts: str) -> RecurrentState:
    """A state with the parts that are asked for, one entry for each sequence; a single entry stands for all of them."""
    if not isinstance(state, RecurrentState):
        raise OptionError(f"initial_state is a {type(state).__name__}; give an attnkit.ops.RecurrentState")
    given = "".join(name for name, part in zip("Snm", state, strict=True) if part is not None)
    if given != parts:
        raise OptionError(
            f"initial_state has {', '.join(given)}; this call keeps {', '.join(parts)}. Give the state that a call with the "
            f"same gates and normaliser has returned, or RecurrentState({', '.join(parts)})"
        )
    heads, width, width_v = k.shape[-2], k.shape[-1], v.shape[-1]
    expected = {"S": (heads, width, width_v), "n": (heads, width), "m": (heads,)}
    for name, part in zip(parts, state.tensors(), strict=True):
        if part.dim() != len(expected[name]) + 1 or part.shape[1:] != expected[name] or part.shape[0] not in (1, count):
            raise ShapeError(
                f"initial_state.{name} has shape {tuple(part.shape)}; expected {(count, *expected[name])}, or 1 in front for "
                f"one state that all sequences begin with"
            )
        check_dtype(f"initial_state.{name}", part, accumulator_dtype(q.dtype))
        if part.device != q.device:
            raise InputError(f"initial_state.{name} is on {part.device} but q is on {q.device}; move one of them")
    return state.each(lambda part: part.expand(count, *part.shape[1:]))


def sequences(call: RecurrentCall) -> list[tuple[slice, slice | int]]:
    """Where each sequence, or a batch of them, is among rows and among states: reads boundaries on the host."""
    if call.cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = call.cu_seqlens.tolist()
    return [(slice(a, b), slice(i, i + 1)) for i, (a, b) in enumerate(pairwise(bounds))]


def _check_heads(q: Tensor, k: Tensor, v: Tensor, rows: str) -> dict[str, int]:
    sizes = dims(q=(q, f"{rows} H D"), k=(k, f"{rows} Hkv D"), v=(v, f"{rows} Hkv Dv"))
    check_dtype("q", q, *FLOATS)
    check_same(q=q, k=k, v=v)
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
        raise ShapeError(f"q has {sizes['H']} heads and k has {sizes['Hkv']}; the first must be a multiple of the second")
    if sizes["D"] == 0 or sizes["Dv"] == 0:
        raise ShapeError(f"head widths are D={sizes['D']} and Dv={sizes['Dv']}; both must be at least 1")
    return sizes


def _check_boundaries(cu_seqlens: Tensor, rows: int) -> None:
    dims(cu_seqlens=(cu_seqlens, "N+1"))
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    if cu_seqlens.numel() < 2:
        raise ShapeError(
            f"cu_seqlens has {cu_seqlens.numel()} entries; N sequences need N + 1 boundaries, and N must be at least 1"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values there would wait for the device, or break the graph
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows or bool((cu_seqlens.diff() < 0).any()):
        raise ShapeError(f"cu_seqlens must rise from 0 to {rows}, the rows of q; it holds {cu_seqlens.tolist()[:8]}...")
