"""What expected attention publishes about itself: oracle, invariances, capabilities, refusals."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import Invariance, alone, permuted
from attnkit._core.opspec import Budget, OpSpec, Refusal
from attnkit.ops.expected_attention.api import expected_attention_scores
from attnkit.ops.expected_attention.backends import BACKENDS, WIDEST
from attnkit.ops.expected_attention.call import prepare
from attnkit.ops.expected_attention.cases import CASES
from attnkit.ops.expected_attention.reference import dense_logits, reference, scores_of

__all__ = ["SPEC", "SPECS"]


def _oracle(k: Tensor, v: Tensor, mean: Tensor, cov: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    return (reference(prepare(k, v, mean, cov, **options)),)


def _naive(k: Tensor, v: Tensor, mean: Tensor, cov: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Moments and logits in the keys' dtype, as a model in 16 bits would have them; everything else in float32."""
    call = prepare(k, v, mean, cov, **options)
    keys = k.repeat_interleave(mean.shape[1] // k.shape[2], 2)
    logits = dense_logits(keys, mean.to(k.dtype), None if cov is None else cov.to(k.dtype), call.scale)
    return (scores_of(call, logits.to(mean.dtype)),)


def _row_scale(k: Tensor, v: Tensor, mean: Tensor, cov: Tensor | None, **options: Any) -> Tensor:
    """The score times 1 + the largest sum that a logit can be of: its rounding moves every exponential of the head."""
    call = prepare(k, v, mean, cov, **options)
    scores = reference(call)
    if scores.numel() == 0:
        return scores
    heads = (k.shape[2], mean.shape[1] // k.shape[2])
    keys = k.abs().repeat_interleave(heads[1], 2)
    logits = dense_logits(keys, mean.abs(), None if cov is None else cov.abs(), call.scale)
    return scores.mul(1 + logits.amax(1, keepdim=True).unflatten(2, heads).amax(3))


def _moved(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One more channel, where all keys are 1 and queries are 64, moves all logits alike."""
    k, mean = inputs["k"], inputs["mean"]
    ones, level = torch.ones_like(k[..., :1]), torch.full_like(mean[..., :1], 64.0)
    cov = inputs["cov"]
    wide = cov.new_zeros(*cov.shape[:2], cov.shape[2] + 1, cov.shape[3] + 1)
    wide[..., :-1, :-1] = cov
    scale = inputs.get("scale", k.shape[3] ** -0.5)
    return {**inputs, "k": torch.cat([k, ones], 3), "mean": torch.cat([mean, level], 2), "cov": wide, "scale": scale}


SPEC = OpSpec(
    name="expected_attention_scores",
    summary="how much a Gaussian of queries to come will attend to each cached key, times the size of its value",
    source="Devoto et al. 2025 (arXiv:2510.00636)",
    function=expected_attention_scores,
    outputs=("scores",),
    cases=CASES,
    oracle=_oracle,
    naive=_naive,
    prepare=prepare,
    backends=BACKENDS,
    dtypes=FLOATS,
    sites=(),
    # logits of size L leave L roundings in every exponential, and the plain form may be right by luck
    budget=Budget(ulps=8.0),
    row_scale=_row_scale,
    invariances=(
        Invariance("logits shifted", _moved, lambda name, output: output, ("grouped heads", "own scale")),
        permuted("keys", {"k": 1, "v": 1}, ("every head its own keys, no sinks",)),
        alone({"k": 0, "v": 0, "mean": 0, "cov": 0}, ("grouped heads", "one key head"), ("torch", "triton")),
    ),
    capabilities={
        "cpu": "yes; the Triton kernels in the interpreter, float32, when named",
        "cuda": "yes: Triton kernels from compute capability 8.0",
        "backward": "no",
        "grouped heads": "any H that is a multiple of Hkv; keys are read once for their group",
        "padding": "keys that are not valid, for each row or each key head; any number of sinks",
        "precision": "scores in float32; covariances in 16 bits are sums of two matrices",
        "compile": "yes, fullgraph",
        "head width": f"any; the kernels up to {WIDEST}, D != Dv",
        "float64": "CPU and CUDA, in plain torch",
    },
    refusals=(
        Refusal("a tensor that requires a gradient, outside torch.no_grad()", "scores choose keys; they have no gradient"),
        Refusal("moments in 16 bits", "sums of their D^2 terms lose the order of keys"),
        Refusal('value_norm="output" without output_gram, and output_gram without it', "no argument is ignored"),
        Refusal(f'backend="triton" with heads wider than {WIDEST} or float64', "plain torch serves"),
        Refusal("integer keys, tensors on different devices", "conversions are the caller's"),
    ),
    wide=("scores",),
)
SPECS = (SPEC,)
