"""Kernels on rows that an index finds: where their tiles lie, and copies of rows that are visited often."""

import bisect
import itertools
import random

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.triton import interpreted

triton = pytest.importorskip("triton")
from attnkit.ops._attention_core._triton import launch  # noqa: E402
from attnkit.ops._attention_core._triton.tiles import spans  # noqa: E402

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, UNBOUNDED = 16, 1 << 30
QUERIES, KEYS = (70, 0, 1, 16, 33, 5), (50, 7, 4, 31, 0, 5)  # of each sequence


def _edges(lengths: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def _stands() -> list[int]:
    """A key for every query, rising in each sequence, or the place in front of its first key."""
    starts = _edges(KEYS)
    places = [range(start - 1, start + length) for start, length in zip(starts, KEYS, strict=False)]
    return [at for i, number in enumerate(QUERIES) for at in sorted(random.Random(i).choices(places[i], k=number))]


def _spans(keys: bool, rows: int, stands: list[int], left: int) -> list[list[int]]:
    cu_q, cu_k, q_pos = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (_edges(QUERIES), _edges(KEYS), stands)
    )
    tiles = rows // TILE + len(QUERIES) + 1
    found = torch.full((tiles, 6), -7, dtype=torch.int32, device=DEVICE)
    cu, other = (cu_k, cu_q) if keys else (cu_q, cu_k)
    flags = {"BLOCK": TILE, "KEYS": keys, "WINDOW": left < UNBOUNDED, "BLOCK_T": 32}
    spans[(-(-tiles // 32),)](cu, other, q_pos, found, len(QUERIES), tiles, rows, left, 0, **flags)
    return [tile for tile in found.tolist() if tile[0] < tile[1]]  # others hold nothing


@pytest.mark.parametrize("left", [UNBOUNDED, 9])
@pytest.mark.parametrize("dropped", [0, 3, 200])
@pytest.mark.parametrize("keys", [False, True])
def test_spans_hold_every_tile_once_and_what_it_sees(keys: bool, dropped: int, left: int) -> None:
    edges, others = (_edges(KEYS), _edges(QUERIES)) if keys else (_edges(QUERIES), _edges(KEYS))
    stands = _stands()
    found = _spans(keys, edges[-1] + dropped, stands + [999] * dropped, left)
    every = [
        (first, end) for begin, end in itertools.pairwise([*edges, edges[-1] + dropped]) for first in range(begin, end, TILE)
    ]
    assert sorted((first, end) for first, end, *_ in found) == every
    busy = [tile for tile in found if tile[0] < edges[-1]]
    assert busy == sorted(busy, reverse=not keys)
    for first, end, lo, full_lo, full_hi, hi in busy:
        sequence = bisect.bisect_right(edges, first) - 1
        other = range(*others[sequence : sequence + 2])
        rows = range(first, min(first + TILE, end))
        seen = [{o for o in other if (stands[o] - r if keys else stands[r] - o) in range(left + 1)} for r in rows]
        assert set().union(*seen) <= set(range(lo, hi)) <= set(other)
        assert set(range(full_lo, full_hi)) <= set.intersection(*seen)
        if left == UNBOUNDED:
            assert (set().union(*seen), set.intersection(*seen)) == (set(range(lo, hi)), set(range(full_lo, full_hi)))


def test_tiles_that_see_nothing_are_spread_among_the_others() -> None:
    found = _spans(False, sum(QUERIES) + 200, _stands() + [999] * 200, UNBOUNDED)
    idle = [place for place, tile in enumerate(found) if tile[0] >= sum(QUERIES)]
    assert len(idle) == 13
    assert max(after - before for before, after in itertools.pairwise([-1, *idle, len(found)])) <= 2
    assert all(found[place][2] == found[place][5] for place in idle)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_copies_of_queries_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With grouped heads, dropped rows, values of another width, and rows that see nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 70, *s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in ((4, 16), (2, 16), (2, 24))
    )
    kept = [(torch.rand(2, 70, heads, generator=generator) < 0.5).to(DEVICE) for heads in (4, 2)]
    copied = []
    room = launch._room_for_copies
    monkeypatch.setattr(launch, "_room_for_copies", lambda *args: copied.append(room(*args)) or copied[-1])

    def gradients(copied_from: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(launch, "_COPIED_FROM", copied_from)
        out = ops.qk_sparse_attention(q, k, v, *kept, causal="strict", backend="triton")
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, (q, k, v), torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(dtype))

    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(1 << 30), strict=True))
    assert copied[0] is not None
    assert copied[1] is None
