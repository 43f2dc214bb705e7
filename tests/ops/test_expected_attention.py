"""What conformance does not say about expected attention: moments, the mixture, sampled queries, ranks, refusals."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit.ops.expected_attention import keys as torch_form
from attnkit.ops.expected_attention.reference import dense_logits, mixture_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton", "reference")


def _moments(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A mean [*shape] and a covariance [*shape, D]."""
    root = torch.randn(*shape, shape[-1], dtype=dtype) / shape[-1] ** 0.5
    return torch.randn(*shape, dtype=dtype), root @ root.mT


def _frequencies(pairs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 10_000.0 ** -(torch.arange(pairs, dtype=dtype) / pairs)


def _rotation(width: int, inv_freq: Tensor, position: int, factor: float, interleaved: bool) -> Tensor:
    """The matrix that a position turns queries with, entry by entry."""
    matrix = torch.eye(width, dtype=torch.float64)
    for i, freq in enumerate(inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(inv_freq))
        angle = torch.tensor(position * freq, dtype=torch.float64)
        matrix[a, a] = matrix[b, b] = factor * angle.cos()
        matrix[a, b], matrix[b, a] = -factor * angle.sin(), factor * angle.sin()
    return matrix


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "turning"), [(16, 16), (16, 10), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moments_are_those_of_an_explicit_average(width: int, turning: int, interleaved: bool, dtype: torch.dtype) -> None:
    mean, cov = _moments(2, 3, width)
    inv_freq, start, horizon, factor = _frequencies(turning // 2), 70, 50, 1.2
    turns = torch.stack([_rotation(width, inv_freq, start + j, factor, interleaved) for j in range(horizon)])
    second = (turns[:, None, None] @ (cov + mean[..., :, None] * mean[..., None, :]) @ turns[:, None, None].mT).mean(0)
    wanted_mean = (turns[:, None, None] @ mean[..., None]).mean(0)[..., 0]
    flat = turns.mean(0)
    wanted = {"moment": second - wanted_mean[..., :, None] * wanted_mean[..., None, :], "mean": flat @ cov @ flat.T}
    for rope, matrix in wanted.items():
        found_mean, found = ops.future_query_moments(
            mean.to(dtype), cov.to(dtype), inv_freq=inv_freq.to(dtype), start=start, horizon=horizon, rope=rope,
            attention_factor=factor, interleaved=interleaved,
        )  # fmt: skip
        assert found is not None
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6 * float(matrix.abs().max())
        assert found.dtype == found_mean.dtype == dtype
        assert (found_mean - wanted_mean).abs().max() < max(tolerance, 2e-6 if dtype == torch.float32 else 0)
        assert (found - matrix).abs().max() < max(tolerance, 2e-6 if dtype == torch.float32 else 0)


def test_moments_of_queries_far_from_zero_lose_nothing_to_cancellation() -> None:
    mean, cov = _moments(1, 32)
    mean = 300 * mean
    exact, found = (
        ops.future_query_moments(mean.to(t), 1e-2 * cov.to(t), inv_freq=1e-4 * _frequencies(16).to(t), start=9, horizon=8)[1]
        for t in (torch.float64, torch.float32)
    )
    assert exact is not None
    assert found is not None
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()


def test_rows_start_where_they_are() -> None:
    mean, cov = _moments(3, 2, 8)
    starts = torch.tensor([0, 5, 100_000])
    found = ops.future_query_moments(mean, cov, inv_freq=_frequencies(4), start=starts, horizon=7)
    for row, start in enumerate(starts.tolist()):
        alone = ops.future_query_moments(mean[row], cov[row], inv_freq=_frequencies(4), start=start, horizon=7)
        for a, b in zip(found, alone, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a[row], b, rtol=1e-10, atol=1e-10)


def test_layers_without_rotation_keep_their_moments() -> None:
    mean, cov = _moments(2, 8)
    for rope in ("mean", "moment"):
        found = ops.future_query_moments(mean, cov, inv_freq=None, start=5, rope=rope)
        assert found[0] is mean
        assert found[1] is cov
    alone, nothing = ops.future_query_moments(mean, None, inv_freq=_frequencies(4), start=5)
    assert nothing is None
    assert torch.equal(alone, ops.future_query_moments(mean, cov, inv_freq=_frequencies(4), start=5)[0])


def test_the_mixture_is_the_mean_of_sampled_exponentials() -> None:
    """E[exp(q . k / sqrt(D))] over Gaussian queries at all positions of the horizon, within 3 standard errors."""
    width, horizon, start, samples = 16, 32, 20, 4000
    mean, cov = _moments(1, 1, width)
    inv_freq = _frequencies(width // 2)
    k = torch.randn(1, 12, 1, width, dtype=torch.float64)
    logits = mixture_logits(k, mean, cov, inv_freq=inv_freq, positions=torch.arange(start, start + horizon), scale=width**-0.5)[
        0, :, 0
    ]
    queries = mean[0] + torch.randn(samples, width, dtype=torch.float64) @ torch.linalg.cholesky(cov[0, 0]).T
    turns = torch.stack([_rotation(width, inv_freq, start + j, 1.0, False) for j in range(horizon)])
    sampled = torch.exp(torch.einsum("tij,nj,ki->ntk", turns, queries, k[0, :, 0]) / width**0.5).mean(1)  # [samples, keys]
    error = sampled.std(0) / samples**0.5
    assert ((logits.exp() - sampled.mean(0)).abs() < 3 * error).all()


def test_moment_ranks_keys_better_than_mean() -> None:
    """What the closed form is for: nearer to the mixture than the paper's, in logits."""
    width = 32
    mean, cov = _moments(1, 4, width)
    mean, k = 2 * mean, torch.randn(1, 400, 4, width, dtype=torch.float64)
    inv_freq, scale = _frequencies(width // 2), width**-0.5
    true = mixture_logits(k, mean, cov, inv_freq=inv_freq, positions=torch.arange(300, 428), scale=scale)
    error = {}
    for rope in ("mean", "moment"):
        future = ops.future_query_moments(mean, cov, inv_freq=inv_freq, start=300, horizon=128, rope=rope)
        found = dense_logits(k, *future, scale)
        error[rope] = float(((found - found.mean(1, keepdim=True)) - (true - true.mean(1, keepdim=True))).square().mean())
    assert error["moment"] < 0.6 * error["mean"]


def _call(dtype: torch.dtype, *, keys: int = 300, width: int = 64) -> dict[str, Any]:
    mean, cov = _moments(2, 8, width, dtype=torch.float32)
    k, v = (torch.randn(2, keys, 2, width).to(DEVICE, dtype) for _ in range(2))
    return {"k": k, "v": v, "mean": mean.to(DEVICE), "cov": (4 * cov).to(DEVICE)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_order_of_keys_is_that_of_float64(dtype: torch.dtype) -> None:
    inputs = _call(dtype, keys=2000)
    exact = ops.expected_attention_scores(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    for backend in ("torch", "triton"):
        if backend == "triton" and DEVICE == "cpu" and dtype != torch.float32:
            continue  # the interpreter has no 16 bits
        found = ops.expected_attention_scores(**inputs, backend=backend)
        assert ((found - exact).abs() <= 1e-4 * exact).all()
        ranks, wanted = (t.argsort(1).argsort(1) for t in (found, exact))
        assert (ranks == wanted).float().mean() >= 0.999


def test_sinks_and_missing_keys() -> None:
    inputs = _call(torch.float32, keys=40)
    valid = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    valid[0, :9] = False
    for backend in BACKENDS:
        scores = ops.expected_attention_scores(**inputs, valid=valid, sinks=3, backend=backend)
        assert (scores[0, :9] == -torch.inf).all()
        top = scores[0, 12:].amax()
        assert torch.equal(scores[0, 9:12], (top + 1).expand(3, 2))
        assert torch.equal(scores[1, :3], (scores[1, 3:].amax() + 1).expand(3, 2))
        hidden = {name: inputs[name].clone() for name in ("k", "v")}
        for t in hidden.values():
            t[0, :9] = torch.nan  # what is not there may hold anything
        assert torch.equal(ops.expected_attention_scores(**inputs | hidden, valid=valid, sinks=3, backend=backend), scores)
        alone = {"k": inputs["k"][:1, 9:], "v": inputs["v"][:1, 9:], "mean": inputs["mean"][:1], "cov": inputs["cov"][:1]}
        alone_scores = ops.expected_attention_scores(**alone, sinks=3, backend=backend)
        torch.testing.assert_close(alone_scores[0], scores[0, 9:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows(backend: str) -> None:
    inputs = _call(torch.float32, keys=30)
    inputs["k"][0, 20, 0, 0] = torch.nan
    scores = ops.expected_attention_scores(**inputs, backend=backend)
    assert scores[0, :, 0].isnan().all()
    assert scores[1].isfinite().all()


def test_the_norm_of_outputs_is_that_of_the_projection() -> None:
    inputs = {name: t.double() for name, t in _call(torch.float32, keys=30).items()}
    weight = torch.randn(96, 8, 64, dtype=torch.float64, device=DEVICE)  # [model width, H, Dv]
    gram = torch.einsum("mhd,mhe->hde", weight, weight)
    plain = {"sinks": 0, "value_norm": "none"}
    found = ops.expected_attention_scores(**inputs, value_norm="output", output_gram=gram, sinks=0, eps=0.1)
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        parts = []
        for h in range(4):
            one = {"k": inputs["k"][:, :, [head]], "v": inputs["v"][:, :, [head]]}
            moments = {name: inputs[name][:, own][:, [h]] for name in ("mean", "cov")}
            prob = ops.expected_attention_scores(**one, **moments, eps=0.1, **plain)[..., 0]
            size = torch.linalg.vector_norm(one["v"][:, :, 0] @ weight[:, 4 * head + h].T, dim=-1)
            parts.append(prob * size)
        torch.testing.assert_close(found[..., head], torch.stack(parts).mean(0))


def test_chunks_of_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _call(torch.float32, keys=100)
    whole = ops.expected_attention_scores(**inputs, backend="torch")
    monkeypatch.setattr(torch_form, "CHUNK", 33)
    torch.testing.assert_close(ops.expected_attention_scores(**inputs, backend="torch"), whole, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_and_layout(backend: str) -> None:
    inputs = _call(torch.float32, keys=50)
    wanted = ops.expected_attention_scores(**inputs, backend=backend)
    assert wanted.movedim(1, 2).is_contiguous()
    strange = {name: inputs[name].movedim(1, 2).contiguous().movedim(1, 2) for name in ("k", "v")}
    wide = {"cov": inputs["cov"].mT}
    assert torch.equal(ops.expected_attention_scores(**inputs | strange, backend=backend), wanted)
    torch.testing.assert_close(ops.expected_attention_scores(**inputs | wide, backend=backend), wanted)
    across = {name: inputs[name].movedim(3, 1).contiguous().movedim(1, 3) for name in ("k", "v")}
    torch.testing.assert_close(ops.expected_attention_scores(**inputs | across, backend=backend), wanted)


@pytest.mark.parametrize("name", ["expected_attention", "expected_attention_triton"])
def test_registered_operators(name: str) -> None:
    inputs = _call(torch.float32, keys=20)
    valid = torch.rand(2, 20, 1, device=DEVICE) < 0.5
    gram = torch.eye(64, device=DEVICE).expand(8, -1, -1)
    operator = getattr(torch.ops.attnkit, name)
    for cov, own, mask, norm in ((inputs["cov"], None, None, "l2"), (None, gram, valid, "output")):
        opcheck(operator, (inputs["k"], inputs["v"], inputs["mean"], cov, own, mask, 0.1, 0.02, norm, 2))


def test_compiles_without_a_break() -> None:
    inputs = _call(torch.float32, keys=20)
    torch.compiler.reset()
    compiled = torch.compile(ops.expected_attention_scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, backend="torch"), ops.expected_attention_scores(**inputs, backend="torch"))


def test_refusals() -> None:
    inputs = _call(torch.float32, keys=20)

    def refused(kind: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(kind, match=re.escape(words)):
            ops.expected_attention_scores(**inputs | changes)

    refused(errors.ShapeError, "H must be a multiple of Hkv", mean=inputs["mean"][:, :7], cov=None)
    refused(errors.ShapeError, "D must be 64", cov=inputs["cov"][..., :5])
    refused(errors.ShapeError, "valid has shape", valid=torch.ones(2, 19, dtype=torch.bool, device=DEVICE))
    refused(errors.DTypeError, "mean is float64", mean=inputs["mean"].double())
    refused(errors.DTypeError, "valid is float32", valid=torch.ones(2, 20, device=DEVICE))
    refused(errors.OptionError, "value_norm='l1'", value_norm="l1")
    refused(errors.OptionError, "output_gram goes with", value_norm="output")
    refused(errors.OptionError, "output_gram goes with", output_gram=torch.ones(8, 64, 64, device=DEVICE))
    refused(errors.OptionError, "eps=-1", eps=-1.0)
    refused(errors.OptionError, "sinks=-1", sinks=-1)
    refused(errors.UnsupportedError, "no gradients", k=inputs["k"].clone().requires_grad_())
    wide = torch.zeros(1, 2, 1, 300, device=DEVICE)
    with pytest.raises(errors.BackendUnavailable, match="width 300"):
        ops.expected_attention_scores(wide, wide, torch.zeros(1, 1, 300, device=DEVICE), None, backend="triton")
    mean, cov = _moments(2, 8)
    for words, changes in (
        ("rope='mixture'", {"rope": "mixture"}),
        ("horizon=0", {"horizon": 0}),
        ("inv_freq has shape (5,)", {"inv_freq": _frequencies(5)}),
        ("start has shape (3,)", {"start": torch.zeros(3)}),
        ("cov has shape", {"cov": cov[..., :3]}),
    ):
        with pytest.raises(errors.InputError, match=re.escape(words)):
            ops.future_query_moments(**{"mean": mean, "cov": cov, "inv_freq": _frequencies(4), "start": 0} | changes)
