"""What conformance does not say about the indexed operators: ranges, equalities with attention, refusals, tracing."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import BackendUnavailable, InputError
from attnkit._core.triton import interpreted
from attnkit.ops._attention_core.plan import Plan
from attnkit.ops.attention.backends import BACKENDS as ATTENTION
from attnkit.ops.indexed.call import IndexedCall, prepare, prepare_hash, prepare_qk
from attnkit.ops.indexed.reference import count_seen
from attnkit.ops.indexed.rows import Order, order_rows, packed_call, scatter

KERNELS = "cpu" if interpreted() else "cuda"


def _qkv(num_q: int, num_k: int | None = None, heads: tuple[int, int] = (4, 2), batch: int = 2, **kwargs: Any) -> list[Tensor]:
    shapes = ((num_q, heads[0]), (num_q if num_k is None else num_k, heads[1]), (num_q if num_k is None else num_k, heads[1]))
    return [torch.randn(batch, *shape, 16, **kwargs) for shape in shapes]


def _mask_of(order: Order, call: IndexedCall) -> Tensor:
    """[B, H, T, S] bool: what the packed rows see, put back to where they came from."""
    batch, num_q, heads, _ = call.base.q.shape
    num_k, kv_heads = call.base.k.shape[1:3]
    plan = Plan.varlen(order.cu_q, order.cu_k, len(order.queries), len(order.keys), right=0, q_pos=order.q_pos, block_q=16)
    seen = torch.zeros(batch * num_q * heads, batch * num_k * kv_heads, dtype=torch.bool)
    seen[order.queries[:, None], order.keys[None]] = plan.to_dense_mask()
    seen = seen.view(batch, num_q, heads, batch, num_k, kv_heads)
    mine = torch.zeros(batch, heads, num_q, num_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            of = h // (heads // kv_heads)
            mine[b, h] = seen[b, :, h, b, :, of]
            seen[b, :, h, b, :, of] = False
    assert not seen.any()  # nothing of other heads or batch elements
    return mine


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(["inclusive", "strict", None]), st.integers(0, 12), st.integers(0, 12))
def test_ranges_are_sound_and_complete(data: st.DataObject, causal: str | None, num_q: int, num_k: int) -> None:
    """Random positions with ties, groups, dropped rows, of one rank each: the packed rows see exactly what they should."""
    heads, batch = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)])), data.draw(st.integers(1, 2))
    q, k, v = _qkv(num_q, num_k, heads, batch)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    options: dict[str, Any] = {"q_pos": None, "k_pos": None}
    places = {"q": (batch, num_q, heads[0]), "k": (batch, num_k, heads[1])}
    kinds = st.sampled_from([0, 1, 2, 3])
    wide = data.draw(st.sampled_from([3, 20, 2**31 - 1]))
    grouped = data.draw(st.booleans())
    for side, full in places.items():
        for kind in ("pos", "keep", *(["group"] if grouped else [])):
            rank = data.draw(kinds)
            shape = {0: None, 1: full[1:2], 2: full[:2], 3: full}[rank] if kind != "group" else full[1 : 2 + rank]
            if kind == "group":
                options[f"{side}_group"] = torch.randint(-1, 3, full[:2] if rank < 2 else full, generator=generator)
            elif shape is not None and kind == "pos":
                options[f"{side}_pos"] = torch.randint(-wide, wide, shape, generator=generator)
            elif shape is not None:
                options[f"{side}_keep"] = torch.rand(shape, generator=generator) < 0.7
    call = prepare(q, k, v, **options, causal=causal, num_groups=3 if grouped else None)
    assert torch.equal(_mask_of(order_rows(call), call), count_seen(call) > 0)


def test_positions_that_are_given_are_the_default_ones() -> None:
    """Sorted by numbers of 64 bits instead of 32: the same order."""
    q, k, v = _qkv(40, 50)
    groups = {f"{side}_group": torch.randint(0, 3, (2, rows)) for side, rows in (("q", 40), ("k", 50))}
    given = order_rows(prepare(q, k, v, torch.arange(10, 50), torch.arange(50), **groups, num_groups=3))
    default = order_rows(prepare(q, k, v, None, None, **groups, num_groups=3))
    for name in ("queries", "keys", "cu_q", "cu_k", "q_pos"):
        assert torch.equal(getattr(given, name), getattr(default, name))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_group_in_order_is_attention(backend: str) -> None:
    """The same kernels on the same tiles: rows of one head are as they were."""
    device = KERNELS if backend == "triton" else "cpu"
    q, k, v = (t.requires_grad_() for t in _qkv(70, heads=(2, 2), device=device))
    weight = torch.randn(2, 70, 2, 16, device=device)
    everything = torch.ones(70, dtype=torch.bool, device=device)
    results = []
    for run in (
        lambda: ops.attention(q, k, v, causal=True, backend=backend),
        lambda: ops.indexed_attention(q, k, v, None, None, backend=backend),
        lambda: ops.qk_sparse_attention(q, k, v, everything, everything, backend=backend),
        lambda: ops.hash_sparse_attention(q, k, v, everything.int() - 1, everything.int() - 1, num_buckets=1, backend=backend),
    ):
        out = run()
        results.append((out, *torch.autograd.grad(out, (q, k, v), weight)))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_groups_are_packed_sequences() -> None:
    """A document mask by groups is `attention` with boundaries, wherever the documents' tokens lie."""
    q, k, v = _qkv(90, heads=(4, 2), batch=1)
    lengths = torch.tensor([17, 0, 40, 33])
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    expected = ops.attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    document, order = torch.arange(4).repeat_interleave(lengths), torch.randperm(90)
    shuffled = [t[:, order] for t in (q, k, v)]
    ours = ops.indexed_attention(
        *shuffled, order, order, q_group=document[order], k_group=document[order], num_groups=4, backend="torch"
    )
    torch.testing.assert_close(ours[0], expected[order], rtol=1e-5, atol=1e-5)


