"""What conformance does not say about query moments: precision in 16 bits, strides, parts, what is not there, refusals."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit.ops.query_moments import tokens as torch_form
from attnkit.ops.query_moments._triton import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton", "reference")


def _call(*, tokens: int = 90, width: int = 32, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    level = 4 * torch.randn(2, 3, width)
    q = torch.randn(2, tokens, 3, width) + level[:, None]
    inv_freq = 10_000.0 ** -(torch.arange(width // 2) / (width // 2))
    inputs = {"q": q.to(dtype), "inv_freq": inv_freq, "positions": torch.arange(tokens), "shift": level}
    return {name: t.to(DEVICE) for name, t in inputs.items()} | options


def _close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], share: float = 1e-6) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_keep_16_bits(dtype: torch.dtype, interleaved: bool) -> None:
    inputs = _call(dtype=dtype, interleaved=interleaved)
    exact = ops.query_moments(
        **inputs | {name: inputs[name].double() for name in ("q", "inv_freq", "shift")}, backend="reference"
    )
    for backend in ("torch", "triton"):
        if backend == "triton" and DEVICE == "cpu" and dtype != torch.float32:
            continue  # the interpreter has no 16 bits
        _close(ops.query_moments(**inputs, backend=backend), exact, 2**-16)


def test_the_sum_of_two_numbers_of_16_bits_keeps_16_bits() -> None:
    """What the kernel multiplies for queries in 16 bits, and what one number of 16 bits would have lost."""
    x = torch.randn(500, 24) + torch.linspace(-2, 2, 24)
    exact = x.double().T @ x.double()
    high = x.bfloat16()
    rest = (2 * (x - high.float())).bfloat16()
    half = high.double().T @ (high.double() + rest.double()) / 2
    assert ((half + half.T) - exact).abs().max() <= 2**-16 * exact.abs().max()
    assert (high.double().T @ high.double() - exact).abs().max() > 2**-14 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_real_may_hold_anything(backend: str) -> None:
    inputs = _call()
    real = torch.rand(2, 90, device=DEVICE) < 0.7
    wanted = ops.query_moments(**inputs, real=real, backend=backend)
    dirty = inputs["q"].masked_fill(~real[..., None, None], torch.nan)
    for found, other in zip(ops.query_moments(**inputs | {"q": dirty}, real=real, backend=backend), wanted, strict=True):
        assert torch.equal(found, other)
    assert wanted[0].tolist() == real.sum(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_out_are_the_first_real_tokens(backend: str) -> None:
    inputs = _call()
    real = torch.ones(2, 90, dtype=torch.bool, device=DEVICE)
    real[0, :50] = False
    found = ops.query_moments(**inputs, real=real, skip=torch.tensor([7, 0], device=DEVICE), backend=backend)
    assert found[0].tolist() == [33, 90]
    real[0, :57] = False
    for one, other in zip(found, ops.query_moments(**inputs, real=real, backend=backend), strict=True):
        assert torch.equal(one, other)
    none = ops.query_moments(**inputs, skip=torch.full((2,), 90, device=DEVICE), backend=backend)
    assert all((part == 0).all() for part in none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows(backend: str) -> None:
    inputs = _call()
    inputs["q"][0, 20, 0, 0] = torch.nan
    _, sums, products = ops.query_moments(**inputs, backend=backend)
    assert sums[0, 0, 0].isnan()
    assert products[0, 0, 0].isnan().all()
    assert sums[0, 1:].isfinite().all()
    assert products[1].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides(backend: str) -> None:
    inputs = _call()
    wanted = ops.query_moments(**inputs, backend=backend)
    q, room = inputs["q"], torch.randn(2, 180, 3, 40, device=DEVICE)
    room[:, ::2, :, :32] = q
    views = (q.transpose(1, 2).contiguous().transpose(1, 2), q.movedim(3, 1).contiguous().movedim(1, 3), room[:, ::2, :, :32])
    for view in views:
        _close(ops.query_moments(**inputs | {"q": view}, backend=backend), wanted)
    alike = inputs | {"positions": inputs["positions"].expand(2, -1), "shift": inputs["shift"].mT.contiguous().mT}
    _close(ops.query_moments(**alike, backend=backend), wanted)


def test_parts_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, module, name, size in (("torch", torch_form, "CHUNK", 33), ("triton", launch, "_PART", 32)):
        inputs = _call(skip=torch.tensor([3, 40], device=DEVICE))
        whole = ops.query_moments(**inputs, backend=backend)
        monkeypatch.setattr(module, name, size)
        _close(ops.query_moments(**inputs, backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_symmetric(backend: str) -> None:
    products = ops.query_moments(**_call(), backend=backend)[2]
    torch.testing.assert_close(products, products.mT)


@pytest.mark.parametrize("name", ["query_moments", "query_moments_triton"])
def test_registered_operators(name: str) -> None:
    inputs = _call(tokens=20)
    operator, real = getattr(torch.ops.attnkit, name), torch.rand(2, 20, device=DEVICE) < 0.5
    q, inv_freq, positions, shift = (inputs[key] for key in ("q", "inv_freq", "positions", "shift"))
    opcheck(operator, (q, inv_freq, positions[None], True, real, torch.tensor([1, 2], device=DEVICE), shift))
    opcheck(operator, (q, None, None, False, None, None, None))


def test_compiles_without_a_break() -> None:
    inputs = _call(tokens=20)
    torch.compiler.reset()
    compiled = torch.compile(ops.query_moments, fullgraph=True, backend="aot_eager")
    _close(compiled(**inputs, backend="torch"), ops.query_moments(**inputs, backend="torch"))


def test_refusals() -> None:
    inputs = _call(tokens=20)
    cases: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (errors.InputError, "go together", {"inv_freq": None}),
        (errors.InputError, "go together", {"positions": None}),
        (errors.ShapeError, "inv_freq has shape (17,)", {"inv_freq": torch.ones(17, device=DEVICE)}),
        (errors.ShapeError, "positions has shape (19,)", {"positions": torch.arange(19, device=DEVICE)}),
        (errors.ShapeError, "real has shape", {"real": torch.ones(2, 19, dtype=torch.bool, device=DEVICE)}),
        (errors.ShapeError, "skip has shape", {"skip": torch.zeros(3, dtype=torch.long, device=DEVICE)}),
        (errors.ShapeError, "shift has shape", {"shift": torch.zeros(2, 3, 31, device=DEVICE)}),
        (errors.DTypeError, "positions is float32", {"positions": torch.zeros(20, device=DEVICE)}),
        (errors.DTypeError, "skip is bool", {"skip": torch.zeros(2, dtype=torch.bool, device=DEVICE)}),
        (errors.DTypeError, "real is float32", {"real": torch.ones(2, 20, device=DEVICE)}),
        (errors.DTypeError, "shift is float64", {"shift": inputs["shift"].double()}),
        (errors.UnsupportedError, "no gradients", {"q": inputs["q"].clone().requires_grad_()}),
    )
    for kind, words, changes in cases:
        with pytest.raises(kind, match=re.escape(words)):
            ops.query_moments(**inputs | changes)
    with pytest.raises(errors.ShapeError, match="width 0"):
        ops.query_moments(torch.zeros(1, 2, 1, 0))
    with pytest.raises(errors.BackendUnavailable, match="width 300"):
        ops.query_moments(torch.zeros(1, 2, 1, 300, device=DEVICE), backend="triton")
