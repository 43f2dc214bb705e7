"""The conformance cases of ragged decode attention: tensors under the names of `KVPages`, fp8 codes as bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.opspec import Case
from attnkit.ops.ragged_decode.codes import FP8, pack4
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["CASES", "FIXED", "arguments"]

Inputs = dict[str, Any]
Make = Callable[[torch.Generator], Inputs]
NAMES = tuple(KVPages.__dataclass_fields__)
SCALES = ("key_scale", "key_zero", "value_scale", "value_zero")
FIXED = (*SCALES, "bias", "tail_bias")
UNUSED = 1 << 30  # a page that does not exist, where nobody may look
HALVES = (torch.float16, torch.bfloat16)


def arguments(inputs: Inputs) -> Inputs:
    """A case's inputs -> the operator's arguments."""
    parts = {name: value for name, value in inputs.items() if name in NAMES}
    parts |= {name: parts[name].half() for name in SCALES if name in parts}
    if inputs.get("code") == "fp8":
        parts |= {name: parts[name].view(FP8) for name in ("keys", "values")}
    return {"pages": KVPages(**parts)} | {name: inputs[name] for name in inputs if name not in (*NAMES, "code")}


def _case(
    lengths: list[list[int]],
    *,
    page: int = 16,
    group: int = 2,
    queries: int = 1,
    width: int = 32,
    width_v: int | None = None,
    tail: list[list[int]] | None = None,
    code: str = "raw",
    biased: bool = False,
    sinks: bool = False,
    mean: float = 0.0,
    **options: Any,
) -> Make:
    """`lengths` and `tail`: tokens of each batch row's heads. What nobody may read holds NaN, or codes at their largest."""

    def make(generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        counts, widths = torch.tensor(lengths).int(), (width, width_v or width)
        heads = counts.shape[1] if counts.numel() else len(lengths[0]) if lengths else 2
        counts = counts.reshape(len(lengths), heads)
        num = -(-counts // page)
        most = int(num.max()) if num.numel() else 0
        pool = int(num.sum()) + (2 if most else 0)
        used = torch.arange(most) < num[..., None]
        table = torch.full(used.shape, UNUSED, dtype=torch.int32)
        table[used] = torch.randperm(pool, generator=generator)[: int(num.sum())].int()
        inputs: Inputs = {"q": normal(len(lengths), queries, heads * group, width), "table": table, "lengths": counts}
        inputs |= {"return_lse": True} | options
        owned = torch.zeros(pool, page, dtype=torch.bool)
        owned[table[used].long()] = (torch.arange(most * page) < counts[..., None]).unflatten(-1, (most, page))[used]
        inputs |= _pool(code, normal(pool, page, widths[0]), normal(pool, page, widths[1]) + mean, owned, generator)
        if tail is not None:
            inputs["tail_lengths"] = torch.tensor(tail).int()
            longest = int(inputs["tail_lengths"].max()) + 3
            beyond = (torch.arange(longest) >= inputs["tail_lengths"][..., None])[..., None]
            for name, size in zip(("tail_keys", "tail_values"), widths, strict=True):
                inputs[name] = normal(len(lengths), heads, longest, size).masked_fill(beyond, torch.nan)
        if biased:
            _add_bias(inputs, normal)
        if sinks:
            inputs["sinks"] = normal(heads * group)
        return inputs

    return make


def _pool(code: str, keys: Tensor, values: Tensor, owned: Tensor, generator: torch.Generator) -> Inputs:
    """Pages of which `owned` [N, P] tokens may be read."""
    if code == "raw":
        return {name: x.masked_fill(~owned[..., None], torch.nan) for name, x in (("keys", keys), ("values", values))}
    top = 15 if code == "int4" else 255
    found: Inputs = {"code": code}
    for name, x in (("key", keys), ("value", values)):
        # fp8: every number but NaN, which is 127 of 128 positive codes
        codes = torch.randint(0, top + 1, x.shape, generator=generator)
        codes = codes % 127 + 128 * (codes > 127) if code == "fp8" else codes
        codes = codes.masked_fill(~owned[..., None], 126 if code == "fp8" else top).to(torch.uint8)
        found[f"{name}s"] = pack4(codes) if code == "int4" else codes
        shape = (x.shape[0], x.shape[2]) if name == "key" else x.shape[:2]
        size = 2 * torch.rand(shape, generator=generator) + 1
        found[f"{name}_scale"] = (size / (448 if code == "fp8" else top)).half().float()
        if code != "fp8":
            found[f"{name}_zero"] = (torch.randn(shape, generator=generator) - size / 2).half().float()
    for name in ("value_scale", "value_zero"):
        if name in found:
            found[name] = found[name].masked_fill(~owned, torch.nan)
    return found


def _add_bias(inputs: Inputs, normal: Callable[..., Tensor]) -> None:
    """Biases of which some mask a token, which then holds NaN, of those that are stored as they are."""
    for name, values in (("bias", "values"), ("tail_bias", "tail_values")):
        if values in inputs:
            bias = normal(*inputs[values].shape[:-1])
            hidden = bias > 0.9
            inputs[name] = bias.masked_fill(hidden, -torch.inf)
            if inputs[values].is_floating_point():
                for part in (values, values.replace("values", "keys")):
                    inputs[part] = inputs[part].masked_fill(hidden[..., None], torch.nan)


def _named(name: str, make: Make, **more: Any) -> Case:
    return Case(name, make, fixed=FIXED, **more)


RAGGED = [[70, 5], [16, 33]]
CASES = (
    _named("pages of 16, grouped heads", _case(RAGGED)),
    _named("pages of 64, five queries", _case([[100, 64], [1, 130]], page=64, group=3, queries=5)),
    _named("empty heads and a giant one", _case([[0, 1100], [0, 0]], width=16)),
    _named("width 80, values of 48", _case(RAGGED, width=80, width_v=48, queries=2)),
    _named("pages and tail", _case(RAGGED, tail=[[3, 0], [20, 7]], page=32, queries=3)),
    _named("tail alone", _case([[0, 0], [0, 0]], tail=[[3, 0], [20, 7]])),
    _named("bias that masks, tail", _case(RAGGED, tail=[[3, 0], [20, 7]], biased=True)),
    _named("sinks, softcap, empty heads", _case([[0, 40]], sinks=True, softcap=2.0, group=4)),
    _named("values around 2", _case([[300, 190], [200, 256]], mean=2.0, width=64, queries=4), bias=HALVES),
    _named("8 bits", _case([[100, 64], [0, 130]], page=64, code="int8")),
    _named("8 bits, pages of 16, tail, bias", _case(RAGGED, code="int8", tail=[[3, 0], [20, 7]], biased=True, queries=3)),
    _named("4 bits", _case([[100, 64], [0, 130]], page=64, code="int4", width=64)),
    _named("4 bits, width 80, values of 48, tail", _case(RAGGED, code="int4", width=80, width_v=48, tail=[[3, 0], [20, 7]])),
    _named("fp8", _case([[100, 64], [0, 130]], page=64, code="fp8")),
    _named("fp8, pages of 32, tail, softcap", _case(RAGGED, page=32, code="fp8", tail=[[3, 0], [20, 7]], softcap=3.0)),
    _named("wide results", _case(RAGGED, out_dtype=torch.float32)),
    _named("no lse", _case(RAGGED, return_lse=False)),
    _named("no queries", _case(RAGGED, queries=0)),
    _named("empty batch", _case([])),
    _named("forty queries of four heads", _case([[700, 90]], group=4, queries=40), level="full"),
    _named("20,000 tokens", _case([[20_000, 3], [9_000, 0]], page=64, group=4, width=128), level="full"),
    _named("20,000 tokens of 4 bits", _case([[20_000, 3]], page=64, group=4, width=128, code="int4"), level="full"),
    _named("width 256, pages of 128, 8 bits", _case([[300, 3]], page=128, width=256, code="int8", group=1), level="full"),
)
