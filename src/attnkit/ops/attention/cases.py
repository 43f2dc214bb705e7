"""The conformance cases of the attention operators."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.opspec import Case
from attnkit.ops.attention.call import STABLE

__all__ = ["CASES", "SPARSE_CASES"]

Make = Callable[[torch.Generator], dict[str, Any]]


def _qkv(
    generator: torch.Generator, batch: int, num_q: int, num_k: int, heads: int, kv_heads: int, width: int, width_v: int
) -> dict[str, Any]:
    shapes = {"q": (num_q, heads, width), "k": (num_k, kv_heads, width), "v": (num_k, kv_heads, width_v)}
    return {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}


def _dense(
    num_q: int,
    num_k: int | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 32,
    width_v: int | None = None,
    batch: int = 1,
    sinks: bool = False,
    bias: str = "",
    lse: bool = True,
    **options: Any,
) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        keys = num_q if num_k is None else num_k
        inputs = _qkv(generator, batch, num_q, keys, *heads, width, width_v or width)
        if sinks:
            inputs["sinks"] = torch.randn(heads[0], generator=generator)
        if bias:
            shape = (batch, keys, heads[1]) if bias == "per head" else (batch, keys)
            inputs["key_bias"] = torch.randn(*shape, generator=generator)
            inputs["key_bias"][:, : keys // 3] = -torch.inf
            if bias == "all masked":
                inputs["key_bias"][0] = -torch.inf
        if lse:
            inputs["return_lse"] = True
        return inputs | options

    return make


def _packed(
    lengths_q: list[int], lengths_k: list[int] | None = None, *, heads: tuple[int, int] = (2, 1), **options: Any
) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        lengths = (lengths_q, lengths_k or lengths_q)
        inputs = _qkv(generator, 1, sum(lengths[0]), sum(lengths[1]), *heads, 32, 32)
        boundaries = (torch.tensor([0, *part]).cumsum(0).int() for part in lengths)
        inputs = {name: t[0] for name, t in inputs.items()} | dict(
            zip(("cu_seqlens_q", "cu_seqlens_k"), boundaries, strict=True)
        )
        return inputs | {"return_lse": True} | options

    return make


def _strided(generator: torch.Generator) -> dict[str, Any]:
    """Heads before tokens in memory, as Hugging Face models hold them."""
    inputs = _qkv(generator, 2, 65, 65, 4, 2, 32, 32)
    return {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in inputs.items()} | {
        "causal": True,
        "return_lse": True,
    }


def _large(generator: torch.Generator) -> dict[str, Any]:
    """Scores of 1e4: the softmax is one-hot and nothing may overflow.

    Outputs only: a backward pass that starts from the LSE in float32 knows scores of 1e4 to 5e-4, and so probabilities.
    """
    inputs = _qkv(generator, 1, 65, 65, 2, 2, 32, 32)
    inputs["q"] *= 1e4 / 32**0.5
    return inputs | {"causal": True, "return_lse": True}


def _biased(generator: torch.Generator, **options: Any) -> dict[str, Any]:
    """Values far from zero mean: an inconsistent normaliser shows here as a signed error."""
    inputs = _qkv(generator, 2, 127, 192, 4, 2, 64, 64)
    inputs["v"] = 2 + 0.4 * inputs["v"]
    return inputs | {"return_lse": True} | options


def _ties(generator: torch.Generator, **options: Any) -> dict[str, Any]:
    """Keys that repeat within and across tiles, so that rows share their maximum, above, at and below 0; values around -2."""
    inputs = _qkv(generator, 2, 65, 200, 4, 2, 32, 32)
    inputs["k"] = inputs["k"][:, torch.arange(200) % 7]
    inputs["q"][:, ::3] = 0
    inputs["q"][:, 1::3] *= 8
    inputs["v"] = 0.6 * inputs["v"] - 2
    return inputs | {"return_lse": True} | options


def _peaks(generator: torch.Generator, *, ones: int, mean: float, **options: Any) -> dict[str, Any]:
    """A row's maximum, 4, is shared by `ones` keys, the others lie 12 to 20 below; values have one sign.

    Their sum then sits on a rounding tie as often as not, and what the others add decides, always the same way, unless a
    kernel rounds once, after the division, and divides by the sum of the probabilities that it has multiplied.
    """
    width, heads = 32, 8
    row = torch.arange(width)
    q = -8 - 8 * torch.rand(1, width, heads, width, generator=generator)
    q[0, row, :, row] = 4
    k = torch.eye(width).repeat_interleave(ones, 0)[None, :, None].expand(1, width * ones, heads, width)
    v = mean + 0.6 * torch.randn(1, width * ones, heads, 64, generator=generator)
    return {"q": q, "k": k.contiguous(), "v": v, "scale": 1.0, "return_lse": True} | options


def _outlier(generator: torch.Generator) -> dict[str, Any]:
    """Every query scores one key about 70 above the others. Outputs only, as in `_large`."""
    inputs = _qkv(generator, 1, 65, 65, 2, 2, 32, 32)
    inputs["q"][..., 0] = 4
    inputs["k"][:, 5, :, 0] = 100
    return inputs | {"return_lse": True}


def _sizes(generator: torch.Generator, sizes: Tensor) -> dict[str, Any]:
    """Each column of the values has a size of its own."""
    inputs = _qkv(generator, 1, 65, 65, 2, 2, 32, 32)
    inputs["v"] *= sizes
    return inputs | {"causal": True, "return_lse": True}


def _padding(generator: torch.Generator) -> dict[str, Any]:
    """Masked keys that hold NaN must not be felt."""
    inputs = _dense(65, heads=(4, 2), batch=2, bias="shared", causal=True)(generator)
    hidden = torch.isneginf(inputs["key_bias"])
    for name in ("k", "v"):
        inputs[name][hidden] = torch.nan
    return inputs


QKV = ("q", "k", "v")
_HALVES = (torch.bfloat16, torch.float16)
# every kind of width with every size of a group and an odd length; packed sequences of mixed lengths, empty ones included
_WIDTHS = (16, 24, 32, 40, 48, 64, 72, 96, 104, 112, 128, 160, 192, 224, 256)
_GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
_LENGTHS = (63, 97, 129, 31, 191, 255, 65)
_MIXES = (
    ([1, 2, 3, 5, 7], [1, 2, 3, 5, 7]),
    ([64, 0, 128, 1], [64, 3, 128, 0]),
    ([0, 0, 97], [5, 0, 97]),
    ([33, 31, 65, 17, 1, 129], [40, 31, 70, 90, 1, 129]),
)
_SWEEP = (
    *(
        Case(f"width {width}, groups of {group}, {length} tokens",
             _dense(length, heads=(group, 1), width=width, causal=True, lse=bool(index % 2)), QKV, level="full")
        for index, width in enumerate(_WIDTHS)
        for group, length in [(_GROUPS[index % 8], _LENGTHS[index % 7])]
    ),
    *(
        Case(f"packed mix {index}", _packed(*mix, heads=(4, 2), causal=causal), QKV, level="full")
        for index, (mix, causal) in enumerate(zip(_MIXES * 2, (True,) * 4 + (False,) * 4, strict=True))
    ),
)  # fmt: skip
CASES = (
    Case("one token", _dense(1, causal=True), QKV),
    Case("63 tokens, no lse", _dense(63, causal=True, lse=False), QKV),
    Case("causal, grouped heads", _dense(127, heads=(6, 2), batch=2, causal=True), QKV),
    Case("dense, one key head", _dense(65, 130, heads=(4, 1)), QKV),
    Case("causal, fewer queries than keys", _dense(33, 333, heads=(4, 2), causal=True), QKV),
    Case("causal, more queries than keys", _dense(300, 65, causal=True), QKV),
    Case("several tiles", _dense(700, width=16, causal=True), QKV),
    Case("one query on many keys", _dense(1, 700, heads=(8, 2), width=64, causal=True), QKV),
    Case("window", _dense(333, causal=True, window_size=(64, 0)), QKV),
    Case("two-sided window", _dense(300, 333, window_size=(17, 40)), QKV),
    Case("softcap", _dense(129, causal=True, softcap=2.0), QKV),
    Case("softcap of 50", _dense(65, causal=True, softcap=50.0), QKV),
    Case("sinks", _dense(129, heads=(4, 2), causal=True, sinks=True), (*QKV, "sinks")),
    Case("sinks, window, softcap", _dense(300, causal=True, sinks=True, window_size=(20, 0), softcap=5.0), (*QKV, "sinks")),
    Case("key bias", _dense(127, 200, heads=(4, 2), batch=2, bias="shared"), (*QKV, "key_bias")),
    Case("key bias per head, causal", _dense(127, heads=(4, 2), bias="per head", causal=True), (*QKV, "key_bias")),
    Case("rows that see nothing", _dense(65, batch=2, bias="all masked", causal=True), QKV),
    Case("NaN under the mask", _padding, ("q",)),
    Case("values wider than keys", _dense(65, width=32, width_v=80, causal=True), QKV),
    Case("values narrower than keys", _dense(65, width=96, width_v=64), QKV),
    Case("width 256", _dense(65, width=256, causal=True), QKV),
    Case("width 80", _dense(65, width=80, causal=True), QKV),
    Case("heads first in memory", _strided, QKV),
    Case("packed", _packed([63, 1, 130], causal=True), QKV),
    Case("packed, empty sequences, T != S", _packed([5, 0, 64, 7], [9, 12, 64, 0], causal=True, window_size=(20, None)), QKV),
    Case("scores of 1e4", _large),
    Case("one key far above the others", _outlier),
    Case("values of many sizes", partial(_sizes, sizes=torch.exp2(-(torch.arange(32.0) % 24)))),
    Case("values below float32's normal range", partial(_sizes, sizes=torch.tensor(2.0**-130))),
    Case("values around 2", _biased, QKV, bias=FLOATS),
    Case("values around 2, stable: delta", partial(_biased, stable="delta"), QKV, bias=FLOATS),
    Case("tied maxima", _ties, QKV),
    *(Case(f"tied maxima, stable: {mode}", partial(_ties, causal=True, stable=mode), QKV) for mode in STABLE[1:]),
    # no gradients where they start from the rounded output: that is what the other modes are for (test_stable.py)
    *(
        Case(
            f"two maxima far above the rest, stable: {mode}",
            partial(_peaks, ones=2, mean=-2.0, stable=mode),
            QKV if mode in ("delta", "exact_delta") else (),
            bias=_HALVES,
            biased=("reference",),
        )
        for mode in STABLE
    ),
    Case(
        "eight maxima far above the rest", partial(_peaks, ones=8, mean=2.0), level="full", bias=_HALVES, biased=("reference",)
    ),
    *(
        Case(
            f"sinks, window, softcap, stable: {mode}",
            _dense(130, heads=(4, 2), causal=True, sinks=True, window_size=(40, 0), softcap=5.0, stable=mode),
            (*QKV, "sinks"),
            level="full",
        )
        for mode in STABLE[1:]
    ),
    *(
        Case(f"3 queries on many keys, stable: {mode}", _dense(3, 700, heads=(8, 2), width=64, stable=mode), QKV, level="full")
        for mode in STABLE[1:]
    ),
    Case("packed, stable: exact_delta", _packed([63, 1, 130], causal=True, stable="exact_delta"), QKV, level="full"),
    # without the LSE torch's fused kernels would take these calls, were they not refused for what they cannot do
    Case("window, no lse", _dense(333, causal=True, window_size=(64, 0), lse=False), QKV),
    Case("two-sided window, no lse", _dense(130, 150, window_size=(17, 40), lse=False), QKV),
    Case("right side of a window, no lse", _dense(130, window_size=(None, 5), lse=False), QKV),
    Case("causal, fewer queries than keys, no lse", _dense(33, 150, heads=(4, 2), causal=True, lse=False), QKV),
    Case("causal, more queries than keys, no lse", _dense(150, 65, causal=True, lse=False), QKV),
    Case("softcap, no lse", _dense(65, causal=True, softcap=2.0, lse=False), QKV),
    Case("sinks, no lse", _dense(65, heads=(4, 2), causal=True, sinks=True, lse=False), (*QKV, "sinks")),
    Case("key bias, no lse", _dense(65, heads=(4, 2), batch=2, bias="shared", lse=False), (*QKV, "key_bias")),
    Case("values wider than keys, no lse", _dense(65, width=32, width_v=80, causal=True, lse=False), QKV),
    Case("one query on many keys, no lse", _dense(1, 300, heads=(8, 2), width=64, causal=True, lse=False), QKV),
    Case("no keys, no lse", _dense(7, 0, lse=False), QKV),
    Case("no queries", _dense(0, 7, causal=True), QKV),
    Case("no keys", _dense(7, 0), QKV),
    Case("empty batch", _dense(5, batch=0, causal=True), QKV),
    Case("float32 results", _dense(65, causal=True, out_dtype=torch.float32), QKV, level="full"),
    Case("2,048 tokens", _dense(2048, heads=(4, 2), width=64, causal=True), QKV, level="full"),
    Case("packed, 2,048 rows", _packed([1000, 48, 1000], heads=(4, 2), causal=True), QKV, level="full"),
    *_SWEEP,
)


def _positions(batched: bool, **options: Any) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        inputs = _qkv(generator, 2, 33, 333, 4, 2, 32, 32)
        pos = torch.randint(0, 333, (2, 33) if batched else (33,), generator=generator)
        return inputs | {"q_pos": pos.int() if batched else pos.sort().values, "return_lse": True} | options

    return make


def _packed_positions(lengths_q: list[int], lengths_k: list[int], **options: Any) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        inputs = _packed(lengths_q, lengths_k, **options)(generator)
        starts = inputs["cu_seqlens_k"].tolist()
        parts = [  # from one before the first key to the last
            torch.randint(start - 1, start + keys, (rows,), generator=generator).sort().values
            for rows, keys, start in zip(lengths_q, lengths_k, starts, strict=False)
        ]
        return inputs | {"q_pos": torch.cat(parts).clamp(min=-1).int()}

    return make


SPARSE_CASES = (
    Case("sorted positions", _positions(False), QKV),
    Case("positions by batch element, in any order", _positions(True), QKV),
    Case("with a window", _positions(True, window_size=(50, 0)), QKV),
    Case("softcap", _positions(False, softcap=3.0), QKV),
    Case("no lse", _positions(False, return_lse=False), QKV),
    Case("packed, sorted positions", _packed_positions([70, 0, 9, 130], [150, 5, 0, 64], heads=(4, 2)), QKV),
    Case("packed, one head, a window", _packed_positions([65, 33], [40, 150], heads=(1, 1), window_size=(20, 0)), QKV),
)
