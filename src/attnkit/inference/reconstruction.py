"""How far hidden states move when the cache is compressed."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import InputError
from attnkit.inference.applied import apply
from attnkit.inference.policy import Policy

__all__ = ["reconstruction_error"]

_SHARE, _MOST = 8, 256  # the tail is an eighth of the tokens, at most so many


def reconstruction_error(model: Any, press: Any, ids: Tensor, *, tail: int | None = None) -> Tensor:
    """Relative error of each layer's output: norm(h - h') / norm(h), h with the whole cache and h' with a compressed one.

    The context is read and compressed, then the tail is read in one pass; h are the hidden states of the tail, in float32, the
    last layer's behind the final norm.

    Args:
        model: as `apply` takes it.
        press: of `attnkit.kv.press`, or a `Policy`.
        ids: [B, T] int64 without padding, context and tail.
        tail: how many tokens the tail has; None is an eighth of them, at most 256.
    Returns:
        [layers] float32, means over rows and tail tokens; `.mean()` is one number.
    Raises:
        InputError: the tail leaves no context.
        PolicyError, UnsupportedArchitecture: see `apply`.
    Source: Devoto et al. 2025 (arXiv:2510.00636), appendix.
    """
    tail = min(_MOST, ids.shape[1] // _SHARE) if tail is None else tail
    if not 0 < tail < ids.shape[1]:
        raise InputError(f"tail={tail} is not possible with {ids.shape[1]} tokens; both context and tail need some")
    dense = _states(model, Policy(), ids, tail)
    pressed = _states(model, press if isinstance(press, Policy) else Policy(cache=press), ids, tail)
    errors = [(h - changed).norm(dim=-1) / h.norm(dim=-1) for h, changed in zip(dense, pressed, strict=True)]
    return torch.stack([error.mean() for error in errors])


@torch.no_grad()
def _states(model: Any, policy: Policy, ids: Tensor, tail: int) -> list[Tensor]:
    """[B, tail, width] float32 of each layer."""
    with apply(model, policy) as applied:
        cache = applied.new_cache()
        model(ids[:, :-tail], past_key_values=cache, logits_to_keep=1)
        states = model(ids[:, -tail:], past_key_values=cache, logits_to_keep=1, output_hidden_states=True).hidden_states
    return [state.float() for state in states[1:]]
