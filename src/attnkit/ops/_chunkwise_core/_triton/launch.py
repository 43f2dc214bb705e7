"""Launching the kernels of recurrences in chunks: what `passes` computes, of the same arguments. No host synchronisation."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnkit._core.triton.configs import Config
from attnkit._core.triton.launcher import launch, power_of_two, precision
from attnkit.ops._chunkwise_core._triton import gradients as kb
from attnkit.ops._chunkwise_core._triton.configs import CONFIGS
from attnkit.ops._chunkwise_core._triton.gates import chunk_sums
from attnkit.ops._chunkwise_core._triton.outputs import outputs
from attnkit.ops._chunkwise_core._triton.states import merge, walk
from attnkit.ops._chunkwise_core._triton.table import ChunkTable
from attnkit.ops._chunkwise_core.passes import Gradients

__all__ = [
    "ROWS", "Problem", "Walk", "backward", "forward", "new_reverse_walk", "new_walk", "run_d_keys", "run_d_queries",
    "run_d_values", "run_outputs", "run_walk",
]  # fmt: skip

ROWS = {2: 64, 4: 32}  # that a step of the walk takes, by bytes of an element
_CHUNKS_A_SEGMENT = 4  # at least, where sequences are split
_NARROWEST = 16  # tile of a matrix unit
_MERGED = 1024  # elements of a state that a program merges


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@dataclass
class Problem:
    """A call: tensors [B, T, ...] as they come, packed ones with a batch of one.

    Attributes:
        gates: hi, lo, col_hi and col_lo [Hkv, R], and the two parts of whole chunks [C, Hkv]; see `chunks`.
    """

    table: ChunkTable
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    gain: Tensor | None
    m: Tensor | None
    S: Tensor | None
    n: Tensor | None
    normalize: bool
    scale: float
    eps: float
    gates: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.heads, self.width = self.q.shape[2:]
        self.kv_heads, self.width_v = self.v.shape[2:]
        self.group = self.heads // self.kv_heads
        self.gates = self._sums()

    @classmethod
    def of(cls, inputs: tuple[Any, ...]) -> "Problem":
        """From the registered operator's arguments."""
        q, k, v, decay, gain, m, S, n, cu_seqlens, normalize, scale, eps, chunk_size = inputs
        table = ChunkTable.of(q, cu_seqlens, chunk_size)
        q, k, v = (_rows(t, cu_seqlens) for t in (q, k, v))
        decay, gain, m = (t if t is None or cu_seqlens is None else t[None] for t in (decay, gain, m))
        S, n = (None if t is None else t.contiguous() for t in (S, n))
        m = m if m is None else m.contiguous()
        return cls(table, q, k, v, decay, gain, m, S, n if normalize else None, normalize, scale, eps)

    def _sums(self) -> tuple[Tensor, ...]:
        t, heads = self.table, self.kv_heads
        hi, lo, *cols = self.decay.new_empty(2 if self.gain is None else 4, heads, t.num_rows).unbind()
        end_hi, end_lo = self.decay.new_empty(2, t.num_chunks, heads).unbind()
        cols = cols or [hi, lo]
        if t.num_rows and t.num_seqs:
            block_h = t.block_heads(heads)
            gain_strides = (0, 0, 0) if self.gain is None else self.gain.stride()
            arguments = (
                self.decay, self.gain, hi, lo, *cols, end_hi, end_lo, t.chunk_start, t.chunk_len,
                *self.decay.stride(), *gain_strides, t.num_rows, t.each, t.length, heads,
            )  # fmt: skip
            grid = (-(-heads // block_h) * t.num_chunks,)
            launch(chunk_sums, grid, arguments, {"BLOCK_L": t.chunk_size, "BLOCK_H": block_h}, num_warps=4)
        return hi, lo, *cols, end_hi, end_lo

    def config(self, kernel: str) -> Config:
        """Tile sizes of one kernel for this call."""
        return CONFIGS.pick(kernel, self.q.element_size() * 8, power_of_two(self.width, _NARROWEST), self.q.device)

    def columns(self, config: Config) -> int:
        """Columns of values that a tile takes, no more than there are."""
        return min(config.block_n, power_of_two(self.width_v, _NARROWEST))

    def tiled(self, kernel: Any, config: Config, columns: int, heads: int, arguments: tuple[Any, ...]) -> None:
        """Run a kernel over tiles of rows (and `columns` tiles of values) of every head of every chunk."""
        t = self.table
        rows = min(config.block_m, t.chunk_size)
        flags = {
            "BLOCK_M": rows, "BLOCK_D": power_of_two(self.width, _NARROWEST), "BLOCK_V": self.columns(config),
            "BLOCK_L": t.chunk_size, "NORM": self.normalize, "PRECISION": precision(),
        }  # fmt: skip
        grid = (columns * (t.chunk_size // rows) * heads * t.num_chunks,)
        launch(kernel, grid, arguments, flags, num_warps=config.num_warps, num_stages=config.num_stages)

    def shape(self) -> tuple[int, ...]:
        """num_rows, each, length, heads, group, width, width_v, scale."""
        t = self.table
        return t.num_rows, t.each, t.length, self.heads, self.group, self.width, self.width_v, self.scale  # type: ignore[return-value]


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    x = x if cu_seqlens is None else x[None]
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass
class Walk:
    """One walk over chunks: forward over k and v, or backward over q and gradients of outputs.

    Attributes:
        reverse: the second of them.
        x, y: what is multiplied.
        start, start_n: [N, Hkv, D, Dv] and [N, Hkv, D] float32, where it begins; None means 0.
        ratio, delta: [H, R], backward.
        other, other_n: states before chunks, backward.
        states, sums: [C, Hkv, ...], what it leaves at each chunk.
        last, last_n: where it ends.
        passing: [tiles, C, Hkv], backward.
        rest: what rounding takes from `states`, backward, in 16 bits, where gates have gradients.
    """

    reverse: bool
    x: Tensor
    y: Tensor
    start: Tensor | None
    start_n: Tensor | None
    states: Tensor | None
    sums: Tensor | None
    last: Tensor | None
    last_n: Tensor | None
    ratio: Tensor | None = None
    delta: Tensor | None = None
    other: Tensor | None = None
    other_n: Tensor | None = None
    passing: Tensor | None = None
    left: Tensor | None = None
    rest: Tensor | None = None


def new_walk(
    p: Problem, reverse: bool, x: Tensor, y: Tensor, start: Tensor | None, start_n: Tensor | None, **more: Any
) -> Walk:
    """A walk that is to be run, with room for what it leaves."""
    num_seqs, heads, states = p.table.num_seqs, p.kv_heads, (p.table.num_chunks, p.kv_heads, p.width)
    wide, new = p.decay.new_empty, p.q.new_empty
    sums, last_n = (wide(states), wide(num_seqs, heads, p.width)) if p.normalize else (None, None)
    last = wide(num_seqs, heads, p.width, p.width_v)
    return Walk(reverse, x, y, start, start_n, new(*states, p.width_v), sums, last, last_n, **more)


def new_reverse_walk(
    p: Problem,
    states: Walk,
    d_out: Tensor,
    ratio: Tensor | None,
    delta: Tensor | None,
    gates: bool,
    start: Tensor | None,
    start_n: Tensor | None,
) -> Walk:
    """The walk backward, after the one forward and `run_d_queries`, with room for what gradients of gates need."""
    passing = p.decay.new_empty(_walk_tiles(p)[3], p.table.num_chunks, p.kv_heads) if gates else None
    more = {"ratio": ratio, "delta": delta, "other": states.states, "other_n": states.sums, "passing": passing}
    w = new_walk(p, True, p.q, d_out, start, start_n, **more)
    if gates and w.states is not None and w.states.element_size() == 2:
        w.rest = torch.empty_like(w.states)
    return w


def _walk_tiles(p: Problem) -> tuple[Config, int, int, int]:
    """The configuration, rows and columns of a tile of a state, and how many tiles it has."""
    config = p.config("walk")
    block_k, block_v = min(config.block_m, power_of_two(p.width, _NARROWEST)), p.columns(config)
    return config, block_k, block_v, -(-p.width // block_k) * -(-p.width_v // block_v)


def run_walk(p: Problem, w: Walk) -> None:
    """Walk, in segments side by side where there are too few sequences and heads to fill the device."""
    t = p.table
    if not t.num_seqs:
        return
    _, _, _, tiles = _walk_tiles(p)
    chunks = -(-t.num_chunks // t.num_seqs)
    segments = max(1, min(2 * _multiprocessors(p.q.device) // (tiles * p.kv_heads * t.num_seqs), chunks // _CHUNKS_A_SEGMENT))
    if segments == 1:
        _step(p, w, 1)
        return
    wide, pieces = p.decay.new_empty, (t.num_seqs * segments, p.kv_heads)
    totals, totals_n = wide(*pieces, p.width, p.width_v), wide(*pieces, p.width) if p.normalize else None
    left = wide(pieces)
    only = replace(
        w, start=None, start_n=None, states=None, rest=None, sums=None, last=totals, last_n=totals_n, passing=None, left=left
    )  # fmt: skip
    _step(p, only, segments)
    before = torch.empty_like(totals)
    before_n = None if totals_n is None else torch.empty_like(totals_n)
    _merge(p, w.start, totals, left, before, w.last, segments, w.reverse)
    if totals_n is not None:
        _merge(p, w.start_n, totals_n, left, before_n, w.last_n, segments, w.reverse)
    _step(p, replace(w, start=before, start_n=before_n, last=None, last_n=None), segments)


def _merge(
    p: Problem, start: Tensor | None, totals: Tensor, left: Tensor, before: Any, last: Any, segments: int, reverse: bool
) -> None:
    size = totals[0, 0].numel()
    arguments = (start, totals, left, before, last, p.kv_heads, segments, size)
    grid = (-(-size // _MERGED) * p.kv_heads * p.table.num_seqs,)
    launch(merge, grid, arguments, {"BLOCK": _MERGED, "REVERSE": reverse}, num_warps=4)


def _step(p: Problem, w: Walk, segments: int) -> None:
    t = p.table
    config, block_k, block_v, tiles = _walk_tiles(p)
    arguments = (
        w.x, w.y, *p.gates, w.ratio, w.delta, w.start, w.start_n, w.states, w.rest, w.sums, w.last, w.last_n, w.left,
        w.other, w.other_n, w.passing, t.cu_seqlens, t.first_chunk,
        *w.x.stride()[:3], *w.y.stride()[:3], t.num_rows, t.num_chunks, t.each, t.length, p.kv_heads,
        p.group if w.reverse else 1, segments, p.width, p.width_v, p.scale,
    )  # fmt: skip
    flags = {
        "BLOCK_K": block_k, "BLOCK_V": block_v, "BLOCK_L": t.chunk_size,
        "BLOCK_R": min(ROWS[p.q.element_size()], t.chunk_size),
        "NORM": p.normalize, "REVERSE": w.reverse, "PRECISION": precision(),
    }  # fmt: skip
    grid = (tiles * p.kv_heads * segments * t.num_seqs,)
    launch(walk, grid, arguments, flags, num_warps=config.num_warps, num_stages=config.num_stages)


def forward(inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """As `passes.forward`: out [R, H, Dv], what denominators are made of [R, H], S and n at the end."""
    p = Problem.of(inputs)
    w = new_walk(p, False, p.k, p.v, p.S, p.n)
    run_walk(p, w)
    out, den = run_outputs(p, w)
    return out, den, w.last, w.last_n


def backward(
    inputs: tuple[Any, ...], den: Tensor | None, d_out: Tensor, d_S: Tensor | None, d_n: Tensor | None, gates: bool
) -> Gradients:
    """As `passes.backward`; None stands for the gradients of decay, gain and m unless `gates`."""
    p = Problem.of(inputs)
    t = p.table
    d_out = _rows(d_out, inputs[8])
    states = new_walk(p, False, p.k, p.v, p.S, p.n)
    run_walk(p, states)
    d_q, crossing, ratio, delta, unit = run_d_queries(p, states, den, d_out, gates)
    start, start_n = (None if x is None else x.contiguous() for x in (d_S, d_n))
    w = new_reverse_walk(p, states, d_out, ratio, delta, gates, start, start_n)
    run_walk(p, w)
    d_k, sides = run_d_keys(p, w, d_out, gates)
    d_v = run_d_values(p, w, d_out)
    if w.passing is None:
        return Gradients(d_q, d_k, d_v, None, None, None, w.last, w.last_n)  # type: ignore[arg-type]
    new, rows = p.decay.new_empty, (t.num_rows, p.kv_heads)
    d_decay, d_gain, d_m = new(rows), new(rows), None if unit is None else new(rows)
    if d_decay.numel():
        block_h = t.block_heads(p.kv_heads)
        flags = {"BLOCK_L": t.chunk_size, "BLOCK_H": block_h}
        arguments = (
            crossing, *sides, unit, w.passing, *p.gates[4:], d_decay, d_gain, d_m, t.chunk_start, t.chunk_len,
            t.num_rows, t.num_chunks, t.each, t.length, p.kv_heads, p.group, w.passing.shape[0],
        )  # fmt: skip
        launch(kb.d_gates, (-(-p.kv_heads // block_h) * t.num_chunks,), arguments, flags, num_warps=4)
    return Gradients(d_q, d_k, d_v, d_decay, d_gain, d_m, w.last, w.last_n)  # type: ignore[arg-type]


def run_outputs(p: Problem, w: Walk) -> tuple[Tensor, Tensor | None]:
    """out [R, H, Dv] and what denominators are made of [R, H], from the states of a walk forward."""
    t = p.table
    out = p.q.new_empty(t.num_rows, p.heads, p.width_v)
    den = p.decay.new_empty(t.num_rows, p.heads) if p.normalize else None
    if out.numel():
        config = p.config("outputs")
        arguments = (
            p.q, p.k, p.v, *p.gates[:4], p.m, w.states, w.sums, out, den, t.chunk_start, t.chunk_len,
            *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *p.shape(), p.eps,
        )  # fmt: skip
        p.tiled(outputs, config, -(-p.width_v // p.columns(config)), p.heads, arguments)
    return out, den


def run_d_queries(p: Problem, w: Walk, den: Tensor | None, d_out: Tensor, gates: bool) -> tuple[Tensor, Any, Any, Any, Any]:
    """d_q, what crosses rows before them [H, R], and what the normaliser makes of gradients [H, R], see the kernel."""
    t = p.table
    d_q, crossing = p.q.new_empty(t.num_rows, p.heads, p.width), p.decay.new_empty(p.heads, t.num_rows) if gates else None
    factors = (None, None, None) if den is None else p.decay.new_empty(3, p.heads, t.num_rows).unbind()
    if d_q.numel():
        den = None if den is None else den.contiguous()
        arguments = (
            p.q, p.k, p.v, d_out, den, p.m, *p.gates[:4], w.states, w.sums, d_q, crossing, *factors,
            t.chunk_start, t.chunk_len, *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *d_out.stride()[:3],
            *p.shape(), p.eps,
        )  # fmt: skip
        p.tiled(kb.d_queries, p.config("d_queries"), 1, p.heads, arguments)
    return d_q, crossing, *factors


def run_d_keys(p: Problem, w: Walk, d_out: Tensor, gates: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """d_k, and what goes from each row to later rows, to itself and to later chunks, [Hkv, R]; from a walk backward."""
    t = p.table
    d_k = p.q.new_empty(t.num_rows, *p.k.shape[2:])
    sides = p.decay.new_empty(3, p.kv_heads, t.num_rows).unbind() if gates else (None, None, None)
    if d_k.numel():
        arguments = (
            p.q, p.k, p.v, d_out, *p.gates, w.ratio, w.delta, w.states, w.rest, w.sums, d_k, *sides,
            t.chunk_start, t.chunk_len,
            *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *d_out.stride()[:3], *p.shape(),
        )  # fmt: skip
        p.tiled(kb.d_keys, p.config("d_keys"), 1, p.kv_heads, arguments)
    return d_k, sides


def run_d_values(p: Problem, w: Walk, d_out: Tensor) -> Tensor:
    """d_v, from a walk backward."""
    t = p.table
    d_v = p.q.new_empty(t.num_rows, *p.v.shape[2:])
    if d_v.numel():
        config = p.config("d_values")
        arguments = (
            p.q, p.k, d_out, *p.gates, w.ratio, w.states, d_v, t.chunk_start, t.chunk_len,
            *p.q.stride()[:3], *p.k.stride()[:3], *d_out.stride()[:3], *p.shape(),
        )  # fmt: skip
        p.tiled(kb.d_values, config, -(-p.width_v // p.columns(config)), p.kv_heads, arguments)
    return d_v
