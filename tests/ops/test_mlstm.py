"""What conformance does not say about the mLSTM: second opinions, gradients, units of states, forms, memory, refusals."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit.ops import RecurrentState

KINDS: dict[str, dict[str, Any]] = {
    "exp": {},
    "sigmoid": {"input_gate": "sigmoid"},
    "plain": {"input_gate": "sigmoid", "normalize": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def _draw(
    length: int = 37, *, batch: int = 2, heads: int = 4, width: int = 6, width_v: int = 5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, i, f with two key heads."""
    shapes = ((heads, width), (2, width), (2, width_v), (2,), (2,))
    q, k, v, i, f = (torch.randn(batch, length, *shape, dtype=dtype) for shape in shapes)
    return [q, k, v, i, f + 2]


def _state(kind: str, batch: int = 2, width: int = 6, width_v: int = 5, dtype: torch.dtype = torch.float64) -> RecurrentState:
    S, n, m = (torch.randn(batch, 2, *shape, dtype=dtype) for shape in ((width, width_v), (width,), ()))
    return RecurrentState(S, None if kind == "plain" else n, m if kind == "exp" else None)


def _near(found: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    for a, b in zip(_flat(found), _flat(wanted), strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in _flat(part)]


def _weighted(result: Any) -> Tensor:
    """A loss that every part of a result has its own share in."""
    generator = torch.Generator().manual_seed(3)
    parts = (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in _flat(result))
    return torch.stack([part.sum() for part in parts]).sum()


# --- what it computes


@each_kind
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_float64_equals_the_loop_with_all_gradients(kind: str, chunk_size: int) -> None:
    """Through states at both ends, the normaliser, and an eps that is large enough to see its own part of the gradient."""
    leaves = [t.requires_grad_() for t in (*_draw(), *_flat(_state(kind)))]

    def run(form: Any, **options: Any) -> list[Tensor]:
        parts = leaves[5:]
        state = RecurrentState(parts[0], *parts[1:])
        result = form(*leaves[:5], initial_state=state, eps=0.05, **KINDS[kind], **options)
        return [*_flat(result), *torch.autograd.grad(_weighted(result), leaves)]

    wanted = run(ops.mlstm_recurrent)
    _near(run(ops.mlstm, chunk_size=chunk_size), wanted)
    _near(run(ops.mlstm_parallel), wanted)


@each_kind
def test_gradcheck(kind: str) -> None:
    """Of a form that knows no autograd of ours, against finite differences: 9 tokens, widths 4 and 5."""
    q, k, v, i, f = _draw(9, batch=1, heads=2, width=4)
    leaves = [t.requires_grad_() for t in (q, k, v, 3 * i, f, *_flat(_state(kind, 1, 4)))]

    def function(*args: Tensor) -> list[Tensor]:
        return _flat(ops.mlstm(*args[:5], initial_state=RecurrentState(*args[5:]), **KINDS[kind], eps=1e-3))

    assert torch.autograd.gradcheck(function, leaves)


def test_equal_to_the_published_parallel_form() -> None:
    """Written down once more, without our code: D~, its row maximum, S, N."""
    q, k, v, i, f = (t[:, :, :2] if t.dim() > 3 else t for t in _draw(29))
    q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))
    sums = F.logsigmoid(f).cumsum(-1)
    log_d = (sums[..., :, None] - sums[..., None, :] + i[..., None, :]).masked_fill(
        ~torch.ones(29, 29).tril().bool(), -torch.inf
    )
    m = torch.maximum(log_d.amax(-1), sums)[..., None]  # m starts at 0
    scores = q @ k.transpose(-1, -2) / 6**0.5 * torch.exp(log_d - m)
    whole = torch.maximum(scores.sum(-1, keepdim=True).abs(), torch.exp(-m)) + 1e-6
    wanted = (scores @ v / whole).transpose(1, 2)
    found, state = ops.mlstm(*(t.transpose(1, 2) for t in (q, k, v, i, f)))
    _near(found, wanted)
    _near(state.m, m[..., -1, 0])


def test_sigmoid_without_normaliser_is_scalar_decay() -> None:
    q, k, v, i, f = _draw()
    found = ops.mlstm(q, k, v, i, f, **KINDS["plain"])
    _near(found, ops.scalar_decay_attention(q, k * torch.sigmoid(i)[..., None], v, F.logsigmoid(f)))


# --- units: what m is may be chosen freely


