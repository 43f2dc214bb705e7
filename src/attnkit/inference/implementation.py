"""Methods as attention implementations of transformers, by name: for models that are trained with them."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import PolicyError, ShapeError, UnsupportedError
from attnkit.inference import compat
from attnkit.inference.asked import forms_of, refuse_arguments
from attnkit.inference.call import LayerCall, Padding
from attnkit.inference.masks import Form
from attnkit.inference.prefill.hashed import Hashed

__all__ = ["register_hash_attention"]


def register_hash_attention(name: str = "scfa_hash", **options: Any) -> str:
    """Register hash attention with transformers, so that `attn_implementation=name` means it, in training too.

    Padding goes through; packed sequences, sliding layers' own windows aside, and masks that are not causal are refused.
    Gradients flow through queries, keys and values. `apply(model, Hashed(...))` is the way to switch it on for a while.

    Args:
        name: of the implementation; a second call with the same name replaces the first.
        options: of `Hashed`; `dense_decode=False` hashes single queries too.
    Raises:
        OptionError: an option outside its range.

    >>> register_hash_attention(num_buckets=8)
    'scfa_hash'
    """
    implementation = _Implementation(Hashed(**options))
    compat.register(name, implementation.attention, implementation.mask)
    return name


class _Implementation:
    """The two functions that transformers calls; they keep nothing from one call to the next."""

    def __init__(self, method: Hashed) -> None:
        self.method = method

    def mask(
        self,
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
        **_: Any,
    ) -> Tensor | None:
        """The padding [B, S] bool, or None where nothing is padded.

        Raises:
            UnsupportedError: a static cache, or a mask that is neither causal nor the model's sliding window.
        """
        first, start = int(q_offset), int(kv_offset)
        queries, keys = range(first, first + q_length), range(start, start + kv_length)
        forms = forms_of(mask_function, batch=batch_size, queries=queries, keys=keys, config=config, device=device)
        if forms == {Form(causal=False)}:
            raise UnsupportedError("the model attends in both directions; hash attention is causal")
        if compat.is_plain_causal(mask_function) and start + kv_length != first + q_length:
            raise UnsupportedError("a static cache holds more keys than tokens were seen; hash attention needs a dynamic one")
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()

    def attention(
        self,
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
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Query [B, H, T, D], key and value [B, Hkv, S, D] -> out [B, T, H, Dv] and no weights.

        Raises:
            PolicyError: dropout.
            UnsupportedError: an argument that changes what attention means and is not supported.
            ShapeError: a padding mask of another length than the keys.
        """
        if dropout:
            raise PolicyError(f"attention dropout {dropout} is on, which hash attention does not have; set it to 0")
        refuse_arguments(kwargs, "hash attention does")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        if attention_mask is not None and attention_mask.shape[1:] != k.shape[1:2]:
            raise ShapeError(f"attention_mask has shape {tuple(attention_mask.shape)}; hash attention takes [B, {k.shape[1]}]")
        call = LayerCall(
            q=q,
            k=k,
            v=v,
            scale=scaling,
            causal=True,
            window_size=None if sliding_window is None else (sliding_window - 1, 0),
            softcap=softcap,
            sinks=s_aux,
            padding=None if attention_mask is None else Padding(attention_mask),
            seen=k.shape[1],
            layer=None,
            rope=None,
        )
        return call.dense() if call.window_size is not None else self.method.attend(call), None
