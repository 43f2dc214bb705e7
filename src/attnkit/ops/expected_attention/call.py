"""The prepared call that the backends of expected attention judge and run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_choice, check_dtype, check_same, dims
from attnkit._core.errors import InputError, OptionError, ShapeError, UnsupportedError

__all__ = ["VALUE_NORMS", "ExpectedCall", "prepare"]

VALUE_NORMS = ("l2", "output", "none")


@dataclass
class ExpectedCall:
    """Checked arguments of `expected_attention_scores`.

    Attributes:
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv].
        mean, cov: [B, H, D] and [B, H, D, D] or None, in the accumulation dtype.
        gram: [H, Dv, Dv] in the accumulation dtype where norms are those of outputs.
        valid: [B, S, Hkv or 1] bool, or None where every key is there.
        scale, eps, sinks: as given.
        norm: one of `VALUE_NORMS`.
    """

    k: Tensor
    v: Tensor
    mean: Tensor
    cov: Tensor | None
    gram: Tensor | None
    valid: Tensor | None
    scale: float
    eps: float
    norm: str
    sinks: int


def prepare(
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    cov: Tensor | None,
    *,
    scale: float | None = None,
    eps: float = 0.0,
    value_norm: str = "l2",
    output_gram: Tensor | None = None,
    valid: Tensor | None = None,
    sinks: int = 4,
) -> ExpectedCall:
    """Check the arguments of `expected_attention_scores` (its docstring says what is raised)."""
    given: dict[str, tuple[Tensor, str]] = {"k": (k, "B S Hkv D"), "v": (v, "B S Hkv Dv"), "mean": (mean, "B H D")}
    if cov is not None:
        given["cov"] = (cov, "B H D D")
    if output_gram is not None:
        given["output_gram"] = (output_gram, "H Dv Dv")
    sizes = dims(**given)
    if valid is not None:
        dims(k=given["k"], valid=(valid, "B S" if valid.dim() == 2 else "B S Hkv"))
    heads, kv_heads = sizes["H"], sizes["Hkv"]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"mean has {heads} heads and k has {kv_heads}; H must be a multiple of Hkv, and neither is 0")
    if sizes["D"] == 0:
        raise ShapeError("k has heads of width 0")
    check_choice("value_norm", value_norm, VALUE_NORMS)
    if (output_gram is not None) != (value_norm == "output"):
        raise OptionError('output_gram goes with value_norm="output", and value_norm="output" needs it')
    if not eps >= 0 or math.isinf(eps):
        raise OptionError(f"eps={eps} is not allowed; give a number that is not negative")
    if sinks < 0:
        raise OptionError(f"sinks={sinks} is below 0")
    _check_kinds(k, v, mean, cov, output_gram, valid)
    if valid is not None and valid.dim() == 2:
        valid = valid[:, :, None]
    own = sizes["D"] ** -0.5 if scale is None else scale
    return ExpectedCall(k, v, mean, cov, output_gram, valid, float(own), float(eps), value_norm, int(sinks))


def _check_kinds(k: Tensor, v: Tensor, mean: Tensor, cov: Tensor | None, gram: Tensor | None, valid: Tensor | None) -> None:
    check_dtype("k", k, *FLOATS)
    check_same(k=k, v=v)
    wide = {name: t for name, t in (("mean", mean), ("cov", cov), ("output_gram", gram)) if t is not None}
    for name, tensor in wide.items():
        check_dtype(name, tensor, accumulator_dtype(k.dtype))
    if valid is not None:
        check_dtype("valid", valid, torch.bool)
    for name, other in (*wide.items(), ("valid", valid)):
        if other is not None and other.device != k.device:
            raise InputError(f"{name} is on {other.device} but k is on {k.device}; move one of them")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (k, v, *wide.values())):
        raise UnsupportedError("expected attention has no gradients; call it under torch.no_grad()")