def test_units_of_the_state_do_not_matter() -> None:
    """The same memory in other units gives the same outputs, and what comes out is the same memory."""
    inputs, state, shift = _draw(), _state("exp"), torch.tensor([3.0, -2.0], dtype=torch.float64)
    assert state.n is not None
    assert state.m is not None
    other = RecurrentState(state.S * torch.exp(shift)[:, None, None], state.n * torch.exp(shift)[:, None], state.m - shift)
    out, last = ops.mlstm(*inputs, initial_state=state, eps=0.0)
    again, last_again = ops.mlstm(*inputs, initial_state=other, eps=0.0)
    _near(again, out)
    for result in (last, last_again):
        assert result.m is not None
    _near(last_again.S * torch.exp(last_again.m)[..., None, None], last.S * torch.exp(last.m)[..., None, None])


def test_louder_inputs_cancel_where_the_denominator_is_large() -> None:
    """i + c and m0 + c change nothing as long as |q . n| is what is divided by."""
    q, k, v, i, f = _draw()
    q, k = q.abs(), k.abs()
    i, state = i + 8, _state("exp")
    assert state.n is not None
    assert state.m is not None
    state = state._replace(n=state.n.abs(), m=state.m + 8)
    out, _ = ops.mlstm(q, k, v, i, f, initial_state=state, eps=0.0)
    louder, _ = ops.mlstm(q, k, v, i + 5, f, initial_state=state._replace(m=state.m + 5), eps=0.0)
    _near(louder, out)


# --- forms


@each_kind
def test_chunk_sizes_agree(kind: str) -> None:
    leaves = [t.requires_grad_() for t in _draw(300, batch=1)]
    results = []
    for size in (16, 32, 64, 128, 256, 512):
        result = ops.mlstm(*leaves, chunk_size=size, **KINDS[kind])
        results.append([*_flat(result), *torch.autograd.grad(_weighted(result), leaves)])
    for other in results[1:]:
        _near(other, results[0])


@each_kind
@pytest.mark.parametrize("cut", [0, 1, 16, 20, 36])
def test_split_and_carry_is_one_pass(kind: str, cut: int) -> None:
    """With gradients, which go through the state that is carried."""
    leaves = [t.requires_grad_() for t in _draw()]
    options = KINDS[kind] | {"chunk_size": 16, "eps": 0.05}
    out, state = ops.mlstm(*leaves, **options)
    first, carried = ops.mlstm(*(t[:, :cut] for t in leaves), **options)
    second, last = ops.mlstm(*(t[:, cut:] for t in leaves), initial_state=carried, **options)
    parts = (torch.cat([first, second], 1), last)
    _near(parts, (out, state))
    _near(torch.autograd.grad(_weighted(parts), leaves), torch.autograd.grad(_weighted((out, state)), leaves))


@each_kind
def test_steps_are_the_sequence(kind: str) -> None:
    inputs = _draw(19)
    out, last = ops.mlstm(*inputs, **KINDS[kind])
    _, state = ops.mlstm(*(t[:, :3] for t in inputs), **KINDS[kind])
    for t in range(3, 19):
        before = [part.clone() for part in state.tensors()]
        h, new = ops.mlstm_step(*(x[:, t] for x in inputs), state, **KINDS[kind])
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True)), "the state was changed in place"
        state = new
        _near(h, out[:, t])
    _near(state, last)


@each_kind
def test_packed_is_separate_bit_for_bit(kind: str) -> None:
    """Gradients and states too, for one chunk size."""
    lengths = [5, 0, 70, 1, 33]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    leaves = [t[0].float().detach().requires_grad_() for t in _draw(109, batch=1)]
    state = _state(kind, 5, dtype=torch.float32)
    options = KINDS[kind] | {"chunk_size": 32}
    out, last = ops.mlstm(*leaves, cu_seqlens=cu, initial_state=state, **options)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), leaves)
    for index, (start, stop) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        part = [t[None, start:stop].detach().requires_grad_() for t in leaves]
        alone, alone_last = ops.mlstm(*part, initial_state=state.index_select(torch.tensor([index])), **options)
        assert torch.equal(out[start:stop], alone[0])
        for a, b in zip(last.tensors(), alone_last.tensors(), strict=True):
            assert torch.equal(a[index], b[0])
        if stop > start:
            own = torch.autograd.grad((alone * alone.detach().cos()).sum(), part)
            assert all(torch.equal(a[start:stop], b[0]) for a, b in zip(grads, own, strict=True))


