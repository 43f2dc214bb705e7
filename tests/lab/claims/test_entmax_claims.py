"""The claims of system 4: thresholds against another way to find them, verdicts on planted results."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit import ops
from attnkit.lab.claims import CLAIMS
from attnkit.lab.claims.entmax_encoder import Sections, sections
from attnkit.lab.claims.entmax_iterations import METHODS, exact_threshold, updates_needed


def drawn(seed: int, rows: int, n: int) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_the_exact_threshold_makes_rows_that_add_up_to_one(alpha: float, spread: float) -> None:
    z = drawn(0, 16, 300) * spread * (alpha - 1)
    tau = exact_threshold(z, alpha)
    total = (z - tau).clamp(min=0).pow(1 / (alpha - 1)).sum(-1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
    assert torch.allclose(tau, ops.entmax_threshold(z / (alpha - 1), alpha), atol=1e-12)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_there(method: str, alpha: float) -> None:
    z = torch.cat([drawn(1, 8, 200), torch.zeros(1, 200, dtype=torch.float64)]) * (alpha - 1)
    needed = updates_needed(z, alpha, method, 1e-6)
    assert int(needed.max()) <= (20 if method == "bisection" else 8)
    exact, estimates = exact_threshold(z, alpha), METHODS[method](z, alpha)
    for _ in range(int(needed.max())):
        next(estimates)
    assert float((next(estimates) - exact).abs().max()) <= 1e-6


def test_updates_are_counted_from_the_first_estimate() -> None:
    """Two equal entries: tau is at the upper end of the bracket [-1, -1/sqrt(2)], which bisection comes to by halves."""
    z = torch.zeros(1, 2, dtype=torch.float64)
    assert exact_threshold(z, 1.5).item() == pytest.approx(-(0.5**0.5))
    half = (1 - 0.5**0.5) / 2
    assert updates_needed(z, 1.5, "bisection", half * 1.001).item() == 0
    assert updates_needed(z, 1.5, "bisection", half * 0.999).item() == 1
    assert updates_needed(z, 1.5, "bisection", half / 4 * 0.999).item() == 3
    assert updates_needed(z, 1.5, "attnkit", 1e-6).item() <= 1


def iterations(**worst: int) -> Any:
    claim = CLAIMS["entmax-iterations"]
    counts = {"bisection": 19, "Halley": 4, "Halley from a histogram": 2, "attnkit": 2} | worst
    rows = [
        {"alpha": 1.5, "length": 64, "spread": spread, "method": method, "mean": 1.0, "worst": worst}
        for method, worst in counts.items()
        for spread in (0.1, 1.0)
    ]
    rows.append(rows[-1] | {"alpha": 2.0, "worst": 40})
    return claim.conclude(claim.configure(), rows).verdict


def test_the_verdict_on_iterations() -> None:
    assert iterations().outcome == "holds"
    assert iterations(**{"Halley from a histogram": 3}).outcome == "holds in part"
    assert iterations(Halley=7).outcome == "holds in part"
    assert iterations(**{"Halley": 7, "Halley from a histogram": 3}).outcome == "does not hold"
    assert iterations(attnkit=9).outcome == "holds", "the claim is the paper's, not ours"


def recall(gains: dict[str, list[float]], learnt: float = 1.0) -> Any:
    claim = CLAIMS["entmax-recall"]
    settings = claim.configure(changes={"lengths": "64,128,256", "positions": "first,both"})
    rows = [
        {
            "positions": positions, "seed": seed, "norm": norm, "length": length,
            "accuracy": learnt if length == 64 else 0.5 + (gain if norm == "entmax" else 0.0),
        }
        for positions, of in gains.items()
        for seed, gain in enumerate(of)
        for norm in ("softmax", "entmax")
        for length in settings.lengths
    ]  # fmt: skip
    return claim.conclude(settings, rows)


def test_the_verdict_on_recall() -> None:
    more, less, mixed = [0.1, 0.2, 0.3], [-0.1, -0.1, 0.0], [0.3, 0.3, -0.01]
    found = recall({"first": more, "both": more})
    assert found.verdict.outcome == "holds"
    assert found.verdict.numbers["gain, first"] == pytest.approx(0.2)
    assert found.verdict.numbers["least gain of a seed, both"] == pytest.approx(0.1)
    assert recall({"first": more, "both": less}).verdict.outcome == "holds in part"
    assert recall({"first": less, "both": less}).verdict.outcome == "does not hold"
    assert recall({"first": mixed, "both": mixed}).verdict.outcome == "undecided"
    assert recall({"first": more, "both": more}, learnt=0.5).verdict.outcome == "undecided"
    assert recall({"first": more[:2]}).verdict.outcome == "undecided", "a seed is missing"
    assert found.tables[0]["rows"][1] == ["first", "entmax", "1.000 (1.000 to 1.000)", *["0.700 (0.600 to 0.800)"] * 2]


def anneal(jump: float, soft: float, seeds: int = 3) -> Any:
    claim = CLAIMS["entmax-anneal"]
    base = [2.0] * 8
    rows = [
        {"seed": seed, "arm": arm, "validation_loss": 2.0, "losses": [*base[:4], *(2.0 + extra for _ in range(4))]}
        for seed in range(seeds)
        for arm, extra in (("softmax", 0.0), ("jump", jump), ("anneal", soft))
    ]
    return claim.conclude(claim.configure(), rows)


def test_the_verdict_on_annealing() -> None:
    assert anneal(0.5, 0.01).verdict.outcome == "holds"
    assert anneal(0.5, 0.2).verdict.outcome == "holds in part"
    assert anneal(0.5, 0.4).verdict.outcome == "does not hold"
    assert anneal(0.01, 0.01).verdict.outcome == "undecided"
    assert anneal(0.5, 0.01, seeds=2).verdict.outcome == "undecided"
    assert anneal(0.5, 0.01).verdict.numbers["highest loss above softmax, jump"] == pytest.approx(0.5)
    rising = [point["y"] for point in anneal(0.4, 0.0).figures[0]["lines"][0]["points"]]
    assert rising == pytest.approx([0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4]), "a mean over four steps"


def language(gap: float, ratio: float) -> Any:
    claim = CLAIMS["entmax-lm"]
    settings = claim.configure(changes={"lengths": "64,128"})
    rows = [
        {
            "norm": norm, "length": length, "seed": 0, "validation_loss": 1.5 + (gap if norm == "entmax" else 0),
            "step_ms": 10.0 if norm == "softmax" else 10 / ratio,
        }
        | ({"element": [[0.5, 0.9]], "tile": [[0.0, 0.4]], "support": [[3, 4]]} if norm == "entmax" else {})
        for norm in ("softmax", "entmax")
        for length in settings.lengths
    ]  # fmt: skip
    return claim.conclude(settings, rows)


def test_the_verdict_on_language_models() -> None:
    assert language(0.01, 1.2).verdict.outcome == "holds"
    assert language(-0.5, 0.5).verdict.outcome == "holds in part"
    assert language(0.03, 1.0).verdict.outcome == "holds in part"
    assert language(0.03, 0.5).verdict.outcome == "does not hold"
    found = language(0.01, 0.8)
    assert found.tables[0]["rows"][0] == ["64", 1.5, 1.51, pytest.approx(0.01), 10.0, 12.5, 0.8, 0.7, 0.2]
    assert [figure["kind"] for figure in found.figures] == ["lines", "heat", "heat"]


def test_sections_are_windows_with_their_number() -> None:
    texts = tuple(np.full(100 + label, label + 65, np.uint8) for label in range(3))
    examples = Sections(texts).generate(seed=0, n=50, length=20)
    labels = examples.labels[:, -1]
    assert set(labels.tolist()) == {0, 1, 2}
    assert bool((examples.labels[:, :-1] == -100).all())
    assert bool((examples.input_ids[:, :-1] == labels[:, None] + 65).all())
    assert bool((examples.input_ids[:, -1] == 256).all())
    long = Sections(texts).generate(seed=0, n=4, length=120)
    assert bool((long.input_ids[:, 102:] == 256).all()), "a short section is all of it"


def test_what_is_kept_apart_is_not_trained_on() -> None:
    trained, held, names = sections(4)
    assert len(names) == len(trained.texts) == len(held.texts) == 4
    for text, other in zip(trained.texts, held.texts, strict=True):
        assert 0.05 < len(other) / len(text) < 2
        assert other.tobytes()[500:800] not in text.tobytes()


def encoder(gains: dict[int, list[float]]) -> Any:
    claim = CLAIMS["entmax-encoder"]
    settings = claim.configure(changes={"lengths": ",".join(map(str, gains))})
    rows = [
        {"length": length, "seed": seed, "alpha": alpha, "accuracy": 0.5 + (gain if alpha == 1.5 else 0), "step_ms": 1.0}
        for length, of in gains.items()
        for seed, gain in enumerate(of)
        for alpha in (1.0, 1.5)
    ]
    return claim.conclude(settings, rows).verdict


def test_the_verdict_on_encoders() -> None:
    assert encoder({64: [0.0, 0.1], 128: [0.1, 0.2]}).outcome == "holds"
    assert encoder({64: [0.1, 0.1], 128: [0.3, -0.1], 256: [0.0, -0.01]}).outcome == "holds"
    assert encoder({64: [0.1, 0.1], 128: [0.3, -0.1], 256: [0.0, -0.02]}).outcome == "holds in part"
    assert encoder({64: [-0.1, 0.0], 128: [0.1, 0.2]}).outcome == "undecided"
    assert encoder({64: [-0.1, 0.0], 128: [0.1, -0.2]}).outcome == "does not hold"
    assert encoder({64: [0.0, 0.0], 128: [0.0, 0.0]}).outcome == "undecided"
    assert encoder({64: [0.1, 0.1], 128: [0.3]}).outcome == "undecided"
