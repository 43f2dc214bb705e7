"""Between transformers' attention interface and a policy: the functions that are registered, and what they know."""

import inspect
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import PolicyError, ShapeError, UnsupportedError
from attnkit.inference import compat
from attnkit.inference.asked import forms_of, refuse_arguments
from attnkit.inference.call import LayerCall, Padding
from attnkit.inference.masks import Form
from attnkit.inference.policy import Policy
from attnkit.inference.rope import RopeSpec
from attnkit.kv.cache import KVCache
from attnkit.kv.layers import KVLayer

__all__ = ["Bridge", "PassDone"]


class _Forward(threading.local):
    """What one forward pass of the text model has told us; threads that share a model do not share it."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.forms: set[Form] = set()
        self.padding: Padding | None = None
        self.hidden: Tensor | None = None
        self.input_ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.position_ids: Tensor | None = None


@dataclass(frozen=True)
class PassDone:
    """What a cache method is told when all layers of a pass are done.

    Attributes:
        text: the text model; the policy is in force, so that the method may run it.
        cache: the cache of the pass.
        layers: its layers that keep positions.
        input_ids: [B, T], or None where embeddings were given.
        attention_mask: [B, seen], or None.
        position_ids: [B or 1, T], or None where the model counts for itself.
    """

    text: Any
    cache: Any
    layers: list[KVLayer]
    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None


class Bridge:
    """The attention function, the mask function and the hooks of one applied policy.

    Args:
        policy: what to do.
        text: the text model.
        modules: its attention modules.
        rope: the rotary embedding in force, where the policy turns queries or keys itself.
    """

    def __init__(self, policy: Policy, text: Any, modules: Iterable[Any], rope: RopeSpec | None) -> None:
        self.policy = policy
        self.rope = rope
        self._modules = {id(module) for module in modules}
        self._signature = inspect.signature(text.forward)
        self._forward = _Forward()

    def __reduce__(self) -> str:
        raise PolicyError(f"{self.policy} is active on this model; call undo() before you copy or pickle the model")

    def before(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the text model: remember the cache, refuse what policies cannot serve.

        Raises:
            PolicyError: a static or quantised cache, or attention weights are asked for.
        """
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        cache = arguments.get("past_key_values")
        reason = None if cache is None else compat.refused_cache(cache)
        if reason:
            raise PolicyError(f"past_key_values: {reason}; pass h.new_cache() or a DynamicCache")
        if kwargs.get("output_attentions") or text.config.output_attentions:
            raise PolicyError("output_attentions=True asks for attention weights, which policies do not compute; switch it off")
        if self.policy.cache is not None and cache is not None and not isinstance(cache, KVCache):
            raise PolicyError(f"past_key_values: a {type(cache).__name__} cannot be compressed; pass h.new_cache()")
        forward = self._forward
        forward.cache, forward.input_ids, forward.mask = cache, arguments.get("input_ids"), arguments.get("attention_mask")
        forward.position_ids = arguments.get("position_ids")
        for layer in self._kv_layers():
            layer.served = True

    def after(self, text: Any, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the text model, called after exceptions too: tell the cache method, let go of the cache."""
        del args
        forward, layers = self._forward, self._kv_layers()
        passed = PassDone(text, forward.cache, layers, forward.input_ids, forward.mask, forward.position_ids)
        padding = forward.padding
        forward.__init__()  # type: ignore[misc]
        for layer in layers:
            layer.served = False
        if output is None or not layers or any(layer.listener for layer in layers):  # an exception, or the context read again
            return
        if self.policy.cache is not None:
            self.policy.cache.after_pass(passed)
        for layer in layers:
            layer.settle(padding)

    def before_module(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an attention module: remember what goes into it."""
        del module
        self._forward.hidden = args[0] if args else kwargs["hidden_states"]

    def _kv_layers(self) -> list[KVLayer]:
        cache = self._forward.cache
        return cache.kv_layers if isinstance(cache, KVCache) else []

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
        **_: Any,  # dtype and permissions to skip: meant for masks that are written out
    ) -> Tensor | None:
        """What transformers calls in place of building a mask: the padding [B, L] bool, or None where nothing is padded.

        Raises:
            UnsupportedError: the mask is not one that `masks.Form` can express.
        """
        first, start = int(q_offset), int(kv_offset)
        queries, keys = range(first, first + q_length), range(start, start + kv_length)
        self._forward.forms |= forms_of(
            mask_function, batch=batch_size, queries=queries, keys=keys, config=config, device=device
        )
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask

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
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What attention modules call: query [B, H, T, D], key and value [B, Hkv, S, D] -> out [B, T, H, Dv] and no weights.

        Raises:
            PolicyError: a module of another model, or dropout.
            UnsupportedError: a mask or an argument that no policy honours.
        """
        if id(module) not in self._modules:
            raise PolicyError(
                f"{type(module).__name__} belongs to another model, which shares its config with the one that the policy was "
                f"applied to; give each model a config of its own"
            )
        if dropout:
            raise PolicyError(f"attention dropout {dropout} is on; policies are for inference, call model.eval() first")
        refuse_arguments(kwargs, "attnkit policies do")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        self._check_form(Form(causal=causal, window=sliding_window))
        layer, seen = self._layer(module, key)
        call = LayerCall(
            q=query.transpose(1, 2),
            k=key.transpose(1, 2),
            v=value.transpose(1, 2),
            scale=scaling,
            causal=causal,
            window_size=None if sliding_window is None else (sliding_window - 1, 0),
            softcap=softcap,
            sinks=s_aux,
            padding=self._padding(attention_mask, seen),
            seen=seen,
            layer=layer,
            rope=self.rope,
            turned=kwargs.get("position_ids"),
            module=module,
            hidden=self._forward.hidden,
        )
        return self._attend(call), None

    def _attend(self, call: LayerCall) -> Tensor:
        if call.window_size is not None:
            return call.dense()  # local layers keep their own window
        policy = self.policy
        out = policy.prefill.attend(call) if policy.correction is None else policy.correction.attend(call, policy.prefill)
        if call.layer is not None:
            if policy.cache is not None:
                policy.cache.after(call)
            if not any(notes.pending for notes in call.layer.notes.values()):
                call.layer.settle(call.padding)
        return out

    def _check_form(self, form: Form) -> None:
        forms = self._forward.forms
        if forms and form not in forms:
            given = " or ".join(sorted(map(str, forms)))
            raise UnsupportedError(f"the model masks this pass as {given}, but its attention module asks for {form}")

    def _layer(self, module: Any, key: Tensor) -> tuple[KVLayer | None, int]:
        cache = self._forward.cache
        if cache is None:
            return None, key.shape[2]
        layer = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
        return layer if isinstance(layer, KVLayer) else None, int(cache.get_seq_length(module.layer_idx))

    def _padding(self, mask: Tensor | None, seen: int) -> Padding | None:
        if mask is None:
            return None
        if mask.dim() != 2:
            raise UnsupportedError(
                f"attention_mask has {mask.dim()} dimensions; attnkit policies take [B, L] padding masks and no prepared ones"
            )
        if mask.shape[1] != seen:
            raise ShapeError(f"attention_mask covers {mask.shape[1]} tokens; the cache and the new tokens make {seen}")
        if self._forward.padding is None or self._forward.padding.mask is not mask:
            self._forward.padding = Padding(mask)  # one for all layers
        return self._forward.padding
