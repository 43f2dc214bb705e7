"""What conformance does not say about entmax attention: gradients, bits, memory, sparsity, registration, refusals."""

import re
from typing import Any

import entmax as peer
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit.ops.entmax_attention import _register, blockwise

ALPHAS = (1.1, 1.25, 4 / 3, 1.5, 1.75, 2.0)


def _qkv(rows: int = 70, keys: int | None = None, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, ...]:
    shapes = ((2, rows, 4, 16), (2, keys or rows, 2, 16), (2, keys or rows, 2, 16))
    return tuple(torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_to_another_implementation(alpha: float) -> None:
    q, k, v = _qkv(50, dtype=torch.float64)
    q = 3 * q
    keys, values = (t.repeat_interleave(2, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 4
    prob = peer.entmax_bisect(scores.masked_fill(~torch.ones(50, 50).tril().bool(), -1e9), alpha=alpha, n_iter=60)
    wanted = torch.einsum("bhts,bshd->bthd", prob, values)
    for backend in ("torch", "reference"):
        assert (ops.entmax_attention(q, k, v, alpha=alpha, causal=True, backend=backend) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [*ALPHAS, "learned"])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window_size": (3, 0), "softcap": 2.0}], ids=str)
def test_gradcheck(alpha: float | str, options: dict[str, Any]) -> None:
    q, k, v = (t[:1] for t in _qkv(5, 7, torch.float64))
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    if isinstance(alpha, str):
        leaves.append(torch.tensor([1.1, 1.3, 1.6, 1.9], dtype=torch.float64, requires_grad=True))

    def function(*args: Tensor) -> Any:
        return ops.entmax_attention(*args[:3], alpha=args[3] if len(args) > 3 else alpha, **options, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


def _tall(rows: int, keys: int) -> dict[str, Any]:
    bias = torch.zeros(2, keys, dtype=torch.float64).masked_fill_(torch.rand(2, keys) < 0.3, -torch.inf)
    return {"key_bias": bias, "causal": rows != keys}


@pytest.mark.parametrize("rows", [(70, 70), (130, 600), (300, 65)], ids=str)
def test_float64_equals_the_definition(rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether scores of a tile are kept or computed again in each walk; gradients too."""
    q, k, v = _qkv(*rows, torch.float64, grad=True)
    alpha = torch.tensor([1.2, 1.4, 1.6, 1.8], dtype=torch.float64, requires_grad=True)
    for options in (_tall(*rows), {"window_size": (20, 7)}, {"softcap": 1.5, "alpha": 2.0}, {"alpha": alpha, "causal": True}):
        found = []
        leaves = (q, k, v, alpha) if "alpha" in options and options["alpha"] is alpha else (q, k, v)
        for backend, cached in (("reference", 0), ("torch", blockwise.CACHED), ("torch", 0)):
            monkeypatch.setattr(blockwise, "CACHED", cached)
            out, tau, *_ = ops.entmax_attention(2 * q, k, v, **options, return_aux=True, backend=backend)
            grads = torch.autograd.grad((out * out.detach().cos()).sum(), leaves)
            found.append([out.detach(), tau, *grads])
        for wanted, ours, again in zip(*found, strict=True):
            assert torch.equal(ours, again)
            finite = torch.isfinite(wanted)
            assert torch.equal(finite, torch.isfinite(ours))
            assert (ours - wanted)[finite].abs().max() < 1e-11


def test_packed_equals_separate() -> None:
    lengths = [5, 0, 70, 130]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (t[0].detach().requires_grad_() for t in _qkv(205))
    out, tau, *_ = ops.entmax_attention(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, return_aux=True, backend="torch"
    )
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = [t[None, start:stop].detach().requires_grad_() for t in (q, k, v)]
        alone, tau_alone, *_ = ops.entmax_attention(*part, causal=True, return_aux=True, backend="torch")
        assert torch.equal(out[start:stop], alone[0])
        assert torch.equal(tau[start:stop], tau_alone[0])
        for whole, own in zip(grads, torch.autograd.grad(alone.square().sum(), part), strict=True):
            assert torch.equal(whole[start:stop], own[0])


def test_what_is_masked_leaves_no_trace_and_runs_repeat() -> None:
    q, k, v = _qkv(90)
    bias = torch.zeros(2, 90)
    bias[0, 60:], bias[1] = -torch.inf, -torch.inf

    def run(fill: float) -> list[Tensor]:
        leaves = [t.detach().clone() for t in (q, k, v)]
        for t in leaves[1:]:
            t[bias.isneginf()] = fill
        leaves = [t.requires_grad_() for t in leaves]
        out, tau, *_ = ops.entmax_attention(*leaves, key_bias=bias, causal=True, return_aux=True, backend="torch")
        return [out.detach(), tau, *torch.autograd.grad(out.square().sum(), leaves)]

    plain, again, other = run(0.0), run(0.0), run(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    out, tau, d_q, d_k, d_v = plain
    assert (out[1] == 0).all()
    assert (tau[1] == torch.inf).all()
    assert (d_q[1] == 0).all()
    assert (d_k[0, 60:] == 0).all()
    assert (d_v[0, 60:] == 0).all()


def test_the_backward_pass_keeps_tau_and_o2_and_no_scores() -> None:
    q, k, v = _qkv(200, grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.entmax_attention(q, k, v, causal=True)
    assert max(t.numel() for t in kept) <= q.numel()
    second = next(t for t in kept if t.shape == out.shape and not torch.equal(t, out) and t.data_ptr() != q.data_ptr())
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 4
    u = ops.entmax(scores.masked_fill(~torch.ones(200, 200).tril().bool(), -torch.inf)).sqrt()
    wanted = torch.einsum("bhts,bshd->bthd", u / u.sum(-1, keepdim=True), v.repeat_interleave(2, 2))
    assert (second - wanted).abs().max() < 1e-4
    with torch.no_grad():
        inputs = (q, k, v, None, None, None, None, None, 0.25, -1, 0, 0.0, 1.5, 2, False)
        assert _register._forward(inputs, False)[2] is None


def test_memory_of_the_torch_form_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a long call is a tile of scores or an input."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return result

    monkeypatch.setattr(blockwise, "CACHED", 1024)
    q, k, v = (torch.randn(1, 3000, 1, 16) for _ in range(3))
    inputs = (q, k, v, None, None, None, None, None, 0.25, -1, 0, 0.0, 1.5, 2, False)
    with Watch():
        out, *kept = _register._forward(inputs, True)
        _register._backward(inputs, out, None, out, *kept, False)
    assert largest <= 8 * blockwise.BLOCK_Q * 1024  # eight edges of a histogram are compared at once


def test_sparsity_counts_what_is_zero() -> None:
    q, k, v = _qkv(200)
    q = 6 * q
    result = ops.entmax_attention(q, k, v, causal=True, return_aux=True)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 4
    causal = torch.ones(200, 200).tril().bool()
    prob = ops.entmax(scores.masked_fill(~causal, -torch.inf))
    assert ((prob > 0).sum(-1).transpose(1, 2) - result.support).abs().max() <= 1
    assert torch.equal(result.seen, torch.arange(1, 201)[None, :, None].expand(2, 200, 4).int())
    tiles = torch.nn.functional.pad(prob > 0, (0, 56, 0, 56)).unflatten(3, (4, 64)).unflatten(2, (4, 64)).any(5).any(3)
    assert torch.equal(result.tiles, torch.stack([tiles.sum((0, 2, 3)), torch.full((4,), 20)], -1))
    found = ops.attention_sparsity(result)
    assert torch.allclose(found["element"], 1 - (prob > 0).sum((0, 2, 3)) / (2 * causal.sum()).double(), atol=1e-4)
    assert torch.allclose(found["support"], (prob > 0).sum((0, 2, 3)).double() / 400, atol=1e-2)
    assert torch.allclose(found["tile"], 1 - tiles.sum((0, 2, 3)).double() / 20)
    cu = torch.tensor([0, 200, 400], dtype=torch.int32)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    again = ops.entmax_attention(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, return_aux=True)
    assert torch.equal(again.support, result.support.flatten(0, 1))
    assert torch.equal(again.tiles, result.tiles)


def test_alpha_one_is_softmax() -> None:
    q, k, v = _qkv(40)
    plain = ops.attention(q, k, v, causal=True, window_size=(9, 0), softcap=3.0)
    assert torch.equal(ops.entmax_attention(q, k, v, alpha=1, causal=True, window_size=(9, 0), softcap=3.0), plain)
    assert ops.explain("entmax_attention", q, k, v, alpha=1.0).chosen == "softmax"
    near = ops.entmax_attention(q, k, v, alpha=1.001, causal=True, window_size=(9, 0), softcap=3.0)
    assert (near - plain).abs().max() < 5e-3


@pytest.mark.parametrize("form", ["batched", "packed", "learned"])
def test_opcheck(form: str) -> None:
    q, k, v = _qkv(20, grad=True)
    bias = torch.zeros(2, 20)
    bias[0, :4] = -torch.inf
    alphas = torch.full((4,), 1.4, requires_grad=True) if form == "learned" else None
    cu = torch.tensor([0, 5, 5, 20], dtype=torch.int32) if form == "packed" else None
    if cu is not None:
        q, k, v, bias = (t[0].detach().requires_grad_(t.requires_grad) for t in (q, k, v, bias))
    args = (q, k, v, alphas, bias, cu, cu, None, 0.25, -1, 0, 2.0, 1.5, 2, alphas is not None, True)
    opcheck(torch.ops.attnkit.entmax_attention.default, args)


def test_compile() -> None:
    q, k, v = _qkv(33, grad=True)
    alpha = torch.full((4,), 1.4, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Any:
        return ops.entmax_attention(q, k, v, alpha=alpha, causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, traced = function(q, k, v, alpha), compiled(q, k, v, alpha)
    assert torch.equal(plain, traced)
    leaves = (q, k, v, alpha)
    weight = torch.randn(plain.shape)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weight) for out in (plain, traced)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (errors.OptionError, "alpha=0.9 is outside 1..2", {"alpha": 0.9}),
        (errors.OptionError, "alpha=2.1 is outside 1..2", {"alpha": 2.1}),
        (errors.OptionError, "alpha ranges over 1..1;", {"alpha": torch.ones(4)}),
        (errors.ShapeError, "alpha has shape (2,)", {"alpha": torch.full((2,), 1.5)}),
        (errors.DTypeError, "alpha is int64", {"alpha": torch.ones(4, dtype=torch.int64)}),
        (errors.OptionError, "n_refine=0 must be at least 1", {"n_refine": 0}),
        (errors.OptionError, "key_bias holds values other than 0 and -inf", {"key_bias": torch.ones(2, 70)}),
        (errors.OptionError, "alpha=1 is softmax, which has no threshold", {"alpha": 1, "return_aux": True}),
        (errors.OptionError, "softcap=-1 must be positive", {"softcap": -1}),
        (errors.BackendUnavailable, "alpha other than 1", {"backend": "softmax"}),
        (errors.BackendUnavailable, "alpha=1, which `attention` computes", {"alpha": 1, "backend": "torch"}),
    ],
)
def test_refusals(error: type[Exception], message: str, call: dict[str, Any]) -> None:
    q, k, v = _qkv()
    with pytest.raises(error, match=re.escape(message)):
        ops.entmax_attention(q, k, v, **call)
