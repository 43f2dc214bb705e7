"""What the attention kernels promise on a GPU beyond numbers: choice, determinism, graphs, compilation, memory, offsets."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit.ops.attention import flash4

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _qkv(
    num_q: int, num_k: int, heads: tuple[int, int] = (8, 2), width: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_q, heads[0]), (num_k, heads[1]), (num_k, heads[1]))
    q, k, v = (torch.randn(2, *shape, width, device="cuda", dtype=dtype) for shape in shapes)
    return q, k, v


def _chosen(*tensors: Tensor, **options: object) -> str | None:
    return ops.explain("attention", *tensors, **options).chosen


def test_what_auto_chooses() -> None:
    q, k, v = _qkv(256, 256)
    library = "cudnn" if flash4.missing() else "fa4"
    assert _chosen(q, k, v, causal=True) == library
    assert _chosen(q[:, -1:], k, v, causal=True) == "triton"
    assert _chosen(q, k, v, causal=True, softcap=5.0) == "triton"
    assert _chosen(*(t.float() for t in (q, k, v)), causal=True) == "triton"
    assert _chosen(*(t.double() for t in (q, k, v)), causal=True) == "torch"
    if HOPPER and library == "cudnn":
        explanation = ops.explain("attention", *_qkv(256, 256, width=256), causal=True)
        assert explanation.chosen == "triton"
        assert "faster" in str(explanation.rejected["sdpa"])


def _gradients(call: Callable[[], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call().float().square().sum(), inputs)


@pytest.mark.parametrize("options", [{}, {"window_size": (50, 0)}, {"softcap": 3.0}], ids=str)
def test_deterministic(options: dict[str, object]) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(333, 333))
    first, *rest = (
        _gradients(lambda: ops.attention(q, k, v, causal=True, deterministic=True, **options), q, k, v) for _ in range(10)
    )
    assert all(torch.equal(a, b) for run in rest for a, b in zip(run, first, strict=True))


@pytest.mark.parametrize(("num_q", "num_k"), [(1, 5000), (4, 777), (300, 300)])
def test_cuda_graph(num_q: int, num_k: int) -> None:
    """A captured call computes the same as an eager one on whatever its inputs hold when it is replayed."""
    q, k, v = _qkv(num_q, num_k)
    call = lambda: ops.attention(q, k, v, causal=True, return_lse=True, backend="triton")  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for t in (q, k, v):
        t.normal_()
    graph.replay()
    eager_out, eager_lse = call()
    assert torch.equal(out, eager_out)
    assert torch.equal(lse, eager_lse)


def test_cuda_graph_of_packed_sequences_with_other_boundaries() -> None:
    """Tiles of packed sequences are found on the device: one graph serves every packing of the same rows."""
    q, k, v = (t[0] for t in _qkv(500, 500))
    cu = torch.tensor([0, 100, 250, 500], device="cuda", dtype=torch.int32)
    call = lambda: ops.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="triton")  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    cu.copy_(torch.tensor([0, 7, 7, 500]))
    graph.replay()
    alone = ops.attention(q[None, 7:], k[None, 7:], v[None, 7:], causal=True, backend="triton")
    torch.testing.assert_close(out[7:], alone[0])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(200, 200))
    function = lambda: ops.attention(q, k, v, causal=True, backend=backend).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(), function())
    for ours, eager in zip(_gradients(compiled, q, k, v), _gradients(function, q, k, v), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2 * float(eager.abs().max()))


def test_operator_is_well_behaved() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(65, 65, width=32, dtype=torch.float32))
    arguments = (q, k, v, None, None, None, None, None, 0.2, -1, 0, 0.0, "off", torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.attnkit.attention_triton.default, arguments, test_utils=tests)


def test_memory_is_that_of_flash_attention() -> None:
    """Peak beyond the inputs, forward and backward, against torch's FlashAttention-2."""
    q, k, v = (t.requires_grad_() for t in _qkv(8192, 8192, heads=(16, 16)))

    def peak(backend: str) -> int:
        _gradients(lambda: ops.attention(q, k, v, causal=True, backend=backend), q, k, v)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = ops.attention(q, k, v, causal=True, backend=backend)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return torch.cuda.max_memory_allocated() - before

    assert peak("triton") <= 1.05 * peak("sdpa")


def test_offsets_beyond_32_bits() -> None:
    """4.3 GB of queries in one tensor: the last rows are those of a call on a slice."""
    heads, width, num = 128, 128, 140_000
    q = torch.randn(1, num, heads, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, num, 1, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = ops.attention(q, k, v, causal=True, window_size=(63, 0), backend="triton")
    tail = ops.attention(q[:, -200:], k[:, -264:], v[:, -264:], causal=True, window_size=(63, 0), backend="triton")
    torch.testing.assert_close(out[:, -200:], tail, rtol=0.02, atol=0.004)  # values are near 0.1; tiles start elsewhere


def test_sanitizer() -> None:
    """compute-sanitizer watches every access of a small set of calls."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not on this machine")
    script = Path(__file__).with_name("sanitized.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 errors" in done.stdout
    assert "calls watched" in done.stdout
