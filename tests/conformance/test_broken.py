"""Proof that conformance can fail: each broken operator is caught, and its sound twin passes."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.opspec import Case
from attnkit.lab.numerics import BF16, FP16, Rounding, SitePolicy, conformance, emulated_attention
from attnkit.ops import OPS

SPEC = OPS["attention"]
FORMATS = {torch.bfloat16: BF16, torch.float16: FP16}
Operator = Callable[..., Any]


def _case(name: str, **changes: Any) -> Case:
    return dataclasses.replace(next(case for case in SPEC.cases if case.name == name), **changes)


def _failed(rows: list[conformance.Row]) -> set[str]:
    assert rows
    return {row.quantity for row in rows if not row.ok}


def _scaled(error: float) -> Operator:
    def operator(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return ops.attention(q, *args, **kwargs, scale=q.shape[-1] ** -0.5 * (1 + error))

    return operator


def _causal(extra: int) -> Operator:
    """Rows see so many keys too many."""

    def operator(*args: Any, causal: bool, **kwargs: Any) -> Any:
        assert causal
        return ops.attention(*args, **kwargs, window_size=(None, extra))

    return operator


def _windowed(short: int) -> Operator:
    """The last row lacks so many of its first keys."""

    def operator(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return ops.attention(q, *args, **kwargs, window_size=(q.shape[1] - 1 - short, 0))

    return operator


def _recurrence(rescale: bool) -> Operator:
    """The flash recurrence over tiles of 64 keys; without rescaling, older sums stay relative to an older maximum."""

    def operator(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        group = q.shape[2] // k.shape[2]
        queries, keys, values = (
            t.transpose(1, 2).float() for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
        )
        top = queries.new_full((*queries.shape[:-1], 1), -torch.inf)
        total, summed = torch.zeros_like(top), torch.zeros_like(values)
        row = torch.arange(q.shape[1])[:, None]
        for start in range(0, k.shape[1], 64):
            here = slice(start, start + 64)
            s = queries @ keys[:, :, here].transpose(-1, -2) * q.shape[-1] ** -0.5
            s = s.masked_fill(torch.arange(start, start + s.shape[-1]) > row, -torch.inf)
            raised = torch.maximum(top, s.amax(-1, keepdim=True))
            alpha = torch.exp(top - raised) if rescale else 1.0
            p = torch.exp(s - raised)
            top, total, summed = raised, alpha * total + p.sum(-1, keepdim=True), alpha * summed + p @ values[:, :, here]
        lse = (top + torch.log(total))[..., 0].transpose(1, 2)
        return (summed / total).transpose(1, 2).to(q.dtype), lse

    return operator


def _emulated(normalizer: str, sites: tuple[str, ...] = SPEC.sites) -> Operator:
    """The recurrence in exact arithmetic with roundings at these sites: how a 16-bit kernel is judged without a GPU."""

    def operator(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any) -> Any:
        policy = SitePolicy("named", {site: Rounding(FORMATS[q.dtype]) for site in sites})
        options |= {"algorithm": "fa2", "normalizer": normalizer, "return_stats": True}
        out, stats = emulated_attention(q, k, v, policy=policy, **options)
        return (out, stats.lse) if return_lse else out

    return operator


def _pushed(ulps: float) -> Operator:
    """Results are moved up by a part of a unit in the last place before they are rounded."""

    def operator(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, lse = ops.attention(q, *args, **kwargs, out_dtype=torch.float32)
        unit = torch.exp2(torch.floor(torch.log2(out.detach().abs()))) * torch.finfo(q.dtype).eps
        return (out + ulps * unit).to(q.dtype), lse

    return operator


def _flushed(tiny: float) -> Operator:
    def operator(*args: Any, **kwargs: Any) -> Any:
        out, lse = ops.attention(*args, **kwargs)
        return out.masked_fill(out.abs() < tiny, 0), lse

    return operator


HEADS, PEAKS, SIZES = "causal, grouped heads", "two maxima far above the rest, stable: dynamic_max", "values of many sizes"


@pytest.mark.parametrize(
    ("make", "sound", "broken", "case", "dtype"),
    [
        (_scaled, 0, 2**-9, HEADS, torch.float32),
        (_causal, 0, 1, HEADS, torch.float32),
        (_causal, 0, 1, HEADS, torch.bfloat16),
        (_windowed, 0, 1, HEADS, torch.bfloat16),
        (_recurrence, True, False, HEADS, torch.float32),
        (_recurrence, True, False, HEADS, torch.bfloat16),
        (_emulated, "consistent", "exact", PEAKS, torch.bfloat16),
        (_pushed, 0, 0.25, "values around 2", torch.bfloat16),
        (_pushed, 0, 0.25, "values around 2", torch.float16),
        (_pushed, 0, 0.25, PEAKS, torch.bfloat16),
        (_flushed, 0, 2**-15, SIZES, torch.bfloat16),
    ],
)
def test_caught(make: Callable[[Any], Operator], sound: Any, broken: Any, case: str, dtype: torch.dtype) -> None:
    chosen = _case(case, grads=())
    assert not _failed(conformance.check(SPEC, chosen, dtype, operator=make(sound)))
    assert _failed(conformance.check(SPEC, chosen, dtype, operator=make(broken)))


@pytest.mark.parametrize(
    ("operator", "case", "gate"),
    [
        (_pushed(0.25), "values around 2", "bias"),
        (_emulated("exact"), PEAKS, "bias"),
        (_flushed(2**-15), SIZES, "ulp_row"),
    ],
)
def test_only_this_gate_catches_it(operator: Operator, case: str, gate: str) -> None:
    assert _failed(conformance.check(SPEC, _case(case, grads=()), torch.bfloat16, operator=operator)) == {gate}


def test_a_running_output_in_16_bits_is_biased() -> None:
    """What the dynamic maximum is made against."""
    operator = _emulated("consistent", (*SPEC.sites, "O_acc"))
    plain, remedy = (_case(PEAKS.replace("dynamic_max", mode), grads=()) for mode in ("off", "dynamic_max"))
    assert "bias" in _failed(conformance.check(SPEC, plain, torch.bfloat16, operator=operator))
    assert not _failed(conformance.check(SPEC, remedy, torch.bfloat16, operator=operator))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", ["63 tokens, no lse", "values around 2", "two maxima far above the rest, stable: off"])
def test_rounding_at_the_published_sites_stays_within_the_budget(case: str, dtype: torch.dtype) -> None:
    """Gradients too, where the emulator's LSE, which has none, is not asked for."""
    chosen = _case(case) if case.endswith("no lse") else _case(case, grads=())
    assert not _failed(conformance.check(SPEC, chosen, dtype, operator=_emulated("exact")))


