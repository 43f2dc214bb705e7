"""Entmax attention inside models of transformers: an attention implementation with a mask that keeps padding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import UnsupportedError
from attnkit.inference import compat
from attnkit.inference.asked import forms_of, refuse_arguments
from attnkit.inference.masks import Form

__all__ = ["register_entmax"]

_FACTS = "_attnkit_facts"


def register_entmax(name: str = "entmax") -> str:
    """Make entmax attention an `attn_implementation` of transformers, for training and inference.

    Layers read `config.entmax_alpha`, a number in [1, 2] (absent: 1.5), at every call, so that it may change in training.
    Masks are those that attnkit can express: causal, bidirectional and sliding windows, each with padding.

    Args:
        name: for `model.set_attn_implementation` and `attn_implementation=`; registering it again does no harm.
    Returns:
        The name.
    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedError (when a model runs): attention dropout, attention weights, sinks, packed or custom masks, static
            caches.

    >>> import torch
    >>> from attnkit.inference import register_entmax
    >>> from attnkit.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> model.set_attn_implementation(register_entmax())
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 61])
    """
    compat.register(name, _attention, _mask)
    return name


@dataclass(frozen=True)
class _Facts:
    """What the mask function found out for all layers of its kind: it travels on the mask."""

    forms: frozenset[Form]
    padded: bool


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,  # dtype and permissions to skip: meant for masks that are written out
) -> Tensor:
    """Called by transformers in place of building a mask: which keys are real, [B, S] bool, never None."""
    first, start = int(q_offset), int(kv_offset)
    queries, keys = range(first, first + q_length), range(start, start + kv_length)
    forms = forms_of(mask_function, batch=batch_size, queries=queries, keys=keys, config=config, device=device)
    if Form(causal=False) not in forms and first + q_length != start + kv_length:
        raise UnsupportedError(
            f"the last query stands at {first + q_length - 1} and the last key at {start + kv_length - 1}: a static cache, "
            f"whose length does not say how many tokens it holds; use a DynamicCache"
        )
    if attention_mask is None:
        real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        padded = False
    else:
        real = attention_mask[:, start : start + kv_length].bool()
        padded = not bool(real.all())
    setattr(real, _FACTS, _Facts(frozenset(forms), padded))
    return real


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What attention modules call: query [B, H, T, D], key and value [B, Hkv, S, D] -> out [B, T, H, Dv] and no weights."""
    if dropout:
        raise UnsupportedError(
            f"attention dropout {dropout} is on; entmax attention has none, set config.attention_dropout = 0"
        )
    if s_aux is not None:
        raise UnsupportedError("s_aux: sinks are logits of a softmax; entmax attention has none")
    refuse_arguments(kwargs, "entmax attention in transformers does")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bias = _key_bias(attention_mask, Form(causal=causal, window=sliding_window), key)
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    out = ops.entmax_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        alpha=getattr(module.config, "entmax_alpha", 1.5),
        causal=causal,
        scale=scaling,
        window_size=window,
        softcap=softcap,
        key_bias=bias,
    )
    assert isinstance(out, Tensor)
    return out, None


def _key_bias(mask: Tensor | None, form: Form, key: Tensor) -> Tensor | None:
    """0 and -inf for each key [B, S], or None where nothing is padded; a mask of another form than the layer's is refused."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask has {mask.dim()} dimensions; entmax attention takes [B, L] padding masks and no prepared ones"
        )
    facts: _Facts | None = getattr(mask, _FACTS, None)  # a copy of the mask, on another device, has lost them
    if facts is not None:
        if form not in facts.forms:
            given = " or ".join(sorted(map(str, facts.forms)))
            raise UnsupportedError(f"the model masks this pass as {given}, but its attention module asks for {form}")
        if not facts.padded:
            return None
    hidden = ~mask[:, -key.shape[2] :].bool()
    return torch.zeros(hidden.shape, dtype=accumulator_dtype(key.dtype), device=key.device).masked_fill_(hidden, -torch.inf)
