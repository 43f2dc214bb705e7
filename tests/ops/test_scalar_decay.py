"""What conformance does not say about scalar decay and lightning attention, and about the table of chunks."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import errors, ops
from attnkit.ops import ChunkLayout, RecurrentState
from attnkit.ops._chunkwise_core.call import auto_chunk_size


def _draw(length: int = 37, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and log decays, four heads on two."""
    shapes = ((4, 6), (2, 6), (2, 5))
    return [*(torch.randn(2, length, *shape, dtype=dtype) for shape in shapes), -torch.rand(2, length, 2, dtype=dtype)]


def test_equal_to_the_matrix_of_decays() -> None:
    """Lightning attention as it is published, written down once more: O = (Q K^T . lambda^(i - j)) V."""
    q, k, v, _ = _draw()
    slopes = ops.lightning_slopes(2).double()
    place = torch.arange(37, dtype=torch.float64)
    decays = torch.exp(-slopes[:, None, None] * (place[:, None] - place)).tril()
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 6**-0.5 * decays.repeat_interleave(2, 0)
    wanted = torch.einsum("bhts,bshd->bthd", scores, v.repeat_interleave(2, 2))
    for size in (16, 64):
        out, _ = ops.lightning_attention(q, k, v, slopes, chunk_size=size)
        assert (out - wanted).abs().max() < 1e-12


