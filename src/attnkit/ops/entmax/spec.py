"""What entmax publishes about itself: cases, oracle, invariances, capabilities, refusals."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import Invariance, alone, permuted
from attnkit._core.opspec import Case, OpSpec, Refusal
from attnkit.ops.entmax.api import entmax
from attnkit.ops.entmax.backends import BACKENDS
from attnkit.ops.entmax.call import prepare
from attnkit.ops.entmax.reference import dense_entmax

__all__ = ["SPEC", "SPECS"]

Make = Callable[[torch.Generator], dict[str, Any]]


def _outputs(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    call = prepare(x, alpha, dim, mask=mask)
    wide = call.rows.to(torch.promote_types(x.dtype, torch.float32))
    prob, _ = dense_entmax(wide, call.alpha if call.alphas is None else call.alphas)
    return (call.restore(prob.to(x.dtype)),)


def _row_scale(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, mask: Tensor | None = None) -> Tensor:
    """p, the size of its logarithm, whose exponential it is, and how far it moves with scores and threshold, both known to a
    rounding error of 1; a little beyond the support too.
    """
    call = prepare(x, alpha, dim, mask=mask)
    own = call.alpha if call.alphas is None else call.alphas
    prob, tau = dense_entmax(call.rows, own)
    if not isinstance(own, Tensor) and own == 1:
        return call.restore(prob)
    r = 1 / (own - 1)
    u = ((own - 1) * call.rows - tau + 1e-4).clamp(min=0)
    return call.restore(prob - torch.special.xlogy(prob, prob) + r * u ** (r - 1) * (u > 0))


def _rows(*shape: int, scale: float = 2.0, **options: Any) -> Make:
    return lambda generator: {"x": scale * torch.randn(*shape, generator=generator)} | options


def _masked(generator: torch.Generator) -> dict[str, Any]:
    """Rows without an entry, with one, and with some."""
    mask = torch.rand(6, 97, generator=generator) < 0.5
    mask[0], mask[1], mask[1, 5] = False, False, True
    return {"x": 2 * torch.randn(2, 6, 97, generator=generator), "mask": mask}


def _equal(generator: torch.Generator) -> dict[str, Any]:
    """Equal scores, two groups of them with the lower one at the threshold, and one score far above all others."""
    x = torch.zeros(4, 130)
    x[1, :4], x[2, 0] = 1.0, 1e4
    x[3] = torch.randn(130, generator=generator)
    return {"x": x}


def _learned(generator: torch.Generator) -> dict[str, Any]:
    """Every head has an alpha of its own."""
    alpha = 1.05 + 0.9 * torch.rand(4, 1, 1, generator=generator)
    return {"x": torch.randn(2, 4, 7, 65, generator=generator), "alpha": alpha}


def _shifted(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"x": inputs["x"] - 16}


CASES = (
    *(Case(f"alpha {alpha:.4g}", _rows(9, 127, alpha=alpha), ("x",)) for alpha in (1.01, 1.1, 1.25, 4 / 3, 1.5, 1.75, 2)),
    Case("alpha 1: softmax", _rows(9, 127, alpha=1), ("x",)),
    Case("flat rows", _rows(5, 1000, scale=0.05), ("x",)),
    Case("steep rows", _rows(5, 1000, scale=30.0), ("x",)),
    Case("sparsemax of flat rows", _rows(5, 1000, scale=0.05, alpha=2), ("x",)),
    Case("masked, empty rows", _masked, ("x",)),
    Case("equal scores", _equal),
    Case("an alpha for each head", _learned, ("x", "alpha"), ("alpha",)),
    Case("along the first dimension", _rows(65, 3, 2, dim=0), ("x",)),
    Case("one entry", _rows(3, 1), ("x",)),
    Case("long rows", _rows(2, 9000), ("x",)),
    Case("no rows", _rows(0, 5), ("x",)),
    Case("no entries", _rows(5, 0), ("x",)),
)
SPEC = OpSpec(
    name="entmax",
    summary="alpha-entmax along a dimension: probabilities with exact zeros, from softmax (1) to sparsemax (2)",
    source="Peters et al. 2019 (arXiv:1905.05702); Goncalves et al. 2025 (arXiv:2502.12082)",
    function=entmax,
    outputs=("out",),
    cases=CASES,
    oracle=_outputs,
    naive=_outputs,
    prepare=prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=("O_out", "grad_out"),
    row_scale=_row_scale,
    invariances=(
        Invariance("scores shifted", _shifted, lambda name, output: output, ("alpha 1.5", "alpha 2", "alpha 1.1")),
        permuted("entries", {"x": 1}, ("alpha 1.5", "alpha 1.75", "flat rows")),
        alone({"x": 0}, ("alpha 1.5", "alpha 1.75", "long rows"), ("torch", "triton")),
    ),
    capabilities={
        "cpu": "yes; the Triton kernel in the interpreter, float32, when named",
        "cuda": "yes: a Triton kernel from compute capability 8.0, any length of rows",
        "backward": "yes, alpha included; deterministic",
        "alpha": "a number in [1, 2], or a tensor in (1, 2], one for each row",
        "compile": "yes, fullgraph",
        "float64": "CPU and CUDA, in plain torch",
    },
    refusals=(
        Refusal("alpha outside [1, 2]", "below 1 nothing is sparse, above 2 the kernels have no form"),
        Refusal("a tensor of alphas that holds 1", "softmax is another formula; give the number 1"),
        Refusal("integer scores", "conversions are the caller's"),
        Refusal('backend="triton" with float64 or alpha=1', "plain torch serves"),
        Refusal("a backward pass of the backward pass", "gradients are first order"),
    ),
)
SPECS = (SPEC,)
