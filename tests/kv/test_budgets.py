"""Budgets against their definitions, head by head."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import HeadAdaptive, PerLayer, kept_of
from attnkit.kv.context import Stored
from attnkit.kv.selectors import Kept, best


def joint(scores, kept, alpha):
    """Head-adaptive counts of one row, by lists: each head's sure share first, then the best of all."""
    sure = {
        (h, s) for h, row in enumerate(scores) for s in row.argsort(descending=True)[: max(1, int(kept[h] * alpha))].tolist()
    }
    sure = {(h, s) for h, s in sure if scores[h, s] > -torch.inf}
    rest = sorted(((float(scores[h, s]), h, s) for h in range(scores.shape[0]) for s in range(scores.shape[1])), reverse=True)
    chosen = set(sure)
    for score, h, s in rest:
        if len(chosen) < int(sum(kept)) and score > -torch.inf:
            chosen.add((h, s))
    return [sum(h == head for h, _ in chosen) for head in range(scores.shape[0])]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_heads_share(alpha, ragged):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 40) * torch.tensor([1.0, 3.0, 0.1])[:, None]
    kept = 13
    if ragged:
        scores[0, :, :10] = -torch.inf
        kept = torch.tensor([[10, 10, 10], [13, 13, 13]])
    counts = HeadAdaptive(alpha).counts(None, scores, kept)
    for row in range(2):
        share = [13] * 3 if not ragged else kept[row].tolist()
        assert counts[row].tolist() == joint(scores[row], share, alpha)
    assert (counts.max(-1).values > counts.min(-1).values).all() or alpha == 1.0


def test_a_ratio_leaves_at_least_one_and_nothing_of_nothing():
    for length in range(50):
        for ratio in (0.0, 0.1, 0.5, 0.9, 0.999):
            expected = max(1, int(length * (1 - ratio))) if length else 0
            assert kept_of(length, ratio) == expected
            assert kept_of(torch.tensor([[length]]), ratio).tolist() == [[expected]]


def test_a_ratio_for_each_layer():
    keys = torch.zeros(1, 2, 20, 4)
    context = SimpleNamespace(stored=Stored(keys, keys, torch.arange(20)[None, None]), index=1, layers=2)
    assert PerLayer((0.5, 0.25)).counts(context, None, 10) == 15
    with pytest.raises(OptionError, match="ratios has 3 entries; the model has 2 layers"):
        PerLayer((0.5, 0.25, 0.1)).counts(context, None, 10)


def test_the_best_are_the_same_by_count_and_by_counts():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 30)
    for count in (1, 7, 30):
        by_number = best(scores, count)
        by_tensor = best(scores, torch.full((2, 3), count))
        assert torch.equal(by_number.index, by_tensor.index[..., :count])
        assert torch.equal(by_number.mask(30), by_tensor.mask(30))
    ragged = torch.tensor([[0, 3, 30], [5, 1, 2]])
    kept = best(scores, ragged)
    mask = kept.mask(30)
    assert torch.equal(mask.sum(-1), ragged)
    for row, head in ((0, 1), (1, 0)):
        top = scores[row, head].topk(int(ragged[row, head])).indices.sort().values
        assert torch.equal(mask[row, head].nonzero()[:, 0], top)
        assert torch.equal(kept.index[row, head, : len(top)], top)


def test_of_equal_scores_the_earlier_stay():
    scores = torch.randint(0, 4, (2, 3, 50), generator=torch.Generator().manual_seed(1)).float()
    scores[0, 0, 5:9], scores[0, 1, 7], scores[1, 2, 3:] = torch.inf, torch.nan, -torch.inf
    for count in (0, 1, 6, 20, 50):
        kept = best(scores, count)
        assert kept.index.shape == (2, 3, count)
        for row, head in itertools.product(range(2), range(3)):
            values = [math.inf if math.isnan(score) else score for score in scores[row, head].tolist()]
            order = sorted(range(50), key=lambda place, values=values: (-values[place], place))
            assert kept.index[row, head].tolist() == sorted(order[:count])
    tied = torch.ones(1, 3, 40)
    tied[0, 1, 10:20] = 2
    kept = HeadAdaptive(0.2).counts(None, tied, 20)
    assert kept.tolist() == [[40, 16, 4]]  # sure are 4 each, then head 1's high ones, then the first heads' others
    assert torch.equal(HeadAdaptive(0.2).counts(None, tied, torch.full((1, 3), 20)), kept)


def test_a_mask_makes_its_own_index():
    mask = torch.rand(2, 3, 17) < 0.5
    kept = Kept.of_mask(mask)
    assert torch.equal(kept.mask(17), mask)
    assert torch.equal(kept.live().sum(-1), mask.sum(-1))
