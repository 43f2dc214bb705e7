"""What conformance does not say about attention: gradients of gradients' inputs, registration, memory, honesty, refusals."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit._core.dispatch import Explanation


def _qkv(rows: int = 70, keys: int | None = None, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, ...]:
    shapes = ((2, rows, 4, 16), (2, keys or rows, 2, 16), (2, keys or rows, 2, 16))
    return tuple(torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window_size": (3, 0)},
        {"softcap": 2.0, "sinks": True},
        {"causal": True, "key_bias": True, "sinks": True},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    q, k, v = (t[:1] for t in _qkv(6, 8, torch.float64))
    extra = {"sinks": torch.randn(4, dtype=torch.float64), "key_bias": torch.randn(1, 8, dtype=torch.float64)}
    extra = {name: t for name, t in extra.items() if options.get(name)}
    fixed = {name: value for name, value in options.items() if name not in extra}
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *extra.values())]

    def function(*args: Tensor) -> Any:
        named = dict(zip(extra, args[3:], strict=True))
        return ops.attention(*args[:3], **named, **fixed, return_lse=True, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


def test_float64_equals_the_definition() -> None:
    q, k, v = _qkv(300, 333, torch.float64)
    for options in ({"causal": True}, {"window_size": (20, 7)}, {"softcap": 1.5}, {"sinks": torch.randn(4).double()}):
        ours = ops.attention(q, k, v, return_lse=True, backend="torch", **options)
        definition = ops.attention(q, k, v, return_lse=True, backend="reference", **options)
        for a, b in zip(ours, definition, strict=True):
            assert (a - b).abs().max() < 64 * torch.finfo(torch.float64).eps * b.abs().max()


@pytest.mark.parametrize(("form", "stable"), [("batched", "off"), ("packed", "delta"), ("selected rows", "exact_delta")])
def test_opcheck(form: str, stable: str) -> None:
    q, k, v = _qkv(20, grad=True)
    sinks, bias = torch.randn(4, requires_grad=True), torch.randn(2, 20, requires_grad=True)
    cu = torch.tensor([0, 5, 5, 20], dtype=torch.int32) if form == "packed" else None
    pos = torch.randint(0, 20, (2, 20)) if form == "selected rows" else None
    if cu is not None:
        q, k, v, bias = (t[0].detach().requires_grad_() for t in (q, k, v, bias))
    opcheck(torch.ops.attnkit.attention.default, (q, k, v, sinks, bias, cu, cu, pos, 0.25, 4, 0, 2.0, stable, torch.float32))


def test_compiles_without_a_break() -> None:
    q, k, v = _qkv(grad=True)
    cu = torch.tensor([0, 30, 70], dtype=torch.int32)
    packed = [t[0].detach() for t in (q, k, v)]
    calls = [
        lambda f: f(q, k, v, causal=True),
        lambda f: f(q, k, v, causal=True, softcap=2.0, return_lse=True),
        lambda f: f(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=40, max_seqlen_k=40, causal=True),
        lambda f: f(q, k, v, key_bias=torch.zeros(2, 70), window_size=(3, 3)),
    ]
    positions = torch.arange(0, 70, 7)
    some = q.detach()[:, ::7]
    selected = torch.compile(ops.query_sparse_attention, fullgraph=True, backend="aot_eager")(some, k, v, positions)
    assert torch.equal(selected, ops.query_sparse_attention(some, k, v, positions))
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for call in calls:
        ours, eager = call(compiled), call(ops.attention)
        ours, eager = (x if isinstance(x, tuple) else (x,) for x in (ours, eager))
        for a, b in zip(ours, eager, strict=True):
            assert torch.equal(a, b)
        if ours[0].requires_grad:
            torch.autograd.grad(ours[0].sum(), q)


@pytest.mark.parametrize("return_lse", [False, True])
def test_recompiles_at_most_twice_over_lengths(return_lse: bool) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ops.attention(*a, causal=True, return_lse=return_lse), fullgraph=True, backend=counter)
    for rows in range(20, 60, 2):
        compiled(*_qkv(rows))
    assert counter.frame_count <= 2


def test_packed_equals_separate() -> None:
    q, k, v = (t[0] for t in _qkv(300))
    cu = torch.tensor([0, 7, 7, 200, 300], dtype=torch.int32)
    packed = ops.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, backend="torch")
    for start, stop in ((0, 7), (7, 200), (200, 300)):
        alone = ops.attention(*(t[None, start:stop] for t in (q, k, v)), causal=True, backend="torch")[0]
        assert torch.equal(packed[start:stop], alone)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    q, k, v = _qkv(64)
    for options in ({"causal": True}, {"causal": True, "return_lse": True}, {"key_bias": torch.zeros(2, 64)}):
        both = ops.attention(q, k, v, **options)
        alone = ops.attention(q[1:], k[1:], v[1:], **{n: t[1:] if n == "key_bias" else t for n, t in options.items()})
        both, alone = (x[0] if isinstance(x, tuple) else x for x in (both, alone))
        assert torch.equal(both[1], alone[0])


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"window_size": (9, 0)}, {"softcap": 3.0}], ids=str)
def test_the_future_is_not_felt(options: dict[str, Any]) -> None:
    q, k, v = _qkv(300)
    before = ops.attention(q, k, v, causal=True, **options)
    for t in (k, v):
        t[:, 150:] = torch.randn_like(t[:, 150:]) * 100
    after = ops.attention(q, k, v, causal=True, **options)
    before, after = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


def test_large_scores_have_finite_gradients() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (t.to(dtype).detach().requires_grad_() for t in _qkv(65))
        out, lse = ops.attention(q * 100, k * 100, v, causal=True, return_lse=True)
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))
        assert all(torch.isfinite(t).all() for t in (out, lse, *grads))


def test_deterministic() -> None:
    q, k, v = _qkv(300, grad=True)
    runs = []
    for _ in range(30):
        out, lse = ops.attention(q, k, v, causal=True, return_lse=True, deterministic=True)
        runs.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that anything allocates."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result


@pytest.mark.parametrize(
    "options", [{"return_lse": True}, {"softcap": 2.0}, {"key_bias": True}, {"window_size": (100, 0)}], ids=str
)
def test_no_matrix_of_all_pairs(options: dict[str, Any]) -> None:
    """Above 4,096 tokens nothing of size T x S is allocated, forward or backward."""
    rows = 4608
    q, k, v = (torch.randn(1, rows, 1, 16, requires_grad=True) for _ in range(3))
    if "key_bias" in options:
        options = {"key_bias": torch.zeros(1, rows)}
    # the custom operator hides what it allocates from modes outside of it, so its parts are called directly
    from attnkit.ops.attention import _register

    bias = options.get("key_bias")
    left, right = options.get("window_size", (-1, 0))
    args = (k.detach(), v.detach(), None, bias, None, None, None, 0.25, left, right, options.get("softcap", 0.0), "off")
    with _Largest() as largest, torch.no_grad():
        inputs = (q.detach(), *args)
        out, lse, rest = _register._blockwise_forward(inputs, torch.float32)
        _register._blockwise_backward(inputs, torch.ones_like(out), torch.ones_like(lse), out, lse, rest, False)
    assert largest.numel <= rows * 1024


def test_explain_names_backend_and_reasons() -> None:
    q, k, v = _qkv()
    plain = ops.explain(ops.attention, q, k, v, causal=True)
    assert plain.chosen == "sdpa"
    capped = ops.explain("attention", q, k, v, softcap=2.0, return_lse=True)
    assert isinstance(capped, Explanation)
    assert capped.chosen == "torch"
    assert capped.rejected["sdpa"] == ["softcap", "return_lse"]
    assert "not sdpa: softcap; return_lse" in str(capped)
    wide = torch.randn(1, 5000, 1, 16)
    assert "16777216" in str(ops.explain("attention", wide, wide, wide, backend="reference"))
    with pytest.raises(errors.OptionError, match="did you mean 'attention'"):
        ops.explain("atention", q, k, v)
    with pytest.raises(errors.OptionError, match="unknown operator 'scaled_dot_product_attention'"):
        ops.explain(F.scaled_dot_product_attention, q, k, v)


def test_fused_kernels_take_only_what_they_can_do() -> None:
    """Each of these alone is reason enough; a reason that went missing would be a wrong result in silence."""
    q, k, v = _qkv(70)
    cu = torch.tensor([0, 70], dtype=torch.int32)
    calls = {
        "a window": {"window_size": (5, 0), "causal": True},
        "causal with T != S": {"q": q[:, :5], "causal": True},
        "softcap": {"softcap": 1.0},
        "sinks": {"sinks": torch.zeros(4)},
        "key_bias": {"key_bias": torch.zeros(2, 70)},
        "return_lse": {"return_lse": True},
        "packed sequences": {"q": q[0], "k": k[0], "v": v[0], "cu_seqlens_q": cu, "cu_seqlens_k": cu},
        "empty inputs": {"q": q[:, :0]},
        "head width is not contiguous": {"q": q.transpose(-1, -2).contiguous().transpose(-1, -2)},
        "out_dtype differs": {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16(), "out_dtype": torch.float32},
        "value width differs": {"v": torch.cat([v, v], -1)},
    }
    for reason, change in calls.items():
        explanation = ops.explain("attention", **{"q": q, "k": k, "v": v} | change)
        assert explanation.chosen == "torch"
        assert len(explanation.rejected["sdpa"]) == 1
        assert explanation.rejected["sdpa"][0].startswith(reason)
    positions = ops.explain("query_sparse_attention", q, k, v, torch.arange(70))
    assert positions.rejected["sdpa"] == ["explicit query positions"]


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    with pytest.raises(errors.BackendUnavailable, match=r"attention cannot run this call\. sdpa: softcap"):
        ops.attention(q, k, v, softcap=1.0, backend="sdpa")
    names = "auto, fa4, cudnn, sdpa, triton, torch, reference"
    assert [f'"{name}"' for name in names.split(", ") if f'"{name}"' not in str(ops.attention.__doc__)] == []
    with pytest.raises(errors.OptionError, match=f"no backend 'flash'; choose one of {names}"):
        ops.attention(q, k, v, backend="flash")
    monkeypatch.setenv("ATTNKIT_DISABLE", "attention.sdpa")
    assert ops.explain("attention", q, k, v).chosen == "torch"
    with pytest.raises(errors.BackendUnavailable, match="switched off by ATTNKIT_DISABLE"):
        ops.attention(q, k, v, backend="sdpa")


def _refusals() -> list[tuple[type[Exception], str, dict[str, Any]]]:
    q, k, v = _qkv()
    cu = torch.tensor([0, 70], dtype=torch.int32)
    packed = {"q": q[0], "k": k[0], "v": v[0]}
    return [
        (errors.ShapeError, "q has shape (2, 70, 4); expected 4 dimensions [B, T, H, D]", {"q": q[..., 0]}),
        (errors.ShapeError, "k has shape (2, 70, 2, 8) for [B, S, Hkv, D]; D must be 16 as in q", {"k": k[..., :8]}),
        (errors.ShapeError, "v has shape (2, 60, 2, 16) for [B, S, Hkv, Dv]; S must be 70 as in k", {"v": v[:, :60]}),
        (errors.ShapeError, "q has 3 heads and k has 2; the first must be a multiple", {"q": q[:, :, :3]}),
        (errors.DTypeError, "k is float64 but q is float32; convert one of them", {"k": k.double()}),
        (
            errors.DTypeError,
            "q is int64; allowed: float16, bfloat16, float32, float64",
            {"q": q.long(), "k": k.long(), "v": v.long()},
        ),
        (errors.UnsupportedError, "head width D=8 is outside 16..256; pad", {"q": q[..., :8], "k": k[..., :8]}),
        (errors.OptionError, "softcap=0.0 must be positive", {"softcap": 0.0}),
        (errors.OptionError, "window_size=(-2, 0) must hold counts", {"window_size": (-2, 0)}),
        (errors.OptionError, "out_dtype=torch.float16 is not allowed; choose", {"out_dtype": torch.float16}),
        (errors.ShapeError, "sinks has shape (3,) for [4]; 4 must be 4", {"sinks": torch.zeros(3)}),
        (errors.ShapeError, "key_bias has shape (2, 9) for [B, S]; S must be 70 as in k", {"key_bias": torch.zeros(2, 9)}),
        (errors.DTypeError, "key_bias is bool; allowed: float32", {"key_bias": torch.zeros(2, 70, dtype=torch.bool)}),
        (errors.OptionError, "cu_seqlens_k is missing; packed sequences need", packed | {"cu_seqlens_q": cu}),
        (errors.DTypeError, "cu_seqlens_q is int64; allowed: int32", packed | {"cu_seqlens_q": cu.long(), "cu_seqlens_k": cu}),
        (errors.ShapeError, "cu_seqlens_k must rise from 0 to 70", packed | {"cu_seqlens_q": cu, "cu_seqlens_k": cu - 1}),
        (errors.ShapeError, "N must be at least 1", packed | {"cu_seqlens_q": cu[:1], "cu_seqlens_k": cu[:1]}),
        (
            errors.OptionError,
            "below the longest sequence, 70",
            packed | {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_k": 69},
        ),
        (errors.OptionError, "max_seqlen_q and max_seqlen_k describe packed", {"max_seqlen_q": 70}),
    ]


@pytest.mark.parametrize(("error", "message", "change"), _refusals(), ids=lambda value: None)
def test_bad_input_is_refused_by_name(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    q, k, v = _qkv()
    with pytest.raises(error, match=re.escape(message)):
        ops.attention(**{"q": q, "k": k, "v": v} | change)


def test_positions_are_checked() -> None:
    q, k, v = _qkv(5, 9)
    for pos, message in (
        (torch.arange(4), "q_pos has shape (4,) for [T]; T must be 5 as in q"),
        (torch.arange(5) + 5, "q_pos ranges over 5..9; positions must lie in 0..8"),
        (torch.arange(5) - 1, "q_pos ranges over -1..3"),
        (torch.arange(5).float(), "q_pos is float32; allowed: int32, int64"),
    ):
        with pytest.raises(errors.InputError, match=re.escape(message)):
            ops.query_sparse_attention(q, k, v, pos)


def test_selected_rows_equal_rows_of_all() -> None:
    q, k, v = _qkv(333)
    rows = torch.tensor([3, 200, 17, 332])
    every = ops.attention(q, k, v, causal=True, backend="torch")
    some = ops.query_sparse_attention(q[:, rows], k, v, rows)
    assert (every[:, rows] - some).abs().max() < 8 * torch.finfo(torch.float32).eps * every.abs().max()


def test_errors_share_one_base() -> None:
    q, k, v = _qkv()
    with pytest.raises(errors.AttnkitError):
        ops.attention(q, k[..., :8], v)
    with pytest.raises(ValueError, match="D must be 16"):
        ops.attention(q, k[..., :8], v)
