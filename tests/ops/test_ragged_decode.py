"""Ragged decode attention beyond conformance: merging, views, refusals, graphs, and the bits of codes in compiled kernels."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnkit import errors, ops
from attnkit._core.triton import interpreted
from attnkit.ops import KVPages
from attnkit.ops.ragged_decode.codes import pack4, unpack4

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
BACKENDS = ["torch", pytest.param("triton", marks=needs_interpreter)]


def _paged(keys: Tensor, values: Tensor, lengths: Tensor, page: int = 16) -> KVPages:
    """Pages, in any order, of dense keys [B, Hkv, S, D] of which `lengths` are stored; S is a multiple of the page."""
    batch, heads, num, _ = keys.shape
    order = torch.randperm(batch * heads * num // page)
    pools = [torch.empty_like(t.reshape(-1, page, t.shape[-1])) for t in (keys, values)]
    for pool, t in zip(pools, (keys, values), strict=True):
        pool[order] = t.reshape(-1, page, t.shape[-1])
    return KVPages(pools[0], pools[1], order.view(batch, heads, -1).int(), lengths.int())


def _draw(dtype: torch.dtype = torch.float32, num: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(2, 3, 4, 32, dtype=dtype)
    keys, values = torch.randn(2, 2, num, 32, dtype=dtype), torch.randn(2, 2, num, 48, dtype=dtype)
    return q, keys, values, torch.tensor([[num, 5], [33, 0]])


def _ok(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention_where_all_heads_are_full(backend: str) -> None:
    q, keys, values, lengths = _draw()
    found = ops.ragged_decode_attention(q, _paged(keys, values, torch.full_like(lengths, 64)), return_lse=True, backend=backend)
    _ok(found, ops.attention(q, keys.transpose(1, 2), values.transpose(1, 2), return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_and_newer_keys_merge_to_causal_attention(backend: str) -> None:
    """What a cache does in a prefill that begins with stored keys."""
    q, keys, values, _ = _draw()
    new_keys, new_values = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 48)
    old = ops.ragged_decode_attention(q, _paged(keys, values, torch.full((2, 2), 64)), return_lse=True, backend=backend)
    new = ops.attention(q, new_keys, new_values, causal=True, return_lse=True)
    merged = ops.merge_partials(*(torch.stack(parts) for parts in zip(old, new, strict=True)))
    all_keys, all_values = (torch.cat([a.transpose(1, 2), b], 1) for a, b in ((keys, new_keys), (values, new_values)))
    _ok(merged, ops.attention(q, all_keys, all_values, causal=True, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_tokens_are_stored_does_not_matter(backend: str) -> None:
    q, keys, values, lengths = _draw()
    one = ops.ragged_decode_attention(q, _paged(keys, values, lengths), return_lse=True, backend=backend)
    halves = _paged(keys[:, :, :32], values[:, :, :32], lengths.clamp(max=32), page=32)
    halves = replace(
        halves, tail_keys=keys[:, :, 32:], tail_values=values[:, :, 32:], tail_lengths=(lengths - 32).clamp(min=0).int()
    )
    _ok(ops.ragged_decode_attention(q, halves, return_lse=True, backend=backend), one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_and_changes_nothing(backend: str) -> None:
    """Queries with heads first, a pool that interleaves keys and values, a tail that is a slice of a longer one."""
    q, keys, values, lengths = _draw()
    plain = replace(
        _paged(keys, values[..., :32].contiguous(), lengths),
        tail_keys=keys[:, :, :7], tail_values=values[:, :, :7, :32], tail_lengths=torch.tensor([[7, 0], [2, 7]]).int(),
    )  # fmt: skip
    pool = torch.stack([plain.keys, plain.values], 1)
    viewed = replace(plain, keys=pool[:, 0], values=pool[:, 1], table=plain.table.repeat_interleave(2, -1)[..., ::2])
    before = [t.clone() for t in viewed.tensors().values()]
    flipped = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = ops.ragged_decode_attention(flipped, viewed, return_lse=True, backend=backend)
    _ok(found, ops.ragged_decode_attention(q, plain, return_lse=True, backend="reference"))
    assert all(torch.equal(a, b) for a, b in zip(before, viewed.tensors().values(), strict=True))


@needs_interpreter
def test_more_rows_than_a_tile_of_the_kernels() -> None:
    _, keys, values, lengths = _draw(num=320)  # two parts of 256
    q = torch.randn(2, 40, 4, 32)
    pages = _paged(keys, values, lengths)
    _ok(
        ops.ragged_decode_attention(q, pages, return_lse=True, backend="triton"),
        ops.ragged_decode_attention(q, pages, return_lse=True, backend="reference"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_query_stays_in_its_row(backend: str) -> None:
    q, keys, values, lengths = _draw()
    q[0, 1, 2, 3] = torch.nan
    out = ops.ragged_decode_attention(q, _paged(keys, values, lengths), backend=backend)
    assert isinstance(out, Tensor)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]


def test_materialize_keeps_the_order_of_tokens() -> None:
    _, keys, values, lengths = _draw()
    found, _, seen = _paged(keys, values, lengths).materialize()
    assert torch.equal(seen, torch.arange(64) < lengths[..., None])
    assert torch.equal(found, keys.masked_fill(~seen[..., None], 0))


def test_halves_of_a_byte() -> None:
    codes = torch.randint(0, 16, (3, 10), dtype=torch.uint8)
    assert torch.equal(unpack4(pack4(codes)), codes)
    assert pack4(codes)[0, 0] == codes[0, 0] + 16 * codes[0, 5]


def _arguments(pages: KVPages, q: Tensor) -> tuple[Any, ...]:
    parts = [getattr(pages, name) for name in KVPages.__dataclass_fields__]
    return (q, *parts, None, 0.2, 0.0, q.dtype)


@pytest.mark.parametrize(
    "name", ["ragged_decode_attention", pytest.param("ragged_decode_attention_triton", marks=needs_interpreter)]
)
def test_operator_is_well_formed(name: str) -> None:
    q, keys, values, lengths = _draw()
    operator = getattr(torch.ops.attnkit, name).default
    opcheck(operator, _arguments(_paged(keys, values, lengths), q), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_break() -> None:
    q, keys, values, lengths = _draw()
    pages = _paged(keys, values, lengths)

    def step(q: Tensor) -> Tensor:
        out = ops.ragged_decode_attention(q * 2, pages)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), step(q))


def _coded(pages: KVPages) -> KVPages:
    num, size, width = pages.keys.shape
    scales = {
        f"{name}_{part}": torch.ones(num, width if name == "key" else size).half()
        for name in ("key", "value")
        for part in ("scale", "zero")
    }
    return replace(pages, keys=pages.keys.byte(), values=pages.values.byte(), **scales)


WRONG: dict[str, tuple[Callable[[KVPages], KVPages], type[Exception], str]] = {
    "page": (
        lambda p: replace(p, keys=p.keys[:, :12], values=p.values[:, :12]),
        errors.ShapeError,
        "pages.keys has 12 tokens a page; choose one of 16, 32, 64, 128",
    ),
    "width": (
        lambda p: replace(p, keys=p.keys[..., :31]),
        errors.ShapeError,
        "pages.keys has shape (16, 16, 31) for [N, P, D]; D must be 32 as in q",
    ),
    "dtype": (
        lambda p: replace(p, keys=p.keys.double()),
        errors.DTypeError,
        "pages.keys is torch.float64; allowed: q's torch.float32",
    ),
    "table": (lambda p: replace(p, table=p.table.long()), errors.DTypeError, "pages.table is int64; allowed: int32"),
    "outside": (lambda p: replace(p, table=p.table + 9), errors.OptionError, "pages.table names a page outside the pool of 16"),
    "length": (
        lambda p: replace(p, lengths=p.lengths + 1),
        errors.OptionError,
        "pages.lengths ranges over 1..65; allowed: 0..64",
    ),
    "tail": (
        lambda p: replace(p, tail_keys=torch.zeros(2, 2, 3, 32)),
        errors.InputError,
        "pages.tail_values is missing but pages.tail_keys is given",
    ),
    "tail bias": (
        lambda p: replace(p, tail_bias=torch.zeros(2, 2, 3)),
        errors.InputError,
        "pages.tail_bias is given without a tail",
    ),
    "scale": (lambda p: replace(_coded(p), value_zero=None), errors.InputError, "pages.value_zero is missing with int8 pages"),
    "raw scale": (
        lambda p: replace(p, key_scale=torch.ones(16, 32).half()),
        errors.InputError,
        "pages.key_scale is given with raw pages; leave it out",
    ),
    "bias": (
        lambda p: replace(p, bias=torch.zeros(16, 16).half()),
        errors.DTypeError,
        "pages.bias is float16; allowed: float32",
    ),
    "gradient": (
        lambda p: replace(p, keys=p.keys.clone().requires_grad_()),
        errors.UnsupportedError,
        "keys requires a gradient",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_pages_are_refused_by_name(name: str) -> None:
    q, keys, values, lengths = _draw()
    change, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        ops.ragged_decode_attention(q, change(_paged(keys, values, lengths)))


def test_bad_queries_and_options_are_refused_by_name() -> None:
    q, keys, values, lengths = _draw()
    pages = _paged(keys, values, lengths)
    with pytest.raises(errors.ShapeError, match=r"q has 3 heads and pages.table has 2"):
        ops.ragged_decode_attention(q[:, :, :3], pages)
    with pytest.raises(errors.OptionError, match=r"softcap=-1.0 must be positive"):
        ops.ragged_decode_attention(q, pages, softcap=-1.0)
    with pytest.raises(errors.OptionError, match=r"out_dtype=torch.float16 is not allowed"):
        ops.ragged_decode_attention(q, pages, out_dtype=torch.float16)
    leaf = q.clone().requires_grad_()
    with pytest.raises(errors.UnsupportedError, match=r"q requires a gradient.*torch.no_grad"):
        ops.ragged_decode_attention(leaf, pages)
    with torch.no_grad():
        ops.ragged_decode_attention(leaf, pages)


@needs_interpreter
def test_kernels_refuse_pools_that_would_be_copied() -> None:
    q, keys, values, lengths = _draw()
    pages = _paged(keys, values, lengths)
    gaps = torch.zeros(16, 16, 64)[..., ::2]
    with pytest.raises(errors.BackendUnavailable, match=r"pages.keys with strides \(1024, 64, 2\)"):
        ops.ragged_decode_attention(q, replace(pages, keys=gaps), backend="triton")
    assert ops.explain("ragged_decode_attention", q, replace(pages, keys=gaps)).chosen == "torch"


def _lanes(word: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([word], dtype=torch.int64).to(torch.int32).view(dtype).double()


def _execute(program: str, word: int, outputs: int) -> list[int]:
    """The few PTX instructions that decode four bytes, on whole numbers: what no interpreter of Triton's runs."""
    known = {f"${outputs}": word}
    for line in program.strip("{}\n ").split("\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        target, *operands = (part.strip() for part in rest.split(","))
        if name == ".reg":
            continue
        a, b, c = ([known[x] if x in known else int(x, 0) for x in operands] + [0, 0])[:3]
        if name.startswith("fma.rn"):
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            lanes = (_lanes(a, dtype) * _lanes(b, dtype) + _lanes(c, dtype)).to(dtype)
            known[target] = int(lanes.view(torch.int32)) & 0xFFFFFFFF
        elif name == "prmt.b32":
            both = a | b << 32
            known[target] = sum((both >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            known[target] = {"mov.b32": a, "and.b32": a & b, "or.b32": a | b, "not.b32": a ^ 0xFFFFFFFF, "shr.u32": a >> b}[
                name
            ]
    return [known[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", ["INT8", "FP8", "INT4"])
def test_instructions_decode_every_byte_exactly(code: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from attnkit.ops.ragged_decode._triton import numbers

    program = getattr(numbers, f"_{code}_{'FP16' if dtype == torch.float16 else 'BF16'}").value
    every = torch.arange(256, dtype=torch.uint8)
    parts = {
        "INT8": [(every.double() - 128) / 256],
        "INT4": [((every & 15).double() - 8) / 16, ((every >> 4).double() - 8) / 16],
        "FP8": [every.view(torch.float8_e4m3fn).double() / 256],
    }[code]
    for first in range(0, 256, 4):
        word = sum((first + i) << 8 * i for i in range(4))
        found = torch.cat([_lanes(x, dtype) for x in _execute(program, word, 2 * len(parts))])
        wanted = torch.cat([part[first : first + 4] for part in parts])
        finite = wanted.isfinite()  # fp8's two NaNs are no codes: a NaN spoils its scale
        assert torch.equal(found[finite], wanted[finite])
