"""Plans: every allowed pair lies inside a tile's range, and nothing outside the mask lies in its mask-free part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit.ops._attention_core.plan import Plan

sides = st.integers(-1, 40)


def _definition(pos: torch.Tensor, start: torch.Tensor, end: torch.Tensor, num_k: int, left: int, right: int) -> torch.Tensor:
    key = torch.arange(num_k)
    seen = (key >= start[:, None]) & (key < end[:, None])
    if left >= 0:
        seen &= key >= pos[:, None] - left
    if right >= 0:
        seen &= key <= pos[:, None] + right
    return seen


def _assert_sound(plan: Plan) -> None:
    mask = plan.to_dense_mask()
    mask = mask if mask.dim() == 3 else mask[None]
    covered = torch.zeros(plan.num_q, dtype=torch.int)
    for (first, count), (lo, full_lo, full_hi, hi) in zip(plan.tiles.tolist(), plan.bounds.tolist(), strict=True):
        assert 0 <= lo <= full_lo <= full_hi <= hi <= plan.num_k
        rows = mask[:, first : first + count]
        assert not rows[..., :lo].any()
        assert not rows[..., hi:].any()
        assert rows[..., full_lo:full_hi].all()
        covered[first : first + count] += 1
    assert (covered[mask.any(0).any(-1)] == 1).all()  # each row that sees something is in exactly one tile
    assert (covered <= 1).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.integers(0, 70), sides, sides, st.sampled_from([1, 16, 32]))
def test_window_is_sound(num_q: int, num_k: int, left: int, right: int, block: int) -> None:
    plan = Plan.window(num_q, num_k, left, right, block_q=block)
    _assert_sound(plan)
    start, end = torch.zeros(num_q, dtype=torch.long), torch.full((num_q,), num_k)
    expected = _definition(torch.arange(num_q) + num_k - num_q, start, end, num_k, left, right)
    assert torch.equal(plan.to_dense_mask(), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    sides,
    sides,
    st.sampled_from([1, 16, 32]),
)
def test_varlen_is_sound(lengths: list[tuple[int, int]], left: int, right: int, block: int) -> None:
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
    num_q, num_k = int(cu_q[-1]), int(cu_k[-1])
    plan = Plan.varlen(cu_q, cu_k, num_q, num_k, left, right, block_q=block)
    _assert_sound(plan)
    blocks = [
        _definition(torch.arange(q) + k - q, torch.zeros(q, dtype=torch.long), torch.full((q,), k), k, left, right)
        for q, k in lengths
    ]
    assert torch.equal(plan.to_dense_mask(), torch.block_diag(*[b.int() for b in blocks]).bool().view(num_q, num_k))


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 60), sides)
def test_rows_are_sound(data: st.DataObject, num_k: int, left: int) -> None:
    pos = data.draw(st.lists(st.lists(st.integers(0, num_k - 1), min_size=20, max_size=20), min_size=1, max_size=3))
    plan = Plan.rows(torch.tensor(pos), num_k, left, 0, block_q=16)
    _assert_sound(plan)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([1, 16, 32]), sides)
def test_packed_rows_on_given_keys_are_sound(data: st.DataObject, block: int, left: int) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5))
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
    starts = cu_k[:-1].tolist()
    pos = [
        start + data.draw(st.integers(-1, max(keys - 1, -1))) for (rows, keys), start in zip(lengths, starts, strict=True)
        for _ in range(rows)
    ]  # fmt: skip
    num_q, num_k = int(cu_q[-1]), int(cu_k[-1])
    q_pos = torch.tensor(pos, dtype=torch.int32)
    plan = Plan.varlen(cu_q, cu_k, num_q, num_k, left, 0, q_pos=q_pos, block_q=block)
    _assert_sound(plan)
    start, end = (edge.repeat_interleave(cu_q.diff()) for edge in (cu_k[:-1], cu_k[1:]))
    assert torch.equal(plan.to_dense_mask(), _definition(q_pos, start, end, num_k, left, 0))


def test_rows_past_the_last_boundary_see_nothing() -> None:
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    plan = Plan.varlen(cu, cu, 8, 8, block_q=4)
    assert not plan.to_dense_mask()[5:].any()
    assert plan.tiles[:, 1].sum() == 5


def test_full_part_leaves_only_the_diagonal_masked() -> None:
    plan = Plan.causal(512, 512, block_q=128)
    assert plan.bounds.tolist() == [[0, 0, 128 * i + 1, 128 * (i + 1)] for i in range(4)]
    assert plan.pairs() == sum(128 * 128 * (i + 1) for i in range(4))


@pytest.mark.parametrize(
    "plan",
    [
        Plan.dense(256, 384),
        Plan.causal(256, 384),
        Plan.window(300, 256, 30, 10),
        Plan.varlen(*[torch.tensor([0, 100, 100, 256], dtype=torch.int32)] * 2, 256, 256, right=0),
        Plan.rows(torch.arange(0, 512, 4).reshape(2, 64), 512),
    ],
    ids=lambda plan: plan.kind,
)
def test_block_mask_is_the_same_pattern(plan: Plan) -> None:
    from torch.nn.attention.flex_attention import create_mask

    block_mask = plan.to_block_mask()
    dense = plan.to_dense_mask()
    batch = dense.shape[0] if dense.dim() == 3 else None
    mask = create_mask(block_mask.mask_mod, batch, None, plan.num_q, plan.num_k, device="cpu")
    assert torch.equal(mask[:, 0], dense if batch else dense[None])
    covered = block_mask.to_dense().bool()  # blocks that FlexAttention would visit
    size_q, size_k = block_mask.BLOCK_SIZE
    visited = covered.repeat_interleave(size_q, -2).repeat_interleave(size_k, -1)[..., : plan.num_q, : plan.num_k]
    assert not (mask & ~visited).any()
