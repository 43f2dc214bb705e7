"""The claim of system 5: speed and loss at equal steps and equal time, on planted runs; pictures of buckets."""

from typing import Any

import pytest
import torch

from attnkit.lab.claims import CLAIMS
from attnkit.lab.claims.language import at_time
from attnkit.lab.claims.scfa_lm import _skew, _tiles

CLAIM = CLAIMS["scfa-lm"]


def run(arm: str, length: int, ms: float, losses: list[float]) -> dict[str, Any]:
    curve = [[10 * (i + 1), loss] for i, loss in enumerate(losses)]
    return {
        "arm": arm, "length": length, "seed": 0, "step_ms": ms, "validation_loss": losses[-1], "curve": curve, "peak_mib": 1.0,
        "parameters": 1,
    }  # fmt: skip


def judged(ms: float, losses: list[float]) -> Any:
    settings = CLAIM.configure(changes={"lengths": "8192,16384", "buckets": "16", "drops": "0.5"})
    rows = []
    for length in settings.lengths:
        rows += [run("dense", length, 100.0, [3.0, 2.0, 1.5]), run("hash 16", length, ms, losses)]
        rows.append(run("drop 0.5", length, 100.0, [3.0, 2.9, 2.8]))
    return CLAIM.conclude(settings, rows)


def test_the_verdict() -> None:
    assert judged(30.0, [3.0, 2.0, 1.5]).verdict.outcome == "holds"
    slower = judged(50.0, [3.0, 2.0, 1.5])
    assert slower.verdict.outcome == "holds in part", "twice as fast at 16K is not the paper's 3.3"
    assert judged(40.0, [3.0, 2.5, 2.0]).verdict.outcome == "holds in part", (
        "worse after as many steps, ahead after as much time"
    )
    assert judged(120.0, [3.0, 2.5, 2.0]).verdict.outcome == "does not hold"
    assert judged(30.0, [3.0, 2.0, 1.5]).verdict.numbers["hash 16 at 8192: loss gap at equal time"] is None, (
        "dense has none yet"
    )
    numbers = slower.verdict.numbers
    assert numbers["hash 16 at 8192: times faster"] == 2.0
    assert numbers["hash 16 at 8192: loss gap at equal steps"] == 0.0
    # the hashed run ends after 1.5 s, when the dense one is at step 15
    assert numbers["hash 16 at 8192: loss gap at equal time"] == pytest.approx(1.5 - 2.5)


def test_an_unfinished_comparison_is_undecided() -> None:
    settings = CLAIM.configure(changes={"lengths": "8192", "buckets": "16", "drops": "0.5"})
    found = CLAIM.conclude(settings, [run("dense", 8192, 100.0, [3.0, 2.0])])
    assert found.verdict.outcome == "undecided"
    assert found.figures[0]["lines"][0]["points"][0] == {"x": 1.0, "y": 3.0, "low": 3.0, "high": 3.0}


def test_losses_between_validations() -> None:
    row = run("dense", 64, 100.0, [3.0, 2.0])
    assert at_time(row, 1.5) == pytest.approx(2.5)
    assert at_time(row, 9.0) == pytest.approx(2.0)
    assert at_time(row, 0.5) is None


def test_buckets_are_seen_as_they_are() -> None:
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    assert _skew(ids, 2) == 1.0
    assert _skew(torch.zeros(8, dtype=torch.int32), 4) == 4.0
    tiles = _tiles(ids.repeat(32))  # 256 rows: tiles of 4, two buckets of 32 tiles
    assert len(tiles) == 64
    assert (tiles[0][0], tiles[1][0], tiles[0][1], tiles[31][0], tiles[32][0], tiles[63][32]) == (0.62, 1.0, 0.0, 1.0, 0.0, 1.0)