def test_nan_and_wrong_shape_are_caught() -> None:
    chosen = _case("rows that see nothing")

    def nan_rows(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        out, lse = ops.attention(q, k, v, **kwargs)
        return out.masked_fill(torch.isneginf(lse)[..., None], torch.nan), lse

    rows = conformance.check(SPEC, chosen, torch.float32, operator=nan_rows)
    assert any("NaN" in row.note for row in rows)

    def one_row_short(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return tuple(t[:, :-1] for t in ops.attention(q, k, v, **kwargs))

    for name in ("rows that see nothing", "values around 2"):
        rows = conformance.check(SPEC, _case(name, grads=()), torch.float32, operator=one_row_short)
        assert any("shape" in row.note for row in rows)


# --- invariances


def _no_maximum(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None, **kwargs: Any) -> Any:
    """Exponentials of the scores themselves: right where scores are small."""
    bias = 0.0 if key_bias is None else key_bias.float()[:, None, None]
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5 + bias
    total = torch.exp(s).sum(-1)
    out = torch.einsum("bhts,bshd->bthd", torch.exp(s) / total[..., None], v.float())
    return out.to(q.dtype), torch.log(total).transpose(1, 2)


def _padding_comes_first(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor, **kwargs: Any) -> Any:
    """Skips what is masked before the first key that is not, and takes the rest for seen."""
    first = int(torch.isfinite(key_bias[0]).int().argmax())
    bias = key_bias[:, first:].nan_to_num(neginf=0.0)
    return ops.attention(q, k[:, first:], v[:, first:], key_bias=bias, **kwargs)


def _added(*args: Any, **kwargs: Any) -> Any:
    out, lse = ops.attention(*args, **kwargs)
    return out + 1e-6, lse


def _by_batch(q: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Another order of sums for one element than for several."""
    return ops.attention(q, *args, **kwargs, backend="torch" if q.shape[0] == 1 else "reference")


@pytest.mark.parametrize(
    ("broken", "case", "caught"),
    [
        (_no_maximum, "values around 2", {"out, scores shifted", "lse, scores shifted"}),
        (_padding_comes_first, "key bias", {"out, keys permuted", "lse, keys permuted"}),
        (_added, "values around 2", {"out, v x 8"}),
        (_by_batch, HEADS, {"out, alone", "lse, alone"}),
    ],
)
def test_only_the_invariance_catches_it(broken: Operator, case: str, caught: set[str]) -> None:
    chosen = _case(case, grads=(), bias=())
    assert not _failed(conformance.check(SPEC, chosen, torch.float32, operator=broken))
    assert _failed(conformance.check_invariances(SPEC, chosen, torch.float32, operator=broken)) == caught
    assert not _failed(conformance.check_invariances(SPEC, chosen, torch.float32, operator=ops.attention))


def test_an_invariance_is_judged_on_those_who_promise_it() -> None:
    promised = dataclasses.replace(SPEC, invariances=tuple(change for change in SPEC.invariances if change.backends))
    assert {change.backends for change in promised.invariances} == {("triton",)}
    assert not conformance.check_invariances(promised, _case(HEADS), torch.float32, backends=["torch"])
    assert not conformance.check_invariances(SPEC, _case("one token"), torch.float32)


# --- full precision


@contextmanager
def _allow_tf32(switch: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    general, own = torch.backends.fp32_precision, matmul.fp32_precision
    try:
        if switch == "general":
            torch.backends.fp32_precision = "tf32"
        elif switch == "own":
            matmul.fp32_precision = "tf32"
        else:
            matmul.allow_tf32 = True
        yield
    finally:
        if switch == "old":
            matmul.allow_tf32 = False
        torch.backends.fp32_precision, matmul.fp32_precision = general, own


@pytest.mark.parametrize("switch", ["general", "own", "old"])
def test_tf32_does_not_reach_what_is_judged(switch: str) -> None:
    """Whichever switch has allowed it, products are in full precision inside, and the switch says what it said afterwards."""
    matmul, seen = torch.backends.cuda.matmul, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(matmul.fp32_precision)
        return ops.attention(*args, **kwargs)

    with _allow_tf32(switch):
        spec = dataclasses.replace(SPEC, naive=lambda *args, **kwargs: watched(*args, **kwargs))
        assert not _failed(conformance.check(spec, _case("values around 2"), torch.float32, operator=watched))
        assert not _failed(conformance.check_invariances(spec, _case("values around 2"), torch.float32, operator=watched))
        assert set(seen) <= {"ieee", "none"}
        assert matmul.fp32_precision == "tf32"
        if switch == "general":
            torch.backends.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee", "the general switch must go on to reach it"
        if switch == "old":
            assert matmul.allow_tf32
