"""What `attnkit tune` tries for each kernel of recurrences in chunks, and the problem it measures it on."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit._core.triton.configs import Config
from attnkit._core.triton.probe import Probe
from attnkit.ops._chunkwise_core._register import run_gate_scan_triton
from attnkit.ops._chunkwise_core._triton import launch
from attnkit.ops._chunkwise_core._triton.configs import CONFIGS
from attnkit.ops._chunkwise_core.call import auto_chunk_size

__all__ = ["CONFIGS", "KERNELS", "candidates", "probe"]

KERNELS = ("walk", "outputs", "d_queries", "d_keys", "d_values")
_REGISTERS = 255  # of a thread, 4 bytes each
_TIMES = 2  # how wide values are, in widths of keys
_EPS = 1e-6


@dataclass(frozen=True)
class _Cost:
    """What a program holds beside a tile of rows x columns of values, in numbers.

    Attributes:
        wide: accumulators [rows, width].
        columns: accumulators [rows, columns].
        square: products [rows, rows] that are alive together.
    """

    wide: int
    columns: int
    square: int


_COSTS = {
    "outputs": _Cost(wide=0, columns=1, square=1),
    "d_queries": _Cost(wide=2, columns=0, square=2),
    "d_keys": _Cost(wide=1, columns=0, square=2),
    "d_values": _Cost(wide=0, columns=1, square=1),
}


def candidates(kernel: str, bits: int, width: int, shared: int) -> tuple[Config, ...]:
    """Configurations worth trying: sensible ones that are not sure to overflow shared memory or registers.

    Args:
        kernel: one of KERNELS.
        bits: of the inputs, 16 or 32.
        width: padded width of keys.
        shared: bytes of shared memory that a program may have.
    """
    found = []
    for rows, columns, warps, stages in _grid(kernel, bits, width):
        if kernel == "walk":  # `rows` of a state; what is walked along are tokens
            step = launch.ROWS[bits // 8]
            held, sums = step * (rows + columns) * max(stages - 1, 1), rows * columns
        else:
            cost = _COSTS[kernel]
            held = rows * (width + columns) * max(stages - 1, 1) + rows * width
            sums = rows * (cost.wide * width + cost.columns * columns + cost.square * rows)
        if held * bits // 8 <= shared and sums // (32 * warps) <= _REGISTERS:
            found.append(Config(rows, columns, warps, stages))
    return tuple(found)


def _grid(kernel: str, bits: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(rows, columns of values, warps, stages)."""
    columns = [size for size in ((32, 64, 128) if bits == 16 else (16, 32, 64)) if size <= max(_TIMES * width, 64)]
    stages = (2, 3, 4) if bits == 16 else (1, 2)
    if kernel == "walk":
        rows = [size for size in (32, 64, 128) if size <= width] or [width]
    elif bits == 32:  # no matrix units in full precision
        rows = [16, 32]
    else:  # 64 rows are one matrix instruction of Hopper; with keys of width 16 Triton 3.6 makes wrong gradients of them
        rows = [32] if width == 16 else [32, 64]
    yield from itertools.product(rows, columns, (4, 8), stages)


@dataclass
class _Trial(launch.Problem):
    """A call that runs with a given configuration instead of the table's."""

    chosen: Config | None = None

    def config(self, kernel: str) -> Config:
        """The given one."""
        return super().config(kernel) if self.chosen is None else self.chosen

    def having(self, config: Config) -> "_Trial":
        """The same call with a configuration; what does not depend on it is not computed anew."""
        trial = copy.copy(self)
        trial.chosen = config
        return trial


def probe(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Probe:
    """One kernel on a problem like those it is meant for; tiny on a CPU, where only the interpreter runs it.

    The mLSTM with exponential gates, values twice as wide as keys: four sequences of 4,096 tokens (1,024 in 32 bits), 16
    heads, or 8 of width 256.

    Args:
        kernel: one of KERNELS. The time of "walk" is that of both walks, forward and backward.
        dtype: of queries, keys and values.
        width: D; Dv is twice as much.
        device: where.
    Raises:
        OptionError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise OptionError(f"unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    generator = torch.Generator(device).manual_seed(0)
    batch, length, heads = _sizes(dtype.itemsize, width, device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, heads, *shape, generator=generator, device=device)

    q, k, v, d_out = (draw(size).to(dtype) for size in (width, width, _TIMES * width, _TIMES * width))
    i, f = draw(), 3 + draw()
    chunk_size = auto_chunk_size(width, _TIMES * width, length)
    decay, gain, m, _, _ = run_gate_scan_triton(F.logsigmoid(f), i, None, None, chunk_size)
    p = _Trial.of((q, k, v, decay, gain, m, None, None, None, True, width**-0.5, _EPS, chunk_size))
    assert isinstance(p, _Trial)
    inputs = {"q": q, "k": k, "v": v, "i": i, "f": f}
    states = _forward_walk(p)
    if kernel == "outputs":
        return Probe(lambda c: (launch.run_outputs(p.having(c), states)[0].view_as(v),), ("out",), inputs, None, False)
    den = launch.run_outputs(p, states)[1]
    if kernel == "d_queries":

        def queries(config: Config) -> tuple[Tensor, ...]:
            return (launch.run_d_queries(p.having(config), states, den, d_out, True)[0].view_as(q),)

        return Probe(queries, ("d_q",), inputs, d_out, False)
    _, _, ratio, delta, _ = launch.run_d_queries(p, states, den, d_out, True)

    def back(trial: _Trial, after: launch.Walk) -> launch.Walk:
        walk = launch.new_reverse_walk(trial, after, d_out, ratio, delta, True, None, None)
        launch.run_walk(trial, walk)
        return walk

    def both(config: Config) -> tuple[Tensor, ...]:
        trial = p.having(config)
        walk = _forward_walk(trial)
        ends = walk.last, back(trial, walk).last
        return tuple(end for end in ends if end is not None)

    if kernel == "walk":
        return Probe(both, ("S", "d_S"), inputs, d_out, False)
    walk = back(p, states)
    if kernel == "d_keys":
        return Probe(
            lambda c: (launch.run_d_keys(p.having(c), walk, d_out, True)[0].view_as(k),), ("d_k",), inputs, d_out, False
        )
    return Probe(lambda c: (launch.run_d_values(p.having(c), walk, d_out).view_as(v),), ("d_v",), inputs, d_out, False)


def _forward_walk(p: _Trial) -> launch.Walk:
    walk = launch.new_walk(p, False, p.k, p.v, None, None)
    launch.run_walk(p, walk)
    return walk


def _sizes(item_bytes: int, width: int, device: torch.device) -> tuple[int, int, int]:
    """B, T, H."""
    if device.type == "cpu":
        return 2, 40, 1
    return 4, 4096 if item_bytes == 2 else 1024, 8 if width > 128 else 16