def test_one_state_serves_all_sequences() -> None:
    inputs, state = _draw(), _state("exp", 1)
    leaf = state.S.requires_grad_()
    _near(ops.mlstm(*inputs, initial_state=state), ops.mlstm(*inputs, initial_state=state.expand(2)))
    out, _ = ops.mlstm(*inputs, initial_state=state)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == (1, 2, 6, 5)


# --- range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_gates_in_a_wide_range_stay_finite(kind: str, dtype: torch.dtype) -> None:
    """Constant and mixed, to both ends; with gradients."""
    for low, high in ((-90.0, 90.0), (90.0, 90.0), (-90.0, -90.0), (40.0, 40.0)):
        q, k, v, i, f = _draw(130, dtype=torch.float32)
        q, k = q.abs(), k.abs()  # what is divided by is not 0 by chance
        i, f = (low + (high - low) * torch.rand(i.shape) for _ in range(2))
        leaves = [t.requires_grad_() for t in (q.to(dtype), k.to(dtype), v.to(dtype), i, f)]
        result = ops.mlstm(*leaves, **KINDS[kind])
        assert all(t.isfinite().all() for t in _flat(result))
        assert all(t.isfinite().all() for t in torch.autograd.grad(result[0].float().sum(), leaves))


def test_a_decay_to_nothing_does_not_blur_what_comes_after() -> None:
    """Sums of gates are large afterwards; differences of them must still be right."""
    q, k, v, i, f = _draw(512, batch=1, dtype=torch.float32)
    f[:, 10:100] = -90.0
    f[:, 100:] = 4 + f[:, 100:]
    options = KINDS["plain"] | {"chunk_size": 512}
    found, _ = ops.mlstm(q, k, v, i, f, **options)
    wanted, _ = ops.mlstm_recurrent(*(t.double() for t in (q, k, v, i, f)), **KINDS["plain"])
    assert (found - wanted)[:, 100:].abs().max() < 1e-5 * wanted.abs().max()


# --- registration, compilation, memory


@each_kind
@pytest.mark.parametrize("form", ["batched", "packed"])
def test_opcheck(kind: str, form: str) -> None:
    q, k, v, i, f = (t.float().requires_grad_() for t in _draw(21))
    cu = None
    if form == "packed":
        q, k, v, i, f = (t[0].detach().requires_grad_() for t in (q, k, v, i, f))
        cu = torch.tensor([0, 9, 9, 21], dtype=torch.int32)
    normalize, state = kind != "plain", _state(kind, 3 if cu is not None else 2, dtype=torch.float32)
    decay, m = F.logsigmoid(f).detach().requires_grad_(), (i * 0.1).detach() if kind == "exp" else None
    args = (q, k, v, decay, i.detach(), m, state.S, state.n, cu, normalize, 0.4, 1e-6, 16)
    opcheck(torch.ops.attnkit.chunkwise.default, args)
    if kind == "exp":
        opcheck(torch.ops.attnkit.gate_scan.default, (decay, i, state.m, cu, 16))


@each_kind
def test_compile(kind: str) -> None:
    leaves = [t.requires_grad_() for t in _draw(33, dtype=torch.float32)]

    def function(*args: Tensor) -> Any:
        out, state = ops.mlstm(*args, **KINDS[kind])
        return ops.mlstm(*(t[:, :5] for t in args), initial_state=state, **KINDS[kind])[0] + out[:, :5]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, traced = function(*leaves), compiled(*leaves)
    assert torch.equal(plain, traced)
    for a, b in zip(*(torch.autograd.grad(_weighted(out), leaves) for out in (plain, traced)), strict=True):
        assert torch.equal(a, b)


