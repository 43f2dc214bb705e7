"""What query moments publish about themselves: oracle, invariances, capabilities, refusals."""

from typing import Any

from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone, permuted
from attnkit._core.opspec import OpSpec, Refusal
from attnkit.ops.query_moments.api import query_moments
from attnkit.ops.query_moments.backends import BACKENDS, WIDEST
from attnkit.ops.query_moments.call import prepare
from attnkit.ops.query_moments.cases import CASES
from attnkit.ops.query_moments.reference import centred, reference, sums_of

__all__ = ["SPEC", "SPECS"]


def _oracle(q: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return reference(prepare(q, **options))


def _naive(q: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Queries turned back and shifted in float32, then in their own dtype, as matrix units take them; sums in float32."""
    call = prepare(q, **options)
    x = centred(call)
    return sums_of(call, x.to(q.dtype).to(x.dtype))


SPEC = OpSpec(
    name="query_moments",
    summary="sums and outer products of queries as they were before rotation",
    source="Devoto et al. 2025 (arXiv:2510.00636), of whose Gaussian they are the moments",
    function=query_moments,
    outputs=("count", "sums", "products"),
    cases=CASES,
    oracle=_oracle,
    naive=_naive,
    prepare=prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=(),
    invariances=(
        permuted("tokens", {"q": 1, "positions": 0}, ("queries that were turned", "interleaved pairs")),
        alone({"q": 0, "shift": 0}, ("queries that were turned", "some channels turn"), ("triton",)),
    ),
    capabilities={
        "cpu": "yes; the Triton kernel in the interpreter, float32, when named",
        "cuda": "yes: a Triton kernel from compute capability 8.0",
        "backward": "no",
        "rotation": "all channels or the first of them, halves or interleaved pairs; positions of each row or of all",
        "padding": "tokens that are not real, which may hold anything; the first tokens of a row left out",
        "precision": "float32; queries in 16 bits that were turned or shifted are sums of two numbers of 16 bits",
        "deterministic": "yes; parts of a row are added up in their order",
        "compile": "yes, fullgraph",
        "head width": f"any; the kernel up to {WIDEST}",
        "float64": "CPU and CUDA, in plain torch",
    },
    refusals=(
        Refusal("a tensor that requires a gradient, outside torch.no_grad()", "moments choose keys; they have no gradient"),
        Refusal("positions without inv_freq, and inv_freq without positions", "no argument is ignored"),
        Refusal(f'backend="triton" with heads wider than {WIDEST} or float64', "plain torch serves"),
        Refusal("integer queries, tensors on different devices", "conversions are the caller's"),
    ),
    wide=("count", "sums", "products"),
)
SPECS = (SPEC,)
