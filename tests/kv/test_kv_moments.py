"""Running moments of queries: parts and the whole, padding, sinks, rotation taken back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import errors
from attnkit.inference import RopeSpec
from attnkit.kv import QueryMoments, moments
from attnkit.ops.query_moments import tokens


def _queries(*shape: int) -> Tensor:
    return torch.randn(*shape) @ torch.diag(torch.linspace(0.2, 3, shape[-1])) + 5


@pytest.mark.parametrize("parts", [(30,), (1, 2, 5, 22), (29, 1), (3, 0, 27)])
def test_parts_are_the_whole(parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, of which one is padded by 7 on the left: against torch's own mean and covariance of what is left."""
    monkeypatch.setattr(tokens, "CHUNK", 11)
    monkeypatch.setattr(moments, "SAMPLE", 5)
    queries = _queries(2, 3, 30, 8)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :7] = False
    dirty = torch.where(real[:, None, :, None], queries, torch.nan)
    running = QueryMoments(sinks=4)
    for own, mask in zip(dirty.split(parts, 2), real.split(parts, 1), strict=True):
        running.update(own, real=mask)
    assert running.seen is not None
    assert running.seen.tolist() == [23, 30]
    assert running.count.tolist() == [19, 26]
    for row, first in enumerate((11, 4)):
        for head in range(3):
            kept = queries[row, head, first:].double()
            torch.testing.assert_close(running.mean[row, head].double(), kept.mean(0), rtol=1e-6, atol=1e-5)
            for correction in (0, 1):
                found = running.covariance(correction=correction)[row, head].double()
                torch.testing.assert_close(found, torch.cov(kept.T, correction=correction), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", [8, 4])
def test_rotation_is_taken_back(turning: int, interleaved: bool) -> None:
    rope = RopeSpec(
        inv_freq=10_000.0 ** -(torch.arange(turning // 2) / (turning // 2)), attention_factor=1.0, interleaved=interleaved,
        rope_type="default", theta=10_000.0, max_positions=100, model_type="llama",
    )  # fmt: skip
    queries, positions = _queries(2, 3, 20, 8), torch.arange(100, 120)
    plain, turned = QueryMoments(), QueryMoments()
    plain.update(queries)
    rotated = rope.rotate(queries.transpose(1, 2), positions).transpose(1, 2)
    for part in (slice(0, 9), slice(9, 20)):
        how: dict[str, Any] = {"inv_freq": rope.inv_freq, "interleaved": interleaved}
        turned.update(rotated[:, :, part], positions=positions[part], **how)
    torch.testing.assert_close(turned.mean, plain.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.covariance(), plain.covariance(), rtol=1e-4, atol=1e-4)
    wrong = QueryMoments()
    wrong.update(rotated)
    assert (wrong.mean - plain.mean).abs().max() > 1


def test_queries_far_from_zero_lose_nothing() -> None:
    """A mean 1000 times what queries differ from it by; the first tokens of a row are padding."""
    queries = torch.randn(2, 2, 700, 8) + 1000
    real = torch.ones(2, 700, dtype=torch.bool)
    real[0, :600] = False
    running = QueryMoments(sinks=0)
    running.update(queries, real=real)
    for row, first in enumerate((600, 0)):
        for head in range(2):
            wanted = torch.cov(queries[row, head, first:].double().T, correction=0)
            assert (running.covariance()[row, head] - wanted).abs().max() < 1e-4


def test_merging_two() -> None:
    queries = _queries(2, 3, 40, 8)
    whole, first, second = QueryMoments(sinks=0), QueryMoments(sinks=0), QueryMoments(sinks=0)
    whole.update(queries)
    first.update(queries[:, :, :13])
    second.update(queries[:, :, 13:])
    empty = QueryMoments(sinks=0)
    empty.merge(first)
    empty.merge(QueryMoments())
    empty.merge(second)
    assert whole.seen is not None
    assert empty.seen is not None
    assert torch.equal(empty.seen, whole.seen)
    torch.testing.assert_close(empty.mean, whole.mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(empty.spread, whole.spread, rtol=1e-5, atol=1e-4)
    assert torch.equal(first.count, torch.full((2,), 13.0))  # merging leaves the parts as they were


def test_rows_with_nothing_are_zero() -> None:
    running = QueryMoments()
    running.update(_queries(2, 1, 6, 4), real=torch.tensor([[False] * 6, [True] * 5 + [False]]))
    assert running.count.tolist() == [0, 1]
    assert (running.mean[0] == 0).all()
    assert (running.covariance(correction=1) == 0).all()


def test_refusals() -> None:
    running = QueryMoments()
    with pytest.raises(errors.InputError, match="needs queries"):
        running.covariance()
    queries = _queries(2, 3, 5, 8)
    calls: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (errors.InputError, "go together", {"positions": torch.arange(5)}),
        (errors.ShapeError, "real has shape", {"real": torch.ones(2, 4, dtype=torch.bool)}),
        (errors.DTypeError, "real is float32", {"real": torch.ones(2, 5)}),
    )
    for kind, words, arguments in calls:
        with pytest.raises(kind, match=words):
            running.update(queries, **arguments)
    running.update(queries)
    with pytest.raises(errors.ShapeError, match="those before"):
        running.update(queries[:, :2])
    with pytest.raises(errors.OptionError, match="correction=2"):
        running.covariance(correction=2)
    with pytest.raises(errors.OptionError, match="sinks=-1"):
        QueryMoments(sinks=-1)
    other = QueryMoments()
    other.update(queries[:1])
    with pytest.raises(errors.ShapeError, match="moments are of"):
        running.merge(other)
