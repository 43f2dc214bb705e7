"""Registering private torch operators: one schema, one implementation for every device, one fake, one gradient."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define", "define_gradient"]

_LIBRARY: Any = torch.library.Library("attnkit", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `attnkit::NAME(...)` and return the operator.

    Args:
        schema: "NAME(Tensor q, ...) -> (Tensor, ...)".
        run: computes it on any device.
        fake: allocates outputs of the right shape, dtype and strides and computes nothing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnkit::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.attnkit, name).default
    return operator


def define_gradient(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give `attnkit::NAME` its gradient: `save(ctx, inputs, output)`, then `backward(ctx, *d_outputs)`."""
    torch.library.register_autograd(f"attnkit::{name}", backward, setup_context=save, lib=_LIBRARY)
