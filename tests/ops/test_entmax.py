"""What conformance does not say about entmax: other implementations, gradients, kernels, losses, refusals."""

import re
from typing import Any

import entmax as peer
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit.ops.entmax import rows
from attnkit.ops.entmax._triton import launch
from attnkit.ops.entmax.reference import dense_entmax

ALPHAS = (1.1, 1.25, 4 / 3, 1.5, 1.75, 2.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton", "reference")


def _scores(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, dtype=dtype) * scale


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_to_another_implementation(alpha: float) -> None:
    x = _scores(40, 300)
    wanted = peer.entmax_bisect(x, alpha=alpha, dim=-1, n_iter=60)
    for backend in ("torch", "reference"):
        assert (ops.entmax(x, alpha, backend=backend) - wanted).abs().max() < 1e-12
    assert (ops.entmax(x.float(), alpha) - wanted).abs().max() < 1e-6
    assert torch.equal(ops.entmax(x, alpha) > 1e-9, wanted > 1e-9)
    assert (ops.entmax(x.float().to(DEVICE), alpha, backend="triton").cpu() - wanted).abs().max() < 1e-6


def test_equal_to_exact_algorithms() -> None:
    for scale in (0.05, 1.0, 20.0):
        x = _scores(20, 257, scale=scale)
        assert (ops.sparsemax(x) - peer.sparsemax(x, dim=-1)).abs().max() < 1e-13
        assert (ops.entmax15(x) - peer.entmax15(x, dim=-1)).abs().max() < 1e-13
        y = _scores(7, 33, 5, scale=scale)
        assert (ops.sparsemax(y, 1) - peer.sparsemax(y, dim=1)).abs().max() < 1e-13


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha: float) -> None:
    x = _scores(4, 9, scale=1.0).requires_grad_()
    mask = torch.rand(4, 9) < 0.8
    assert torch.autograd.gradcheck(lambda x: ops.entmax(x, alpha, mask=mask), (x,))
    learned = torch.full((4, 1), alpha - 1e-3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: ops.entmax(x, a), (x, learned))
    shared = torch.tensor(alpha - 1e-3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: ops.entmax(x, a, dim=0), (x, shared))


