"""Rows that are counted stand in the order of those that are sorted, bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit._core.triton import interpreted
from attnkit.ops.indexed.call import IndexedCall, prepare, prepare_hash
from attnkit.ops.indexed.counting import can_count, count_rows
from attnkit.ops.indexed.rows import Order, order_rows, sort_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cpu" if interpreted() else "cuda"
FIELDS = ("queries", "keys", "cu_q", "cu_k", "q_pos")
CAUSAL = ("inclusive", "strict", None)


def _qk(batch: int, num_q: int, num_k: int, heads: tuple[int, int], device: str = DEVICE) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, num_q, heads[0], 16, device=device), torch.randn(batch, num_k, heads[1], 16, device=device)


def _some_groups(t: Tensor, num_groups: int, rank: int = 3, dtype: torch.dtype = torch.int32) -> Tensor:
    """Groups of the rows of t; some rows have none."""
    shape = {1: t.shape[1:2], 2: t.shape[:2], 3: t.shape[:3]}[rank]
    return torch.randint(-1, num_groups, shape, device=t.device, dtype=dtype)


def _same(call: IndexedCall, index: int = 0) -> None:
    counted, expected = Order(*count_rows(call, index)), sort_rows(call, index)
    for name in FIELDS:
        ours, theirs = getattr(counted, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("causal", CAUSAL, ids=str)
@pytest.mark.parametrize(
    ("batch", "num_q", "num_k", "heads", "num_groups"),
    [
        (2, 300, 300, (2, 2), 16),
        (2, 20, 150, (3, 3), 1),
        (1, 150, 20, (6, 2), 5),
        (1, 130, 128, (3, 3), 64),
        (1, 20, 21, (12, 1), 33),
        (1, 3, 5, (128, 1), 2),
        (2, 0, 5, (2, 1), 4),
        (2, 5, 0, (2, 1), 4),
        (0, 5, 5, (2, 2), 2),
        (1, 0, 0, (1, 1), 1),
    ],
)
def test_counted_rows_are_sorted_rows(
    batch: int, num_q: int, num_k: int, heads: tuple[int, int], num_groups: int, causal: str | None
) -> None:
    q, k = _qk(batch, num_q, num_k, heads)
    groups = {"q_group": _some_groups(q, num_groups, dtype=torch.int64), "k_group": _some_groups(k, num_groups)}
    keep = {f"{name}_keep": torch.rand(t.shape[:3], device=DEVICE) < 0.6 for name, t in (("q", q), ("k", k))}
    one_side = {"q_group": _some_groups(q, num_groups, 2), "k_group": _some_groups(k, num_groups, 1) * 0}
    for options in (groups | keep, keep, one_side, {}):
        count = num_groups if "q_group" in options else None
        _same(prepare(q, k, k, None, None, causal=causal, num_groups=count, **options))


def test_every_row_of_one_group_and_none() -> None:
    """The most that a byte counts; and nothing to count."""
    q, k = _qk(1, 400, 400, (2, 2))
    for group in (0, 3, -1):
        same = torch.full((400,), group, device=DEVICE)
        for causal in CAUSAL:
            _same(prepare(q, k, k, None, None, q_group=same, k_group=same, num_groups=4, causal=causal))


def test_rounds_and_strides() -> None:
    q, k = _qk(2, 40, 50, (4, 2))
    rounds = [torch.randint(0, 3, (*t.shape[2::-1], 2), device=DEVICE).permute(3, 2, 1, 0) for t in (q, k)]  # any strides
    call = prepare_hash(q, k, k, *rounds, num_buckets=3, k_keep=(torch.rand(100, device=DEVICE) < 0.5)[::2])
    for index in range(2):
        _same(call, index)
    everywhere = torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(2, 40, 4)
    _same(prepare(q, k, k, None, None, q_group=everywhere, k_group=rounds[1][0], num_groups=3))


def test_groups_that_do_not_exist_are_dropped() -> None:
    """A GPU's are not checked; numbers of 64 bits are compared before they are cut."""
    q, k = _qk(1, 60, 60, (2, 2))
    groups = torch.randint(-2, 6, (1, 60, 2), device=DEVICE)
    groups[:, ::7] = 2**32 + 1
    call = prepare(q, k, k, None, None, q_group=groups.clamp(max=5), k_group=groups.clamp(max=5), num_groups=6)
    sides = {name: replace(side, groups=(groups,)) for name, side in (("queries", call.queries), ("keys", call.keys))}
    call = replace(call, **sides, num_groups=4)
    _same(call)
    assert int(Order(*count_rows(call, 0)).cu_q[-1]) == int(((groups >= 0) & (groups < 4)).sum())


def test_the_operator_is_well_behaved() -> None:
    q, k = _qk(1, 20, 30, (4, 2))
    operator = torch.ops.attnkit.order_rows_triton.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    keep = torch.rand(20, device=DEVICE) < 0.5
    args = (q, k, _some_groups(q, 3), keep, _some_groups(k, 3), None, 3, "strict")
    torch.library.opcheck(operator, args, test_utils=tests)


def test_compiles_without_a_break() -> None:
    q, k = (t.requires_grad_() for t in _qk(1, 20, 30, (4, 2)))
    groups = {"q_group": _some_groups(q, 3), "k_group": _some_groups(k, 3)}

    def function(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return count_rows(prepare(q, k, k, None, None, num_groups=3, **groups), 0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k)
    assert all(torch.equal(one, other) for one, other in zip(compiled, function(q, k), strict=True))


def test_who_is_counted() -> None:
    def asks(size: tuple[int, ...] = (2, 50, 50), heads: tuple[int, int] = (4, 2), **options: Any) -> bool:
        q, k = _qk(*size, heads, "meta")
        groups = {f"{name}_group": _some_groups(t, 3) for name, t in (("q", q), ("k", k))}
        return can_count(prepare(q, k, k, options.get("pos"), None, num_groups=options.get("groups", 3), **groups))

    assert asks()
    assert asks(groups=64)
    assert not asks(groups=65)
    assert not asks(pos=torch.zeros(50, dtype=torch.int32, device="meta"))
    assert asks(heads=(128, 1))
    assert not asks(heads=(129, 1))
    assert asks((4, 65536, 65536), (48, 48), groups=64)
    assert not asks((16, 2**20, 2**20), (64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "heads", "num_groups"), [(16384, (48, 48), 16), (5000, (32, 8), 60), (9001, (40, 1), 7)])
def test_many_rows_on_a_gpu(tokens: int, heads: tuple[int, int], num_groups: int) -> None:
    q, k = _qk(2, tokens, tokens + 77, heads, "cuda")
    for causal in CAUSAL:
        call = prepare(
            q, k, k, None, None, causal=causal, num_groups=num_groups, q_keep=torch.rand(q.shape[:3], device="cuda") < 0.9,
            q_group=_some_groups(q, num_groups), k_group=_some_groups(k, num_groups),
        )  # fmt: skip
        assert can_count(call)
        _same(call)
        expected = sort_rows(call, 0)
        assert all(torch.equal(getattr(order_rows(call), name), getattr(expected, name)) for name in FIELDS)
