"""The private torch operators behind `expected_attention_scores`: schema, fake, implementations; there is no gradient."""

from typing import Any

from torch import Tensor

from attnkit._core.devices import current
from attnkit._core.library import define
from attnkit.ops.expected_attention import keys

__all__ = ["run_torch", "run_triton"]

_INPUTS = (
    "Tensor k, Tensor v, Tensor mean, Tensor? cov, Tensor? gram, Tensor? valid, float scale, float eps, str norm, int sinks"
)


def _triton(k: Tensor, *arguments: Any) -> Tensor:
    from attnkit.ops.expected_attention._triton import launch  # Triton loads when a kernel runs

    with current(k.device):
        return launch.expected(k, *arguments)


def _fake(k: Tensor, v: Tensor, mean: Tensor, *others: Any) -> Tensor:
    return mean.new_empty(k.shape[0], k.shape[2], k.shape[1]).movedim(1, 2)


run_torch = define(f"expected_attention({_INPUTS}) -> Tensor", keys.expected, _fake)
run_triton = define(f"expected_attention_triton({_INPUTS}) -> Tensor", _triton, _fake)
