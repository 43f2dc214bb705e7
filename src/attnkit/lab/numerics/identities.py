"""Biased rounding on tied maxima, and what an error of delta does to gradients: measured, and checked by algebra."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit.lab.numerics.emulate import emulated_attention
from attnkit.lab.numerics.formats import BF16, round_to
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.inputs import tied_maxima
from attnkit.lab.numerics.metrics import deviation
from attnkit.lab.numerics.policy import Preset, SitePolicy

__all__ = ["bias_table", "gradient_identities"]

_DEEP, _MIDDLE, _SHALLOW = (12.0, 20.0), (8.0, 14.0), (5.0, 9.0)


def _raised(top: Tensor, ties: Tensor) -> Tensor:
    return top + 0.5


def _lagging(top: Tensor, ties: Tensor) -> Tensor:
    return top - 0.3


_CONSISTENT: Mapping[str, Any] = {"normalizer": "consistent"}
_VARIANTS: tuple[tuple[str, Preset, Mapping[str, Any]], ...] = (
    ("running output in bf16", "autocast_ref", {}),
    ("running output in bf16, dynamic maximum, beta 2", "autocast_ref", {"stable": "dynamic_max", "beta": 2.0}),
    ("running output in bf16, dynamic maximum, beta 4", "autocast_ref", {"stable": "dynamic_max", "beta": 4.0}),
    ("running output in bf16, dynamic maximum, beta 7", "autocast_ref", {"stable": "dynamic_max", "beta": 7.0}),
    ("running output in bf16, 0.5 above the maximum", "autocast_ref", {"shift": _raised}),
    ("rounded once", "kernel", {}),
    ("rounded once, 0.5 above the maximum", "kernel", {"shift": _raised}),
    ("rounded once, 0.5 above, consistent sum", "kernel", {"shift": _raised, **_CONSISTENT}),
    ("rounded once, maximum 0.3 behind", "kernel", {"shift": _lagging}),
    ("rounded once, 0.3 behind, consistent sum", "kernel", {"shift": _lagging, **_CONSISTENT}),
)


def bias_table(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Mean signed error on tied maxima: of several ways to compute, then over ties, depth and values for two of them.

    Args:
        rows: of attention, each with 64 keys.
        seed: of the inputs.
    """
    for name, policy, options in _VARIANTS:
        yield _bias(name, policy, options, rows, seed, 2, _DEEP, -2.0)
    for name, policy, options in (_VARIANTS[0], _VARIANTS[5]):
        for ones in (2, 3, 4, 8):
            for depth in (_SHALLOW, _MIDDLE, _DEEP):
                for mean in (-2.0, 0.0, 2.0):
                    if (ones, depth, mean) != (2, _DEEP, -2.0):  # above
                        yield _bias(name, policy, options, rows, seed, ones, depth, mean)


def _bias(
    name: str, policy: Preset, options: Mapping[str, Any], rows: int, seed: int, ones: int, depth: tuple[float, float],
    mean: float,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q, k, v = tied_maxima(generator, rows=rows, ones=ones, depth=depth, value_mean=mean)
    k, v = round_to(k, BF16), round_to(v, BF16)
    sites = SitePolicy.preset(policy, BF16)
    out = emulated_attention(q, k, v, policy=sites, algorithm="fa2", scale=1.0, **options)
    found = deviation(out, golden_attention(q, k, v, scale=1.0), BF16)
    facts = {"ones": ones, "depth": list(depth), "value_mean": mean, "bias_ulp": found.bias_ulp, "z": found.z}
    return {"name": name, "policy": policy, **facts, "mean_ulp": found.ulp_mean}


def gradient_identities(seed: int) -> Iterator[dict[str, Any]]:
    """One head in float64 whose delta is made wrong by eps: how far the gradients are from what the paper's equations say.

    Tokens lean to one side, as they do in trained models. Relative errors, of the norm of the right-hand side.

    Args:
        seed: of tokens and weights.
    Source: Qiu & Yao 2025 (arXiv:2510.04212), equations 1 to 3.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, width, wide, scale = 96, 16, 48, 16**-0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(tokens, wide) + 2 * draw(1, wide)
    w_q, w_k, w_v = (draw(width, wide) / wide**0.5 for _ in range(3))
    q, k, v, d_out = x @ w_q.T, x @ w_k.T, x @ w_v.T, draw(tokens, width)
    p = torch.softmax((scale * q @ k.T).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf), -1)
    out = p @ v
    stored = round_to(out, BF16)
    eps = (d_out * (stored - out)).sum(-1)
    d_p = d_out @ v.T
    exact, wrong = ((d_out * o).sum(-1, keepdim=True) for o in (out, stored))
    d_s, d_s_wrong = p * (d_p - exact), p * (d_p - wrong)
    d_q, d_q_wrong = (scale * d @ k for d in (d_s, d_s_wrong))
    along = p @ k
    rank_one = sum(scale * eps[row] * torch.outer(along[row], x[row]) for row in range(tokens))
    for name, left, right in (
        ("rowsum(dO O) = rowsum(P dP)", exact[:, 0], (p * d_p).sum(-1)),
        ("dQ - dQ' = alpha diag(eps) P K", d_q - d_q_wrong, scale * eps[:, None] * along),
        ("dW - dW' = alpha sum eps (P K)^T X", (d_q - d_q_wrong).T @ x, rank_one),
        ("rowsum(dS') = -eps", d_s_wrong.sum(-1), -eps),
    ):
        assert isinstance(right, Tensor)
        yield {"name": name, "error": float((left - right).norm() / right.norm())}
