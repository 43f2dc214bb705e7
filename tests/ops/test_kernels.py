"""The Triton kernels in the interpreter: what no conformance case can say. Everywhere else they are judged like any backend."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import OptionError
from attnkit._core.triton import interpreted
from attnkit.lab.numerics import dynamic_max_shift

triton = pytest.importorskip("triton")
tl = triton.language
from attnkit._core.triton.maths import LN2, LOG2E  # noqa: E402
from attnkit.ops._attention_core._triton.steps import raised_max, softmax_start, softmax_step  # noqa: E402
from attnkit.ops._attention_core._triton.tiles import _search  # noqa: E402

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[..., Any]


def _qkv(num_q: int, num_k: int, heads: tuple[int, int] = (2, 1), width: int = 16) -> list[Tensor]:
    shapes = ((num_q, heads[0]), (num_k, heads[1]), (num_k, heads[1]))
    return [torch.randn(1, *shape, width, device=DEVICE) for shape in shapes]


def _both(call: Call, *args: Any, **options: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(call(*args, return_lse=True, backend=name, **options) for name in ("triton", "reference"))  # type: ignore[return-value]


def _same(call: Call, *args: Any, **options: Any) -> None:
    for ours, expected in zip(*_both(call, *args, **options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_small_inputs_may_be_strided() -> None:
    q, k, v = _qkv(20, 40)
    _same(ops.attention, q, k, v, sinks=torch.randn(4, device=DEVICE)[::2])
    _same(ops.attention, q, k, v, sinks=torch.randn(1, device=DEVICE).expand(2))
    positions = torch.randint(0, 40, (40, 2), device=DEVICE)
    _same(ops.query_sparse_attention, q, k, v, positions[::2, 0])
    _same(ops.query_sparse_attention, q, k, v, positions[:20].T[:1])
    cu_q, cu_k = (torch.tensor([[0, 0], [7, 9], [size, size]], device=DEVICE, dtype=torch.int32)[:, 0] for size in (20, 40))
    _same(ops.attention, q[0], k[0], v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    bias = torch.randn(1, 40, 2, device=DEVICE)[..., 0]
    _same(ops.attention, q, k, v, key_bias=bias)


def test_tf32_may_be_allowed_by_the_new_switch() -> None:
    """As transformers does where it compiles; torch then refuses to answer through the old one."""
    q, k, v = _qkv(20, 40)
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        ours, expected = (ops.attention(q, k, v, backend=name) for name in ("triton", "reference"))
    finally:
        torch.backends.fp32_precision = before
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_q", [1, 20], ids=["split keys", "one part"])
def test_a_seen_nan_makes_the_row_nan(num_q: int) -> None:
    q, k, v = _qkv(num_q, 2500)
    k[0, 3] = torch.nan
    for ours, expected in zip(*_both(ops.attention, q, k, v), strict=True):
        assert ours.isnan().all()
        assert expected.isnan().all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale: float) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(33, 40))
    grads = []
    for backend in ("triton", "reference"):
        out, lse = ops.attention(q, k, v, causal=True, scale=scale, return_lse=True, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum() + lse.masked_fill(lse.isneginf(), 0).sum(), (q, k, v)))
    for ours, expected in zip(*grads, strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-12


@pytest.mark.parametrize("window", [None, (20, 0), (3, 9)], ids=str)
def test_every_alignment_of_rows_and_tiles(window: tuple[int, int] | None) -> None:
    """The cuts between masked and unmasked steps, wherever the first row stands within a tile of keys; gradients too."""
    for num_k in range(64, 97):
        q, k, v = (t.requires_grad_() for t in _qkv(37, num_k))
        grads = []
        for backend in ("triton", "reference"):
            out = ops.attention(q, k, v, causal=window is None, window_size=window, backend=backend)
            grads.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_sinks_count_once_where_keys_are_split() -> None:
    q, k, v = _qkv(1, 2500)
    _same(ops.attention, q, k, v, sinks=torch.tensor([4.0, 7.0], device=DEVICE))


@pytest.mark.parametrize("window", [None, (20, 0)], ids=str)
def test_selecting_every_row_is_attention(window: tuple[int, int] | None) -> None:
    """Rows stand on every key once, so that each border of each tile of keys is met; backwards, for tiles in any order."""
    q, k, v = (t.requires_grad_() for t in _qkv(100, 100))
    for order in (torch.arange(100), torch.arange(99, -1, -1)):
        rows = order.to(DEVICE)
        ours = ops.query_sparse_attention(q[:, rows], k, v, rows, window_size=window, backend="triton")
        expected = ops.attention(q, k, v, causal=True, window_size=window, backend="reference")[:, rows]
        grads = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_packed_windows_of_any_shape(data: st.DataObject) -> None:
    """Sequences of any lengths, rows behind the last boundary, and any window: which keys a row sees is found exactly."""
    count = data.draw(st.integers(1, 5))
    lengths = st.lists(st.integers(0, 40), min_size=count, max_size=count)
    lengths_q, lengths_k = data.draw(lengths), data.draw(lengths)
    behind = data.draw(st.integers(0, 3)) if DEVICE == "cuda" else 0  # refused on the CPU, where boundaries can be read
    side = st.none() | st.integers(0, 50)
    window = data.draw(st.tuples(side, side))
    q, k, v = _qkv(sum(lengths_q) + behind, sum(lengths_k) + behind)
    cu_q, cu_k = (torch.tensor([0, *part], device=DEVICE).cumsum(0).int() for part in (lengths_q, lengths_k))
    _same(ops.attention, q[0], k[0], v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, window_size=window)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]), st.none() | st.integers(0, 50), st.integers(0, 2**31))
@example(140, 1.0, None, 0)  # so many sequences take two steps of the search
def test_packed_rows_on_given_keys(count: int, spread: float, left: int | None, seed: int) -> None:
    """Sequences of any lengths whose rows stand anywhere, before the first key included: results and gradients are exact.

    With a spread of 0 every row stands on one key of its sequence.
    """
    longest = 60 if count < 9 else 1
    generator = torch.Generator().manual_seed(seed)
    lengths_q, lengths_k = torch.randint(0, longest + 1, (2, count), generator=generator)
    starts = lengths_k.cumsum(0) - lengths_k
    pos = starts.repeat_interleave(lengths_q) - 1
    reach = (lengths_k + 1).repeat_interleave(lengths_q)
    noise = 0.5 + spread * (torch.rand(len(pos), generator=generator) - 0.5)
    pos = torch.maximum(pos + (noise * reach).long(), torch.tensor(-1))
    order = (torch.arange(count).repeat_interleave(lengths_q) * 10_000 + pos).argsort()
    window = None if left is None else (left, 0)
    q, k, v = (t[0].requires_grad_() for t in _qkv(int(lengths_q.sum()), int(lengths_k.sum())))
    boundaries = [torch.cat([part.new_zeros(1), part.cumsum(0)]).int().to(DEVICE) for part in (lengths_q, lengths_k)]
    results = []
    for backend in ("triton", "reference", "torch"):
        out, lse = ops.query_sparse_attention(
            q, k, v, pos[order].to(DEVICE), cu_seqlens_q=boundaries[0], cu_seqlens_k=boundaries[1], window_size=window,
            return_lse=True, backend=backend,
        )  # fmt: skip
        loss = out.square().sum() + lse.masked_fill(lse.isneginf(), 0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for ours in (results[0], results[2]):
        for one, other in zip(ours, results[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_unsorted_packed_rows_are_refused() -> None:
    q, k, v = (t[0].cpu() for t in _qkv(6, 8))
    cu_q, cu_k = torch.tensor([0, 3, 3, 6, 6]).int(), torch.tensor([0, 4, 4, 8, 8]).int()
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    ops.query_sparse_attention(q, k, v, torch.tensor([0, 1, 3, -1, 4, 7]), **options)  # falls between sequences
    with pytest.raises(OptionError, match="q_pos falls at row 2"):
        ops.query_sparse_attention(q, k, v, torch.tensor([0, 3, 1, 4, 5, 7]), **options)
    with pytest.raises(OptionError, match=r"-1\.\.7"):
        ops.query_sparse_attention(q, k, v, torch.tensor([0, 1, 3, 4, 5, 8]), **options)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's wheel brings an assembler for this processor only")
def test_every_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "220 variants compiled" in done.stdout


@triton.jit
def _raise(top, ties, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    tl.store(out + o, raised_max(tl.load(top + o) * LOG2E, tl.load(ties + o), 30 * LOG2E))


def test_the_moved_maximum_is_that_of_the_emulator() -> None:
    tops = [0.0, 1e-7, 0.5, 3.0, 9.0, 40.0, 1e4, -0.5, -3.0, -40.0, -1e4, -torch.inf, 2.0, -2.0, 0.0, 7.0]
    top, ties = torch.tensor(tops, device=DEVICE), torch.tensor([2] * 12 + [1] * 4, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(top)
    _raise[(1,)](top, ties, out, BLOCK=16)
    torch.testing.assert_close(out * LN2.value, dynamic_max_shift(top, ties, beta=4.0), rtol=1e-6, atol=1e-5)


@triton.jit
def _step(t, m, out, ROWS: tl.constexpr, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    o_row, o_key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    values = tl.full([KEYS, 16], 1.0, tl.float32)
    state = softmax_start(tl.load(m + o_row), tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS, 16], tl.float32), "dynamic_max")
    tile = tl.load(t + o_row[:, None] * KEYS + o_key[None, :])
    state = softmax_step(tile, 1.0, values, state, True, "dynamic_max", "ieee")
    tl.store(out + o_row, state[0])
    tl.store(out + ROWS + o_row, state[1])
    tl.store(out + 2 * ROWS + o_row, state[3])


def test_only_exact_ties_move_a_maximum() -> None:
    """Wherever in a row they are; one tile, on top of a running maximum and a sum of 1."""
    t = 2 * torch.rand(16, 64, device=DEVICE)
    for row, keys in enumerate([(5,), (0, 8), (0, 1), (3, 60), (8, 16, 24), (1, 9, 2, 63), tuple(range(64)), (7, 7), (30, 38)]):
        t[row, list(keys)] = 3.0
    t[7, 8] = t[8, 38] = torch.nextafter(torch.tensor(3.0), torch.tensor(0.0))
    t[8, [0, 1, 8, 9]] = t[9:12, :2] = 2.5  # tied, and in row 8 below the maximum
    t[9:12] -= 4.0  # below 0
    t[12] = -torch.inf
    t[14] -= 3.0
    t[14, 20:22] = 0.0
    m = torch.full((16,), -torch.inf, device=DEVICE)
    m[2], m[3], m[13] = 20.0, 7.0, 20.0
    top = t.amax(1)
    ties = (t == top[:, None]).sum(1)
    assert ties.tolist()[:9] == [1, 2, 2, 2, 3, 4, 64, 1, 1]
    moved = torch.maximum(m, dynamic_max_shift(top * LN2.value, ties, beta=4.0) * LOG2E.value)
    base = torch.where(moved.isinf(), 0.0, moved).double()
    total = torch.exp2(m - base) + torch.exp2(t - base[:, None]).sum(1)
    out = torch.empty(3, 16, device=DEVICE)
    _step[(1,)](t, m, out, ROWS=16, KEYS=64)
    torch.testing.assert_close(out[0], moved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[1:].double(), total.expand(2, -1), rtol=1e-6, atol=0)


@triton.jit
def _find(cu, guesses, tiles, out, hi):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(out + i, _search(cu, hi, tl.load(guesses + i), tl.load(tiles + i), 16))


@pytest.mark.parametrize("size", [3, 600, 3000])
def test_a_search_finds_its_sequence_from_any_guess(size: int) -> None:
    hi = size - 1
    cu = torch.randint(0, 32 * size, (size,), device=DEVICE, dtype=torch.int32).sort().values
    firsts = cu // 16 + torch.arange(size, device=DEVICE, dtype=torch.int32)
    corners = torch.tensor([-(1 << 30), 0, size // 3, hi, 1 << 30], device=DEVICE)
    guesses = torch.cat((corners, torch.randint(0, size, (35,), device=DEVICE))).int().repeat(3)
    tiles = torch.randint(-1, 3 * size + 1, guesses.shape, device=DEVICE, dtype=torch.int32)
    out = torch.empty_like(tiles)
    _find[(len(tiles),)](cu, guesses, tiles, out, hi)
    assert torch.equal(out.long(), torch.searchsorted(firsts[:hi], tiles))