def test_memory_does_not_grow_with_the_square() -> None:
    """Largest tensor of both passes: an input, a state for each chunk, or a stretch of scores of fixed size."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in _flat(result) if isinstance(result, Tensor | tuple | list) else []:
                largest = max(largest, t.numel())
            return result

    from attnkit.ops._chunkwise_core import _register, passes

    q, k, v, decay = (torch.randn(1, 16384, 1, *width) for width in ([16], [16], [16], []))
    inputs = (q, k, v, -decay.abs(), None, None, None, None, None, True, 0.25, 1e-6, 64)
    with Watch():
        out, den, _, _ = _register._forward(inputs)
        _register._backward(inputs, den[None, ..., None, :].view(1, 16384, 1), out.view_as(v), None, None, True)
    assert largest <= passes._ELEMENTS < 16384**2 / 64


def test_nothing_of_chunks_is_kept_for_the_backward_pass() -> None:
    leaves = [t.requires_grad_() for t in _draw(128, width=32, width_v=32, dtype=torch.float32)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mlstm(*leaves, chunk_size=16)
    assert max(t.numel() for t in kept) <= leaves[0].numel()


# --- what is refused


def _call(**changes: Any) -> None:
    names = ("q", "k", "v", "i", "f")
    given = dict(zip(names, _draw(7, dtype=torch.float32), strict=True)) | changes
    inputs = [given.pop(name) for name in names]
    ops.mlstm(*inputs, **given)


CU = torch.tensor([0, 3, 7], dtype=torch.int32)
STATE = RecurrentState(torch.zeros(2, 2, 6, 5), torch.zeros(2, 2, 6), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (errors.ShapeError, "k has shape (2, 7, 2, 8) for [B, T, Hkv, D]; D must be 6 as in q", {"k": torch.ones(2, 7, 2, 8)}),
        (errors.ShapeError, "q has 3 heads and k has 2", {"q": torch.ones(2, 7, 3, 6)}),
        (errors.ShapeError, "i has shape (2, 7, 4); expected (2, 7, 2)", {"i": torch.ones(2, 7, 4)}),
        (errors.DTypeError, "f is float64; allowed: float32", {"f": torch.ones(2, 7, 2, dtype=torch.float64)}),
        (errors.DTypeError, "v is float64 but q is float32", {"v": torch.ones(2, 7, 2, 5, dtype=torch.float64)}),
        (errors.OptionError, "input_gate='tanh' is not allowed", {"input_gate": "tanh"}),
        (errors.UnsupportedError, 'normalize=False with input_gate="exp"', {"normalize": False}),
        (errors.OptionError, "eps=-1 must be a number of at least 0", {"eps": -1}),
        (errors.OptionError, "chunk_size=48 must be", {"chunk_size": 48}),
        (errors.OptionError, "chunk_size=8 must be", {"chunk_size": 8}),
        (errors.ShapeError, "packed sequences are [R, H, D], without a batch dimension", {"cu_seqlens": CU}),
        (errors.OptionError, "initial_state has S, n; this call keeps S, n, m", {"initial_state": STATE._replace(m=None)}),
        (errors.OptionError, "initial_state has S, n, m; this call keeps S, n.", {"initial_state": STATE} | KINDS["sigmoid"]),
        (errors.OptionError, "initial_state is a tuple", {"initial_state": tuple(STATE)}),
        (
            errors.ShapeError,
            "initial_state.S has shape (3, 2, 6, 5); expected (2, 2, 6, 5)",
            {"initial_state": STATE._replace(S=torch.zeros(3, 2, 6, 5))},
        ),
        (errors.DTypeError, "initial_state.S is float64", {"initial_state": STATE._replace(S=STATE.S.double())}),
        (errors.OptionError, "mlstm has no backend 'cuda'", {"backend": "cuda"}),
    ],
)
def test_refusals(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        _call(**changes)


@pytest.mark.parametrize(
    ("cu", "error", "message"),
    [
        ([1, 7], errors.ShapeError, "cu_seqlens must rise from 0 to 7"),
        ([0, 6], errors.ShapeError, "cu_seqlens must rise from 0 to 7"),
        ([0, 5, 3, 7], errors.ShapeError, "cu_seqlens must rise from 0 to 7"),
        ([0], errors.ShapeError, "cu_seqlens has 1 entries"),
    ],
)
def test_boundaries_are_checked(cu: list[int], error: type[Exception], message: str) -> None:
    inputs = [t[0] for t in _draw(7, batch=1, dtype=torch.float32)]
    with pytest.raises(error, match=re.escape(message)):
        ops.mlstm(*inputs, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(errors.DTypeError, match="cu_seqlens is int64"):
        ops.mlstm(*inputs, cu_seqlens=torch.tensor([0, 7]))


def test_the_parallel_form_stops_where_it_would_not_fit() -> None:
    with pytest.raises(errors.OptionError, match="use mlstm"):
        ops.mlstm_parallel(*_draw(5000, batch=1, dtype=torch.float32))
