"""Several linear maps of one input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["project"]


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """`layer(x)` for every layer; in training by one matrix product, which reads x once and has one product as its gradient.

    Layers that are more than a matrix (adapters, quantised weights, hooks, biases) are called one by one.

    Args:
        x: [..., C].
        layers: C -> any width.
    """
    matrices = [layer.weight for layer in layers if isinstance(layer, nn.Linear) and _is_matrix(layer)]
    if not torch.is_grad_enabled() or len(matrices) < len(layers):
        return tuple(layer(x) for layer in layers)
    return torch.split(F.linear(x, torch.cat(matrices)), [len(matrix) for matrix in matrices], dim=-1)


def _is_matrix(layer: nn.Linear) -> bool:
    changed = type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks
    return not (changed or layer._backward_hooks or layer._backward_pre_hooks) and layer.bias is None
