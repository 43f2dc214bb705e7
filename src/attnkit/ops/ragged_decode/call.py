"""The prepared call of ragged decode attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype, dims
from attnkit._core.errors import DTypeError, InputError, OptionError, ShapeError, UnsupportedError
from attnkit.ops.attention.call import check_per_head
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["PAGE_SIZES", "RaggedCall", "prepare"]

PAGE_SIZES = (16, 32, 64, 128)
_PAIRS = (("tail_keys", "tail_values"), ("tail_keys", "tail_lengths"), ("tail_values", "tail_lengths"))


@dataclass
class RaggedCall:
    """Checked arguments.

    Attributes:
        q: [B, T, H, D].
        pages: what every query sees.
        sinks: [H] or None.
    """

    q: Tensor
    pages: KVPages
    scale: float
    softcap: float
    sinks: Tensor | None
    return_lse: bool
    out_dtype: torch.dtype


def prepare(
    q: Tensor,
    pages: KVPages,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> RaggedCall:
    """Check the arguments of `ragged_decode_attention` (its docstring says what is raised)."""
    check_dtype("q", q, *FLOATS)
    _check_present(pages)
    _check_shapes(q, pages)
    _check_dtypes(q, pages)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading values would wait for the device
        _check_values(pages)
    if sinks is not None:
        check_per_head("sinks", sinks, q)
    if softcap is not None and softcap <= 0:
        raise OptionError(f"softcap={softcap} must be positive; leave it out to switch it off")
    out_dtype = out_dtype or q.dtype
    if out_dtype not in (q.dtype, accumulator_dtype(q.dtype)):
        raise OptionError(f"out_dtype={out_dtype} is not allowed; choose {q.dtype} or {accumulator_dtype(q.dtype)}")
    if torch.is_grad_enabled():
        for name, tensor in ({"q": q, "sinks": sinks} | dict(pages.tensors())).items():
            if tensor is not None and tensor.requires_grad:
                raise UnsupportedError(
                    f"{name} requires a gradient, which attention over a cache has none of; use torch.no_grad()"
                )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return RaggedCall(q, pages, scale, softcap or 0.0, sinks, return_lse, out_dtype)


def _check_present(pages: KVPages) -> None:
    """Refuse parts that are missing, and parts that nothing would read."""
    there = pages.tensors()
    for one, other in _PAIRS:
        if (one in there) != (other in there):
            missing, given = (one, other) if other in there else (other, one)
            raise InputError(f"pages.{missing} is missing but pages.{given} is given; a tail needs keys, values and lengths")
    if "tail_bias" in there and "tail_keys" not in there:
        raise InputError("pages.tail_bias is given without a tail; leave it out")
    needed = {"raw": (), "fp8": ("key_scale", "value_scale")}.get(
        pages.code, ("key_scale", "key_zero", "value_scale", "value_zero")
    )
    for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
        if (name in there) != (name in needed):
            what = "leave it out" if name in there else "codes cannot be read without it"
            raise InputError(f"pages.{name} is {'given' if name in there else 'missing'} with {pages.code} pages; {what}")


def _check_shapes(q: Tensor, pages: KVPages) -> None:
    there = pages.tensors()
    packed = pages.code == "int4"
    patterns = {
        "keys": "N P D/2" if packed else "N P D", "values": "N P Dv/2" if packed else "N P Dv", "table": "B Hkv M",
        "lengths": "B Hkv", "tail_keys": "B Hkv L D", "tail_values": "B Hkv L Dv", "tail_lengths": "B Hkv",
        "key_scale": "N D", "key_zero": "N D", "value_scale": "N P", "value_zero": "N P", "bias": "N P",
        "tail_bias": "B Hkv L",
    }  # fmt: skip
    sizes = dims(q=(q, "B T H D"), **{f"pages.{name}": (tensor, patterns[name]) for name, tensor in there.items()})
    if pages.widths[0] != sizes["D"]:
        raise ShapeError(f"q has width {sizes['D']} but pages hold keys of width {pages.widths[0]} ({pages.code})")
    if packed and sizes.get("Dv", pages.widths[1]) != pages.widths[1]:
        raise ShapeError(f"pages.tail_values has width {sizes['Dv']} but pages hold values of width {pages.widths[1]}")
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
        raise ShapeError(
            f"q has {sizes['H']} heads and pages.table has {sizes['Hkv']}; the first must be a multiple of the second"
        )
    if sizes["P"] not in PAGE_SIZES:
        raise ShapeError(f"pages.keys has {sizes['P']} tokens a page; choose one of {', '.join(map(str, PAGE_SIZES))}")


def _check_dtypes(q: Tensor, pages: KVPages) -> None:
    raw = pages.code == "raw"
    for name, tensor in pages.tensors().items():
        if name in ("keys", "values"):
            allowed: tuple[torch.dtype, ...] = (q.dtype,) if raw else (pages.keys.dtype,)
        elif name in ("tail_keys", "tail_values"):
            allowed = (q.dtype,)
        elif name in ("table", "lengths", "tail_lengths"):
            allowed = (torch.int32,)
        elif name in ("bias", "tail_bias"):
            allowed = (accumulator_dtype(q.dtype),)
        else:
            allowed = (torch.float16,)
        if name == "keys" and raw and tensor.dtype != q.dtype:
            raise DTypeError(f"pages.keys is {tensor.dtype}; allowed: q's {q.dtype}, torch.uint8 and torch.float8_e4m3fn")
        check_dtype(f"pages.{name}", tensor, *allowed)
        if tensor.device != q.device:
            raise InputError(f"pages.{name} is on {tensor.device} but q is on {q.device}; move one of them")


def _check_values(pages: KVPages) -> None:
    """Lengths that fit, and pages that exist."""
    most = pages.table.shape[2] * pages.page_size
    limits = {"lengths": (pages.lengths, most)}
    if pages.tail_keys is not None and pages.tail_lengths is not None:
        limits["tail_lengths"] = pages.tail_lengths, pages.tail_keys.shape[2]
    for name, (lengths, limit) in limits.items():
        if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= limit:
            raise OptionError(f"pages.{name} ranges over {int(lengths.min())}..{int(lengths.max())}; allowed: 0..{limit}")
    count = (pages.lengths + pages.page_size - 1) // pages.page_size
    used = torch.arange(pages.table.shape[2]) < count[..., None]
    if bool((used & ((pages.table < 0) | (pages.table >= pages.keys.shape[0]))).any()):
        raise OptionError(f"pages.table names a page outside the pool of {pages.keys.shape[0]}")
