"""The backward pass in matrix products starts from an LSE of its own scores, not of the forward's, which round otherwise."""

import torch

from attnkit import ops
from attnkit.ops import OPS


def _value_gradient(seed: int, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """Of a call whose key bias wants a gradient, which the fused kernels do not give, at scores of some thousands."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 300, 4, 64), (1, 300, 2, 64), (1, 300, 2, 64), (1, 300), (1, 300, 4, 64))
    q, k, v, bias, weight = (torch.randn(*shape, generator=generator) for shape in shapes)
    q, k, v, bias = (t.to(dtype).requires_grad_() for t in (1000 * q, k, v, bias))
    out = ops.attention(q, k, v, key_bias=bias, causal=True, backend=backend)
    return torch.autograd.grad(out, (v, bias), weight.to(dtype))[0].double()


def test_large_scores_keep_the_value_gradient_within_the_naive_form() -> None:
    worst = 0.0
    for seed in range(12):
        oracle = _value_gradient(seed, torch.float64, "reference")
        naive = (_value_gradient(seed, torch.float32, "reference") - oracle).abs().max()
        worst = max(worst, float((_value_gradient(seed, torch.float32, "torch") - oracle).abs().max() / naive))
    assert worst <= OPS["attention"].budget.backward
