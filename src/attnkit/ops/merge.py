"""Merging attention results that share queries but not keys."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype, dims
from attnkit._core.dispatch import Backend, choose, only_when_named
from attnkit._core.errors import ShapeError
from attnkit._core.invariance import alone, permuted, scaled
from attnkit._core.library import define, define_gradient
from attnkit._core.opspec import Case, OpSpec, Refusal

__all__ = ["SPEC", "SPECS", "merge_partials"]


@dataclass
class MergeCall:
    """Checked arguments of `merge_partials`."""

    outs: Tensor
    lses: Tensor


def merge_partials(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Turn attention over P disjoint key sets into attention over their union.

    lse = log sum_p exp(lses[p]);  out = sum_p exp(lses[p] - lse) * outs[p]

    Args:
        outs: [P, B, T, H, D] (packed [P, R, H, D]), each part normalised over its own keys; P >= 1.
        lses: [P, B, T, H] (packed [P, R, H]), natural logarithm, float32 (float64 with float64 outs); -inf where a part
            saw no key.
        backend: "auto", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, D] in outs' dtype and lse [B, T, H]; 0 and -inf where no part saw a key. Gradients flow through both.
    Raises:
        ShapeError: a rank or size disagrees, or there is no part.
        DTypeError: lses is not in the accumulation dtype of outs.
        BackendUnavailable: the named backend refuses.
    Complexity: one pass over outs.
    Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), the associative form of softmax.

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    >>> halves = [ops.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 2), slice(2, 6))]
    >>> out, lse = ops.merge_partials(*(torch.stack(x) for x in zip(*halves)))
    >>> torch.allclose(out, ops.attention(q, k, v), atol=1e-6)
    True
    """
    call = _prepare(outs, lses)
    out, lse = choose("merge_partials", BACKENDS, backend, call).run(call)
    return out, lse


def _prepare(outs: Tensor, lses: Tensor) -> MergeCall:
    rows = "R" if outs.dim() == 4 else "B T"
    sizes = dims(outs=(outs, f"P {rows} H D"), lses=(lses, f"P {rows} H"))
    check_dtype("outs", outs, *FLOATS)
    check_dtype("lses", lses, accumulator_dtype(outs.dtype))
    if sizes["P"] == 0:
        raise ShapeError("outs has no part (P = 0); give at least one")
    return MergeCall(outs, lses)


def _shares(lses: Tensor) -> tuple[Tensor, Tensor]:
    """Each part's share of the union, [P, ..., 1], 0 where nothing was seen, and the union's LSE."""
    top = lses.amax(0)
    top = top.masked_fill(torch.isneginf(top), 0)
    mass = torch.exp(lses - top)
    total = mass.sum(0)
    return (mass / total.masked_fill(total == 0, 1))[..., None], top + torch.log(total)


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    shares, lse = _shares(lses)
    kept = outs.masked_fill(torch.isneginf(lses)[..., None], 0)  # a part that saw nothing may hold anything
    return (shares * kept).sum(0).to(outs.dtype), lse


def _merge_backward(d_out: Tensor, d_lse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    shares, _ = _shares(lses)
    kept = outs.masked_fill(torch.isneginf(lses)[..., None], 0).to(lses.dtype)
    centred = kept - (shares * kept).sum(0)  # against the union before rounding
    return (shares * d_out).to(outs.dtype), shares[..., 0] * ((centred * d_out).sum(-1) + d_lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _backward_op(d_out, d_lse, *ctx.saved_tensors)
    return grads


def _fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _backward_fake(d_out: Tensor, d_lse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


_merge_op = define("merge_partials(Tensor outs, Tensor lses) -> (Tensor, Tensor)", _merge, _fake)
_backward_op = define(
    "merge_partials_backward(Tensor d_out, Tensor d_lse, Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    _merge_backward,
    _backward_fake,
)
define_gradient("merge_partials", _save, _gradient)


def _torch(call: MergeCall) -> tuple[Tensor, Tensor]:
    out, lse = _merge_op(call.outs, call.lses)
    return out, lse


def _reference(call: MergeCall) -> tuple[Tensor, Tensor]:
    """The same formula through autograd, each exponential written out."""
    seen = ~torch.isneginf(call.lses)
    top = call.lses.detach().amax(0).masked_fill(~seen.any(0), 0)
    mass = torch.exp(call.lses.masked_fill(~seen, 0) - top) * seen
    total = mass.sum(0)
    share = mass / total.masked_fill(~seen.any(0), 1)
    out = (share[..., None] * call.outs.masked_fill(~seen[..., None], 0)).sum(0).to(call.outs.dtype)
    return out, (top + torch.log(total.masked_fill(~seen.any(0), 1))).masked_fill(~seen.any(0), -torch.inf)


BACKENDS: tuple[Backend[MergeCall], ...] = (
    Backend("torch", _torch, lambda call: []),
    Backend("reference", _reference, lambda call: [], avoids=only_when_named),
)


def _case(parts: int, rows: tuple[int, ...], heads: int, width: int, *, hidden: bool = False) -> Any:
    def make(generator: torch.Generator) -> dict[str, Any]:
        outs = torch.randn(parts, *rows, heads, width, generator=generator) + 2
        lses = 3 * torch.randn(parts, *rows, heads, generator=generator)
        if hidden:
            lses[0] = -torch.inf
            lses[:, ..., 0] = -torch.inf
            outs[0] = torch.nan
        return {"outs": outs, "lses": lses}

    return make


def _outputs(outs: Tensor, lses: Tensor) -> tuple[Tensor, ...]:
    return _reference(_prepare(outs, lses))


def _row_scale(outs: Tensor, lses: Tensor) -> Tensor:
    return _outputs(outs.abs(), lses)[0]


SPEC = OpSpec(
    name="merge_partials",
    summary="merge attention over disjoint key sets by their log-sum-exps",
    source="Milakov & Gimelshein 2018 (arXiv:1805.02867)",
    function=merge_partials,
    outputs=("out", "lse"),
    cases=(
        Case("two parts", _case(2, (2, 33), 3, 32), ("outs", "lses"), ("lses",), bias=FLOATS),
        Case("packed, five parts", _case(5, (65,), 2, 64), ("outs", "lses"), ("lses",)),
        Case("one part", _case(1, (1, 7), 2, 16), ("outs", "lses"), ("lses",)),
        Case("parts and rows that saw nothing", _case(3, (1, 17), 4, 16, hidden=True), ("lses",), ("lses",)),
        Case("empty batch", _case(2, (0, 5), 2, 16), ("outs", "lses"), ("lses",)),
    ),
    oracle=_outputs,
    naive=_outputs,
    prepare=_prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=("O_out", "grad_out"),
    row_scale=_row_scale,
    invariances=(
        permuted("parts", {"outs": 0, "lses": 0}, ("packed, five parts",)),
        scaled("outs", ("two parts",)),
        alone({"outs": 1, "lses": 1}, ("two parts",), ("torch",)),
    ),
    capabilities={
        "cpu": "yes",
        "cuda": "yes",
        "backward": "yes",
        "packed": "yes",
        "grouped heads": "not applicable",
        "compile": "yes",
    },
    refusals=(Refusal("P = 0", "there is nothing to merge"),),
)
SPECS = (SPEC,)
