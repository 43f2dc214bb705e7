"""Codecs of pages: bounds of what a round trip loses, bytes, refusals."""

import math

import pytest
import torch
from torch import Tensor

from attnkit import errors, ops
from attnkit.kv import FP8, Codec, IntN, Raw

CODECS = (IntN(8), IntN(4), FP8())
SHAPE = (3, 2, 64)


def _states(kind: str, width: int) -> Tensor:
    x = torch.randn(*SHAPE, width)
    changes = {
        "plain": lambda: x,
        "far from 0": lambda: x * 0.01 + 1000,
        "channels of their own size": lambda: x * torch.logspace(-4, 3, width),
        "tiny": lambda: x * 1e-6,
        "constant": lambda: torch.full_like(x, -3.7),
        "zero": lambda: torch.zeros_like(x),
    }
    return changes[kind]()


def _rows(scale: Tensor, dim: int) -> Tensor:
    return scale.unsqueeze(dim).double()


@pytest.mark.parametrize("kind", ["plain", "far from 0", "channels of their own size", "tiny", "constant", "zero"])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_round_trip_stays_within_its_bound(codec: Codec, kind: str) -> None:
    keys, values = _states(kind, 32), _states(kind, 48)
    parts = codec.encode(keys, values)
    for before, after, scale in zip(
        (keys, values),
        codec.decode(parts, torch.float64),
        (_rows(parts["key_scale"], -2), _rows(parts["value_scale"], -1)),
        strict=True,
    ):
        before = before.double()
        bound = torch.maximum(before.abs() / 16, scale * 2.0**-10) if isinstance(codec, FP8) else scale / 2
        assert bool(((after - before).abs() <= bound * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "far from 0", "tiny"])
def test_scales_are_no_wider_than_the_range(bits: int, kind: str) -> None:
    keys = _states(kind, 32)
    low, high = (t.double() for t in keys.aminmax(dim=-2))
    scale = IntN(bits).encode(keys, keys)["key_scale"].double()
    zero_lost = 2 * low.abs() * 2.0**-11 + 2.0**-24  # rounding the zero down
    assert bool((scale <= (high - low + zero_lost) / (2**bits - 1) * (1 + 2.0**-9) + 2.0**-23).all())


def test_raw_returns_what_it_got() -> None:
    keys, values = _states("plain", 32), _states("plain", 48)
    found = Raw().decode(Raw().encode(keys, values), torch.float32)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


@pytest.mark.parametrize("codec", [Raw(), *CODECS], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_make_pages(codec: Codec, dtype: torch.dtype) -> None:
    keys, values = (torch.randn(3, codec.page_size, width).to(dtype) for width in (32, 48))
    parts = codec.encode(keys, values)
    table, lengths = torch.tensor([[[2, 0, 1]]]).int(), torch.tensor([[3 * codec.page_size]]).int()
    pages = ops.KVPages(table=table, lengths=lengths, **parts)
    found = pages.materialize(torch.float64)
    for mine, theirs in zip(found[:2], codec.decode(parts, torch.float64), strict=True):
        assert torch.equal(mine[0, 0], theirs[[2, 0, 1]].flatten(0, 1))
    used = sum(part.numel() * part.element_size() for part in parts.values())
    assert codec.bytes_per_token(32, 48, dtype) == pytest.approx(used / (3 * codec.page_size))
    out = ops.ragged_decode_attention(torch.randn(1, 1, 2, 32).to(dtype), pages)
    assert out.shape == (1, 1, 2, 48)


def test_pages_that_are_not_full_know_only_their_tokens() -> None:
    keys = torch.randn(5, 32)
    parts = IntN(8).encode(keys, keys)
    assert parts["keys"].shape == (5, 32)
    assert parts["key_scale"].shape == (32,)
    assert parts["value_scale"].shape == (5,)


def test_numbers_that_are_none_do_not_turn_into_numbers() -> None:
    for codec in CODECS:
        keys = torch.randn(16, 32)
        keys[3, 5] = math.nan
        decoded, values = codec.decode(codec.encode(keys, keys), torch.float32)
        assert decoded[:, 5].isnan().all()
        assert values[3].isnan().all()
        assert not decoded[:, :5].isnan().any()


def test_refusals() -> None:
    with pytest.raises(errors.OptionError, match=r"IntN\(bits=3\) is not there; choose bits=8"):
        IntN(3)
    for codec in (Raw, IntN, FP8):
        with pytest.raises(errors.OptionError, match="page_size=48 is not allowed; choose one of 16, 32, 64, 128"):
            codec(page_size=48)
    with pytest.raises(errors.OptionError, match="width 15 is odd; use bits=8"):
        IntN(4).encode(torch.randn(16, 15), torch.randn(16, 16))
