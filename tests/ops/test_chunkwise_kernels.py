"""The kernels of recurrences in chunks, in the interpreter or on a GPU: what no conformance case says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import errors, ops
from attnkit._core.triton import interpreted
from attnkit.ops._chunkwise_core._register import run_gate_scan, run_gate_scan_triton

pytest.importorskip("triton")
from attnkit.ops._chunkwise_core._triton import launch

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS: dict[str, dict[str, Any]] = {"exp": {}, "plain": {"input_gate": "sigmoid", "normalize": False}}


def _draw(length: int, heads: tuple[int, int] = (2, 1), width: int = 16, width_v: int = 24) -> list[Tensor]:
    """q, k, v, i, f, scores positive so that no denominator is near 0."""
    shapes = ((heads[0], width), (heads[1], width), (heads[1], width_v), (heads[1],), (heads[1],))
    q, k, v, i, f = (torch.randn(1, length, *shape, device=DEVICE) for shape in shapes)
    return [x.requires_grad_() for x in (q.abs(), k.abs(), v, i, f + 4)]


def _outputs_and_gradients(inputs: list[Tensor], backend: str, **options: Any) -> tuple[Tensor, ...]:
    out, state = ops.mlstm(*inputs, backend=backend, **options)
    loss = out.square().sum() + sum(part.sin().sum() for part in state.tensors())
    return (out, *state.tensors(), *torch.autograd.grad(loss, inputs))


def _same(inputs: list[Tensor], tolerance: float = 2e-5, **options: Any) -> None:
    found, wanted = (_outputs_and_gradients(inputs, backend, **options) for backend in ("triton", "torch"))
    for ours, expected in zip(found, wanted, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512])
def test_every_chunk_size(chunk_size: int) -> None:
    """Some chunks of several tiles, the last of them ragged."""
    _same(_draw({16: 71, 32: 71, 64: 71, 512: 150}.get(chunk_size, chunk_size + 1)), chunk_size=chunk_size)


def test_many_chunks_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is walked in pieces where programs are too few; states must pass from one to the next."""
    pieces: list[int] = []
    step = launch._step
    monkeypatch.setattr(launch, "_step", lambda p, w, segments: (pieces.append(segments), step(p, w, segments)))
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 3)
    _same(_draw(16 * 13 - 3, heads=(1, 1), width_v=8), chunk_size=16)
    assert pieces == [3] * 6  # forward, and in the backward pass both ways, twice each


def test_packed_sequences_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 12)
    inputs = [x.detach()[0].requires_grad_() for x in _draw(260, heads=(2, 1), width_v=8)]
    cu = torch.tensor([0, 0, 17, 250, 260], dtype=torch.int32, device=DEVICE)
    for kind in KINDS:
        _same(inputs, chunk_size=16, cu_seqlens=cu, **KINDS[kind])


@pytest.mark.parametrize("packed", [False, True])
def test_the_running_maximum_is_that_of_torch_bit_by_bit(packed: bool) -> None:
    """Over more chunks than a step of the scan takes, with rows that no input reaches."""
    rows, count = ((2101, 2), 5) if packed else ((1, 2101, 2), 1)
    cu = torch.tensor([0, 40, 40, 41, 2000, 2101], dtype=torch.int32, device=DEVICE) if packed else None
    log_f, i, m0 = -torch.rand(rows, device=DEVICE), 3 * torch.randn(rows, device=DEVICE), torch.randn(count, 2, device=DEVICE)
    log_f.view(-1)[::97], i.view(-1)[::5] = -1e4, -torch.inf
    i[..., :60, :] = -torch.inf
    leaves = [x.requires_grad_() for x in (log_f, i, m0)]
    results = []
    for scan in (run_gate_scan, run_gate_scan_triton):
        found = scan(*leaves, cu, 16)
        loss = (found[2] * torch.linspace(-1, 1, 2101, device=DEVICE)[:, None]).sum() + found[3].square().sum()
        results.append((*found, *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6 if ours.is_cuda else 0, atol=1e-6 if ours.is_cuda else 0)


def test_keys_too_wide_chunks_too_long_and_float64_are_refused_by_name() -> None:
    with pytest.raises(errors.BackendUnavailable, match=r"D=300 .*256"):
        ops.mlstm(*_draw(4, width=300), backend="triton")
    with pytest.raises(errors.BackendUnavailable, match=r"chunk_size=1024 .*512"):
        ops.mlstm(*_draw(4), backend="triton", chunk_size=1024)
    with pytest.raises(errors.BackendUnavailable, match="float64"):
        ops.mlstm(*(x.double() for x in _draw(4)), backend="triton")


def test_strides_of_any_kind() -> None:
    """Heads before rows in memory, and widths that are no rows of memory."""
    q, k, v, i, f = _draw(40, heads=(4, 2))
    q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
    v = v.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    _same([q, k, v, i, f], chunk_size=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_run_repeats_bit_by_bit(dtype: torch.dtype) -> None:
    q, k, v, i, f = _draw(3000, heads=(8, 4), width=128, width_v=256)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)] + [i, f]
    first, second = (_outputs_and_gradients(inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_device() -> None:
    inputs = [x.detach()[0].requires_grad_() for x in _draw(700, heads=(2, 2), width=64, width_v=64)]
    cu = torch.tensor([0, 17, 17, 700], dtype=torch.int32, device=DEVICE)
    _outputs_and_gradients(inputs, "triton", cu_seqlens=cu)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _outputs_and_gradients(inputs, "triton", cu_seqlens=cu)
    finally:
        torch.cuda.set_sync_debug_mode(before)