def test_disjoint_rounds_are_their_union() -> None:
    """Two rounds in which no pair repeats see together what one group of both sees."""
    q, k, v = _qkv(60, heads=(2, 2), batch=1)
    first = torch.randint(0, 2, (60,))
    alone = torch.arange(60) + 2  # a round in which nobody meets, but for those of group 0
    rounds = torch.stack([first, torch.where(first == 0, alone, -1)])[:, None, :, None].expand(2, 1, 60, 2)
    keys = rounds.clone()
    keys[1] = -1  # and those meet no key
    ours = ops.hash_sparse_attention(q, k, v, rounds, keys, num_buckets=62, return_lse=True, backend="torch")
    once = ops.hash_sparse_attention(q, k, v, first, first, num_buckets=2, return_lse=True, backend="torch")
    twice = ops.hash_sparse_attention(q, k, v, rounds[:1].repeat(2, 1, 1, 1), rounds[:1].repeat(2, 1, 1, 1), return_lse=True)
    for one, other, double in zip(ours, once, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            double, other + (torch.log(torch.tensor(2.0)) if other.dim() == 3 else 0), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_dropped_rows_have_no_gradient(backend: str) -> None:
    device = KERNELS if backend == "triton" else "cpu"
    q, k, v = (t.requires_grad_() for t in _qkv(70, device=device))
    q_keep, k_keep = (torch.rand(2, 70, heads, device=device) < 0.5 for heads in (4, 2))
    out = ops.qk_sparse_attention(q, k, v, q_keep, k_keep, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not out[~q_keep].any()
    for grad, keep in zip(grads, (q_keep, k_keep, k_keep), strict=True):
        assert not grad[~keep].any()
        assert grad[keep].abs().sum(-1).bool().float().mean() > 0.8


def _some_rows(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Three groups, and rows of no group."""
    return {
        "num_groups": 3,
        "q_group": torch.randint(-1, 3, q.shape[:3], device=q.device),
        "k_group": torch.randint(-1, 3, k.shape[:3], device=k.device),
    }


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", ["some", "all dropped", "of an empty tensor", "one for many keys"])
def test_kernels_write_every_row_once(rows: str) -> None:
    """Rows stay where they are: the kernels' results are those of packed copies put back, and leave nothing out."""
    heads = (2, 1) if rows == "one for many keys" else (4, 2)
    num_q, num_k = {"of an empty tensor": (33, 0), "one for many keys": (1, 1100)}.get(rows, (150, 170))
    q, k, v = (t.requires_grad_() for t in _qkv(num_q, num_k, heads, 1 if num_q == 1 else 2, device=KERNELS))
    options = _some_rows(q, k)
    if rows == "all dropped":
        options |= {"q_group": torch.full_like(options["q_group"], -1)}
    elif rows == "one for many keys":
        options = {}
    results = []
    for backend in ("triton", "torch"):
        out, lse = ops.indexed_attention(q, k, v, None, None, **options, return_lse=True, backend=backend)
        loss = (out * out).sum() + lse.masked_fill(lse.isneginf(), 0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("poisoned_memory")
def test_rows_in_place_are_bit_by_bit_those_of_sorted_copies() -> None:
    """The same tiles of the same rows, wherever they lie."""
    q, k, v = _qkv(150, 170, device=KERNELS)
    call = prepare(q, k, v, None, None, **_some_rows(q, k), softcap=2.0)
    order = order_rows(call)
    weight = torch.randn_like(q)
    for t in (q, k, v):
        t.requires_grad_()
    out, _ = next(backend for backend in ATTENTION if backend.name == "triton").run(packed_call(call.base, order))
    expected = scatter(out[:, 0], order.queries).view(q.shape)
    ours: Any = ops.indexed_attention(
        q, k, v, None, None, q_group=call.queries.groups[0], k_group=call.keys.groups[0], num_groups=3, softcap=2.0,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(ours, expected)
    for one, other in zip(*(torch.autograd.grad(t, (q, k, v), weight) for t in (ours, expected)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["heads first", "parts of one tensor", "expanded gradient"])
def test_kernels_take_any_strides(layout: str) -> None:
    q, k, v = _qkv(50, heads=(2, 2), device=KERNELS)
    options = _some_rows(q, k)
    if layout == "heads first":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    elif layout == "parts of one tensor":
        views = list(torch.stack((q, k, v), 2).unbind(2))
    else:
        views = [q, k, v]
    weight = torch.randn(16, device=KERNELS).expand(q.shape) if layout == "expanded gradient" else torch.randn_like(q)
    results = []
    for backend, inputs in (("triton", views), ("torch", (q, k, v))):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out: Any = ops.indexed_attention(*leaves, None, None, **options, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, weight)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_the_kernels_operator_is_well_behaved() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(20, device=KERNELS))
    call = prepare(q, k, v, None, None, **_some_rows(q, k))
    order = order_rows(call)
    places = (order.cu_q, order.cu_k, order.q_pos, order.queries.int(), order.keys.int())
    operator = torch.ops.attnkit.indexed_attention_triton.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, (q, k, v, None, None, *places, 0.25, 0.0, torch.float32), test_utils=tests)


def test_gradcheck() -> None:
    q, k, v = (t[:1].double().requires_grad_() for t in _qkv(7))
    bucket = torch.randint(0, 2, (2, 1, 7, 4))
    keys = torch.randint(0, 2, (2, 1, 7, 2))

    def function(*args: Tensor) -> Any:
        out, lse = ops.hash_sparse_attention(*args, bucket, keys, num_buckets=2, return_lse=True, backend="torch")
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_a_break(backend: str) -> None:
    device = KERNELS if backend == "triton" else "cpu"
    q, k, v = (t.requires_grad_() for t in _qkv(30, device=device))
    bucket, keys = (torch.randint(0, 4, (2, 30, heads), device=device) for heads in (4, 2))
    calls = (
        lambda: ops.hash_sparse_attention(q, k, v, bucket, keys, num_buckets=4, backend=backend),
        lambda: ops.qk_sparse_attention(q, k, v, bucket > 1, keys > 1, backend=backend),
        lambda: ops.indexed_attention(q, k, v, bucket, keys, causal="strict", return_lse=True, backend=backend)[0],
    )
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
        eager = call()
        torch.testing.assert_close(compiled, eager)
        for one, other in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (compiled, eager)), strict=True):
            torch.testing.assert_close(one, other)


def test_deterministic() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(200))
    pos = torch.randint(0, 9, (200,))  # many ties
    runs = []
    for _ in range(5):
        out = ops.indexed_attention(q, k, v, pos, pos)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": "causal"}, "causal='causal'"),
        ({"q_group": torch.zeros(9, dtype=torch.int32)}, "k_group is missing"),
        ({"q_group": torch.zeros(9), "k_group": torch.zeros(9)}, "q_group is float32"),
        ({"q_keep": torch.ones(9)}, "q_keep is float32"),
        ({"k_keep": torch.ones(2, 9, 4, dtype=torch.bool)}, "Hkv must be 2"),
        ({"k_keep": torch.ones(8, dtype=torch.bool)}, "S must be 9"),
        ({"q_pos": torch.full((9,), 2**31)}, "32 bits"),
        ({"q_group": torch.full((9,), 3), "k_group": torch.zeros(9).int(), "num_groups": 3}, "num_groups is 3"),
        ({"q_group": torch.zeros(9).int(), "k_group": torch.zeros(9).int(), "num_groups": 0}, "at least 1"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    options = {"q_pos": None, "k_pos": None} | changed
    with pytest.raises(InputError, match=message):
        ops.indexed_attention(*_qkv(9), **options)


def test_refusals_name_what_to_do() -> None:
    q, k, v = _qkv(9)
    with pytest.raises(InputError, match="packed sequences are groups"):
        ops.indexed_attention(q[0], k[0], v[0], None, None)
    with pytest.raises(InputError, match="2 rounds and k_bucket has 1"):
        ops.hash_sparse_attention(q, k, v, torch.zeros(2, 2, 9, 4).int(), torch.zeros(2, 9, 2).int())
    half = [t.bfloat16() for t in (q, k, v)]
    with pytest.raises(BackendUnavailable, match="bfloat16" if interpreted() else "device cpu"):
        ops.indexed_attention(*half, None, None, backend="triton")
    assert ops.explain(ops.indexed_attention, q, k, v, None, None).chosen == "torch"


@pytest.mark.parametrize("name", ["hash_sparse_attention", "qk_sparse_attention"])
def test_occupancy_counts_steps(name: str) -> None:
    """Against tiles counted one by one in the mask of sorted rows."""
    q, k, v = _qkv(100, heads=(2, 1), batch=1)
    if name == "hash_sparse_attention":
        options: dict[str, Any] = {
            f"{side}_bucket": torch.randint(0, 3, (1, 100, heads)) for side, heads in (("q", 2), ("k", 1))
        }
        call = prepare_hash(q, k, v, **options)
    else:
        options = {f"{side}_keep": torch.rand(1, 100, heads) < 0.5 for side, heads in (("q", 2), ("k", 1))}
        call = prepare_qk(q, k, v, **options)
    order = order_rows(call)
    plan = Plan.varlen(order.cu_q, order.cu_k, 200, 100, right=0, q_pos=order.q_pos)
    mask = plan.to_dense_mask()
    steps = unmasked = 0
    edges = zip(order.cu_q.tolist(), order.cu_q[1:].tolist(), order.cu_k.tolist(), order.cu_k[1:].tolist(), strict=False)
    for q0, q1, k0, k1 in edges:
        for row in range(q0, q1, 16):
            for key in range(k0, k1, 8):
                tile = mask[row : min(row + 16, q1), key : min(key + 8, k1)]
                steps += bool(tile.any())
                unmasked += bool(tile.all() and tile.shape[1] == 8)
    found = ops.occupancy(name, q, k, v, **options, block_q=16, block_k=8)
    assert found.steps == steps
    assert found.unmasked == unmasked / steps
    assert found.density == int(mask.sum()) / (2 * 100 * 101 / 2)
    assert found.wanted == int(mask.sum()) / (steps * 128)
    assert found.groups == (3 if name == "hash_sparse_attention" else 1)
    with pytest.raises(InputError, match="occupancy is of the indexed operators"):
        ops.occupancy("attention", q, k, v)


def test_too_many_groups_are_refused() -> None:
    q, k, v = _qkv(9)
    with pytest.raises(InputError, match=r"2\^31 groups"):
        ops.hash_sparse_attention(q, k, v, torch.zeros(9).int(), torch.zeros(9).int(), num_buckets=2**30)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hash_sparse_attention", "qk_sparse_attention", "indexed_attention"])
def test_nothing_waits_for_the_gpu_and_a_graph_captures_it(name: str) -> None:
    q, k, v = _qkv(300, heads=(4, 2), device="cuda", dtype=torch.bfloat16, requires_grad=True)
    queries, keys = (torch.randint(0, 4, (2, 300, heads), device="cuda") for heads in (4, 2))
    call = {
        "hash_sparse_attention": lambda: ops.hash_sparse_attention(q, k, v, queries, keys, num_buckets=4),
        "qk_sparse_attention": lambda: ops.qk_sparse_attention(q, k, v, queries > 1, keys > 1),
        "indexed_attention": lambda: ops.indexed_attention(q, k, v, queries, keys, causal="strict"),
    }[name]
    weight = torch.randn(2, 300, 4, 16, device="cuda", dtype=torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        nonlocal q, k, v
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))  # leaves of the stream that runs this
        out: Any = call()
        return (out, *torch.autograd.grad(out, (q, k, v), weight))

    expected = run()  # compiles
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
