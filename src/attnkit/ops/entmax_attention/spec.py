"""What entmax attention publishes about itself: oracle, invariances, capabilities, refusals."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import permuted, scaled
from attnkit._core.opspec import Budget, OpSpec, Refusal
from attnkit.ops.attention.reference import MAX_PAIRS, dense_scores
from attnkit.ops.entmax.reference import dense_entmax
from attnkit.ops.entmax_attention.api import entmax_attention
from attnkit.ops.entmax_attention.backends import BACKENDS
from attnkit.ops.entmax_attention.call import prepare
from attnkit.ops.entmax_attention.cases import CASES
from attnkit.ops.entmax_attention.reference import reference

__all__ = ["SPEC", "SPECS"]


def _outputs(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = prepare(*args, **kwargs)
    out, tau = reference(call)
    return (out, tau) if call.return_aux else (out,)


def _row_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Sum over keys of (p_ij + U_ij |s|) |v_jd|: what is summed, and what a rounding error of scores of size |s| moves."""
    call = prepare(q, k, v.abs(), **options)
    scores, values = dense_scores(call)
    own = call.alpha if call.alphas is None else call.alphas[:, None, None]
    prob, _ = dense_entmax(scores, own)
    size = scores.masked_fill(torch.isinf(scores), 0).abs()
    u = (prob ** (2 - own)).masked_fill(prob == 0, 0)
    out = ((prob + u * size) @ values).transpose(1, 2)
    return out[0] if call.cu_seqlens_q is not None else out


# A rounding error of a score moves its probability by U = p^(2 - alpha), for small p far more than the p of softmax: results
# depend more on the order in which products of queries and keys are summed.
BUDGET = Budget(ulps=8.0, backward_ulps=16.0)


SPEC = OpSpec(
    name="entmax_attention",
    summary="attention normalised by alpha-entmax: exact zeros, alpha a number or learned for each head",
    source="Goncalves et al. 2025 (arXiv:2502.12082); arXiv:2604.15180",
    function=entmax_attention,
    outputs=("out", "tau"),
    cases=CASES,
    oracle=_outputs,
    naive=_outputs,
    prepare=prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=("O_out", "grad_out"),
    row_scale=_row_scale,
    invariances=(
        permuted("keys", {"k": 1, "v": 1, "key_bias": 1}, ("dense, one key head", "masked keys", "flat scores")),
        scaled("v", ("values around 2",)),
    ),
    capabilities={
        "cpu": "yes, blockwise in plain torch; the Triton kernels in the interpreter, float32, when named",
        "cuda": "Triton kernels, compute capability 8.0, for numbers in [1.25, 2] and for tensors; else plain torch",
        "backward": "yes, alpha included; deterministic",
        "alpha": "a number in [1, 2], or a tensor in (1, 2], one for each head",
        "packed": "yes",
        "grouped heads": "any H that is a multiple of Hkv",
        "compile": "yes, fullgraph",
        "head width": "16..256, D != Dv",
        "float64": "yes",
    },
    refusals=(
        Refusal("alpha outside [1, 2], a tensor of alphas that holds 1", "below 1 nothing is sparse; 1 is another formula"),
        Refusal(
            "a key_bias that holds anything but 0 and -inf (checked on the CPU)", "it masks keys; thresholds do not add to it"
        ),
        Refusal("return_aux with alpha=1", "softmax has no threshold"),
        Refusal("head width outside 16..256", "kernels pad to powers of two from 16; pad narrower heads with zeros"),
        Refusal("cu_seqlens of one side only", "boundaries are data and are never guessed"),
        Refusal(f'backend="reference" above {MAX_PAIRS} scores a head', "it writes the whole score matrix down"),
        Refusal("a backward pass of the backward pass", "gradients are first order"),
    ),
    budget=BUDGET,
)
SPECS = (SPEC,)