def test_gradcheck() -> None:
    q, k, v, g = (t[:1].requires_grad_() for t in _draw(9))
    S = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([0.7, 0.1], dtype=torch.float64, requires_grad=True)

    def varying(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> Any:
        out, state = ops.scalar_decay_attention(q, k, v, g, initial_state=RecurrentState(S))
        return out, state.S

    def constant(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, S: Tensor) -> Any:
        out, state = ops.lightning_attention(q, k, v, slopes, initial_state=RecurrentState(S))
        return out, state.S

    assert torch.autograd.gradcheck(varying, (q, k, v, g, S))
    assert torch.autograd.gradcheck(constant, (q, k, v, slopes, S))


@pytest.mark.parametrize("cut", [0, 1, 16, 30])
def test_prefill_and_steps_are_one_prefill(cut: int) -> None:
    q, k, v, _ = _draw()
    slopes = ops.lightning_slopes(2).double()
    out, last = ops.lightning_attention(q, k, v, slopes, chunk_size=16)
    first, state = ops.lightning_attention(q[:, :cut], k[:, :cut], v[:, :cut], slopes)
    assert (first - out[:, :cut]).abs().sum() < 1e-11
    for t in range(cut, 37):
        h, state = ops.scalar_decay_step(q[:, t], k[:, t], v[:, t], -slopes.expand(2, 2), state)
        assert (h - out[:, t]).abs().max() < 1e-12
    assert (state.S - last.S).abs().max() < 1e-12


def test_steep_slopes_over_many_tokens() -> None:
    """Where any scheme that multiplies by inverse decays overflows or loses everything."""
    q, k, v = (torch.randn(1, 4096, 1, 16) for _ in range(3))
    slopes = torch.tensor([0.9])
    out, state = ops.lightning_attention(q, k, v, slopes, chunk_size=512)
    tail, tail_state = ops.lightning_attention(*(t[:, -100:].double() for t in (q, k, v)), slopes.double())
    assert (out[:, -50:] - tail[:, -50:]).abs().max() < 1e-5
    assert (state.S - tail_state.S).abs().max() < 1e-5


def test_slopes() -> None:
    assert ops.lightning_slopes(16)[0].item() == pytest.approx(2**-0.5)
    assert ops.lightning_slopes(16)[-1].item() == pytest.approx(2**-8)
    twelve = ops.lightning_slopes(12)
    assert torch.equal(twelve[:8], ops.lightning_slopes(8))
    assert torch.equal(twelve[8:], ops.lightning_slopes(16)[0:8:2])
    layers = [ops.lightning_slopes(8, layer, 5)[0].item() for layer in range(5)]
    assert layers == pytest.approx([0.5 * (1 - layer / 4 + 1e-5) for layer in range(5)])
    assert torch.equal(ops.lightning_slopes(8, 1, 5, layer_offset=1), ops.lightning_slopes(8, 0, 5))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (errors.OptionError, "slopes are [-1.0, 1.0]", lambda q, k, v, g: ops.lightning_attention(q, k, v, Tensor([-1, 1]))),
        (errors.ShapeError, "slopes has shape (4,)", lambda q, k, v, g: ops.lightning_attention(q, k, v, torch.ones(4))),
        (errors.OptionError, "g goes up to 0.5", lambda q, k, v, g: ops.scalar_decay_attention(q, k, v, 0 * g + 0.5)),
        (errors.ShapeError, "g has shape (2, 7, 1)", lambda q, k, v, g: ops.scalar_decay_attention(q, k, v, g[..., :1])),
        (
            errors.OptionError,
            "initial_state has S, n; this call keeps S",
            lambda q, k, v, g: ops.scalar_decay_attention(
                q, k, v, g, initial_state=RecurrentState(torch.zeros(2, 2, 6, 5), torch.zeros(2, 2, 6))
            ),
        ),
        (errors.OptionError, "num_heads=0 must be at least 1", lambda *_: ops.lightning_slopes(0)),
        (errors.OptionError, "layer_idx and num_layers belong together", lambda *_: ops.lightning_slopes(4, 1)),
        (errors.OptionError, "layer_idx=5 is none of 5 layers", lambda *_: ops.lightning_slopes(4, 5, 5)),
    ],
)
def test_refusals(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(*_draw(7, torch.float32))


# --- the table of chunks


@pytest.mark.parametrize("lengths", [[5], [64, 64], [0, 63, 1, 0, 130, 16, 0], [0], [1] * 9], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_chunks_cover_every_row_once(lengths: list[int], size: int) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = int(bounds[-1])
    layout = ChunkLayout.packed(bounds, rows, size)
    needed = sum(-(-length // size) for length in lengths)
    assert int(layout.seq_first_chunk[-1]) == needed <= layout.num_chunks
    assert (layout.chunk_len[needed:] == 0).all()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = [
        (row, int(seq))
        for seq, start, count in zip(layout.chunk_seq, layout.chunk_start, layout.chunk_len, strict=True)
        for row in range(int(start), int(start + count))
    ]
    assert found == list(enumerate(owner.tolist()))
    x, trimmed = torch.randn(rows, 3), layout.trimmed()
    assert trimmed.num_chunks == needed
    assert torch.equal(trimmed.join(trimmed.split(x, torch.nan)), x)


@pytest.mark.parametrize("length", [0, 1, 16, 50])
@pytest.mark.parametrize("batch", [0, 3])
def test_batches_are_packed_sequences_of_one_length(batch: int, length: int) -> None:
    layout = ChunkLayout.batched(batch, length, 16)
    x = torch.randn(batch * length, 2)
    assert torch.equal(layout.join(layout.split(x)), x)
    if batch:
        packed = ChunkLayout.packed((torch.arange(batch + 1) * length).int(), batch * length, 16).trimmed()
        for name in ("chunk_seq", "chunk_start", "chunk_len", "seq_first_chunk", "cu_seqlens"):
            assert torch.equal(getattr(layout, name), getattr(packed, name)), name
        assert torch.equal(layout.split(x), packed.split(x))


def test_states_move_and_are_picked() -> None:
    state = RecurrentState(torch.randn(3, 2, 6, 5), torch.randn(3, 2, 6), torch.randn(3, 2))
    again = RecurrentState.unflatten(state.flatten(), 2, 6, 5, normalised=True, stabilised=True)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), again.tensors(), strict=True))
    picked = state.index_select(torch.tensor([2, 0, 2]))
    assert torch.equal(picked.S[0], state.S[2])
    assert state.expand(2).nbytes == 2 * state.nbytes == 2 * 4 * 3 * 2 * (30 + 6 + 1)
    assert state.to(torch.float64).S.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_of_slopes_leave_kernels_of_16_bits(dtype: torch.dtype, learned: bool) -> None:
    """They add up over all tokens what one rounding of a state costs."""
    q, k, v = (torch.randn(1, 5, 2, 16, dtype=dtype) for _ in range(3))
    slopes = ops.lightning_slopes(2).requires_grad_(learned)
    reasons = ops.explain("lightning_attention", q, k, v, slopes).rejected.get("triton", [])
    assert any("gradients of slopes" in reason for reason in reasons) == (learned and dtype == torch.bfloat16)


def test_chunks_of_wide_states_are_long() -> None:
    """Each chunk writes a state."""
    sizes = [auto_chunk_size(width, width_v, 8192) for width, width_v in ((64, 64), (127, 128), (128, 128), (256, 512))]
    assert sizes == [64, 64, 128, 128]
    assert [auto_chunk_size(128, 128, longest) for longest in (0, 1, 17, 64, 65)] == [16, 16, 32, 64, 128]
