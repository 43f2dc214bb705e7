"""The private torch operators behind `query_moments`: schema, fake, implementations; there is no gradient."""

from typing import Any

from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.library import define
from attnkit.ops.query_moments import tokens

__all__ = ["run_torch", "run_triton"]

_INPUTS = "Tensor q, Tensor? inv_freq, Tensor? positions, bool interleaved, Tensor? real, Tensor? skip, Tensor? shift"


def _triton(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from attnkit.ops.query_moments._triton import launch  # Triton loads when a kernel runs

    with current(q.device):
        return launch.moments(q, *arguments)


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, width = q.shape
    kind = accumulator_dtype(q.dtype)
    shapes = ((batch,), (batch, heads, width), (batch, heads, width, width))
    count, sums, products = (q.new_empty(shape, dtype=kind) for shape in shapes)
    return count, sums, products


run_torch = define(f"query_moments({_INPUTS}) -> (Tensor, Tensor, Tensor)", tokens.moments, _fake)
run_triton = define(f"query_moments_triton({_INPUTS}) -> (Tensor, Tensor, Tensor)", _triton, _fake)