@pytest.mark.parametrize("alpha", [*ALPHAS, "learned"])
@pytest.mark.parametrize("shape", [(5, 33), (3, 130), (1, 17), (2, launch.BLOCK + 70)], ids=str)
def test_the_kernel_equals_torch(alpha: float | str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, rows on chip and rows read again; strides that are not contiguous."""
    monkeypatch.setattr(launch, "LONGEST_SHORT", launch.BLOCK)
    x = torch.randn(shape[0], 2 * shape[1], device=DEVICE)[:, : shape[1]]
    x[0, ::3] = -torch.inf
    given = 1.05 + 0.9 * torch.rand(shape[0], 1, device=DEVICE) if isinstance(alpha, str) else alpha
    weight = torch.randn(shape, device=DEVICE)
    found: dict[str, list[Tensor]] = {}
    for backend in ("torch", "triton"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, given) if isinstance(t, Tensor)]
        out = ops.entmax(leaves[0], leaves[1] if len(leaves) > 1 else given, backend=backend)
        found[backend] = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_entries_and_with_nan(backend: str) -> None:
    x = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf] * 3, [0.0, torch.nan, 1.0], [1.0, 0.0, torch.inf]], device=DEVICE)
    for alpha in (1.0, 1.1, 1.5, 1.75, 2.0):
        if backend == "triton" and alpha == 1:
            continue
        x.requires_grad_()
        prob = ops.entmax(x, alpha, backend=backend)
        assert prob[0, 1] == 0
        assert abs(float(prob[0].detach().sum()) - 1) < 1e-6
        assert (prob[1] == 0).all()
        assert prob[2:].isnan().all()
        grad = torch.autograd.grad(prob[:2].sum(), x)[0]
        assert (grad[:2].abs() < 1e-6).all()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = _scores(9, 65, dtype=torch.float32)
    for backend in ("torch", "triton"):
        for alpha in (1.1, 1.5, 1.75, 2.0):
            whole = ops.entmax(x.to(DEVICE), alpha, backend=backend)
            assert torch.equal(whole[4:5], ops.entmax(x[4:5].to(DEVICE), alpha, backend=backend))
            assert torch.equal(whole, ops.entmax(x.to(DEVICE), alpha, backend=backend))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _scores(9, 65).requires_grad_()
    alpha = torch.full((9, 1), 1.3, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        out = ops.entmax(x, alpha)
        return [out.detach(), *torch.autograd.grad((out * x.detach()).sum(), (x, alpha))]

    whole = run()
    monkeypatch.setattr(rows, "CHUNK", 130)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))


def test_softmax_is_alpha_one_and_the_limit() -> None:
    x = _scores(5, 40)
    assert torch.equal(ops.entmax(x, 1), torch.softmax(x, -1))
    assert (ops.entmax(x, 1 + 1e-6) - torch.softmax(x, -1)).abs().max() < 1e-5
    assert (ops.entmax(x.float(), 1.001) - ops.entmax(x, 1.001)).abs().max() < 1e-6


def test_learned_alpha_in_16_bits_has_a_gradient_as_good_as_in_32() -> None:
    x = _scores(8, 64, dtype=torch.float32).bfloat16()
    weight = torch.randn(8, 64)

    def slope(x: Tensor) -> Tensor:
        alpha = torch.tensor(1.3, dtype=torch.float32, requires_grad=True)
        out = ops.entmax(x, alpha)
        assert out.dtype == x.dtype
        return torch.autograd.grad((out.float() * weight).sum(), alpha)[0]

    assert (slope(x) - slope(x.float())).abs() < 1e-2


def test_threshold() -> None:
    x = _scores(6, 50)
    x[2] = -torch.inf
    for alpha in (1.1, 1.5, 2.0):
        tau = ops.entmax_threshold(x, alpha)
        assert tau.shape == (6, 1)
        assert tau[2] == torch.inf
        prob = ((alpha - 1) * x - tau).clamp(min=0) ** (1 / (alpha - 1))
        assert (prob - ops.entmax(x, alpha)).abs().max() < 1e-12
        assert torch.allclose(tau, dense_entmax(x, alpha)[1], atol=1e-12)
    assert ops.entmax_threshold(x, torch.full((1, 50), 1.5), dim=0).shape == (1, 50)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_loss_equals_another_implementation(alpha: float) -> None:
    x, target = _scores(12, 9).requires_grad_(), torch.randint(9, (12,))
    ours = ops.entmax_loss(x, target, alpha, reduction="none")
    theirs = peer.EntmaxBisectLoss(alpha=alpha, n_iter=60, reduction="none")(x, target)
    assert (ours - theirs).abs().max() < 1e-10
    grad = torch.autograd.grad(ours.sum(), x)[0]
    onehot = torch.nn.functional.one_hot(target, 9)
    assert (grad - (ops.entmax(x, alpha) - onehot)).abs().max() < 1e-12
    learned = torch.tensor(alpha - 1e-3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: ops.entmax_loss(x, target, a), (x, learned))


def test_loss_of_softmax_ignored_targets_and_margin() -> None:
    x, target = _scores(6, 5), torch.tensor([0, -100, 2, 3, -100, 1])
    assert torch.allclose(ops.entmax_loss(x, target, 1), torch.nn.functional.cross_entropy(x, target))
    kept = target >= 0
    assert torch.allclose(ops.entmax_loss(x, target), ops.entmax_loss(x[kept], target[kept]))
    assert ops.entmax_loss(x, target, reduction="none")[1] == 0
    for alpha in (1.5, 2.0):
        lead = torch.tensor([[1 / (alpha - 1) + 1e-6, 0.0, 0.0]], dtype=torch.float64)
        assert abs(ops.entmax_loss(lead, torch.tensor([0]), alpha)) < 1e-12
        assert ops.entmax_loss(lead - torch.tensor([[0.1, 0, 0]]), torch.tensor([0]), alpha) > 1e-6
    hidden = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    loss = ops.entmax_loss(hidden, torch.tensor([0]))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_opcheck_and_compile() -> None:
    x = torch.randn(5, 17, requires_grad=True)
    alphas = torch.full((5, 1), 1.4, requires_grad=True)
    opcheck(torch.ops.attnkit.entmax.default, (x, None, 1.5))
    opcheck(torch.ops.attnkit.entmax.default, (x, alphas, 0.0))
    compiled = torch.compile(lambda x, a: ops.entmax(x, a, dim=0).sum(1), fullgraph=True, backend="aot_eager")
    a = torch.full((1, 17), 1.4, requires_grad=True)
    assert torch.equal(compiled(x, a), ops.entmax(x, a, dim=0).sum(1))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (errors.OptionError, "alpha=0.5 is outside 1..2", {"alpha": 0.5}),
        (errors.OptionError, "alpha=2.5 is outside 1..2", {"alpha": 2.5}),
        (errors.OptionError, "alpha=nan is outside 1..2", {"alpha": float("nan")}),
        (errors.OptionError, "alpha ranges over 1..1.5; a tensor of alphas", {"alpha": torch.arange(1, 2.1, 0.25)[:3, None]}),
        (errors.DTypeError, "alpha is int64", {"alpha": torch.tensor(2)}),
        (errors.ShapeError, "alpha has shape (4,), which does not broadcast", {"alpha": torch.full((4,), 1.5)}),
        (errors.ShapeError, "alpha has shape (5,); along dim=1", {"alpha": torch.full((5,), 1.5)}),
        (errors.OptionError, "dim=2 does not exist", {"dim": 2}),
        (errors.DTypeError, "mask is float32; allowed: bool", {"mask": torch.ones(3, 5)}),
        (errors.ShapeError, "mask has shape (2, 5)", {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        (errors.DTypeError, "x is int64", {"x": torch.zeros(3, 5, dtype=torch.int64)}),
        (errors.ShapeError, "x is a single number", {"x": torch.zeros(())}),
        (errors.BackendUnavailable, "alpha=1, which is torch's softmax", {"alpha": 1, "backend": "triton"}),
    ],
)  # fmt: skip
def test_refusals(error: type[Exception], message: str, call: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.entmax(**{"x": torch.zeros(3, 5)} | call)


def test_refusals_of_the_other_functions() -> None:
    x = torch.zeros(3, 5)
    with pytest.raises(errors.OptionError, match="softmax, which has no threshold"):
        ops.entmax_threshold(x, 1)
    with pytest.raises(errors.ShapeError, match="target has shape"):
        ops.entmax_loss(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(errors.OptionError, match="reduction='median'"):
        ops.entmax_loss(x, torch.zeros(3, dtype=torch.int64), reduction="median")
