"""Switching a policy on for a live model, and off again without a trace."""

import itertools
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from attnkit._core.errors import PolicyError
from attnkit.inference import compat
from attnkit.inference.bridge import Bridge
from attnkit.inference.policy import Policy, named
from attnkit.inference.rope import RopeSpec
from attnkit.kv.cache import KVCache

__all__ = ["Applied", "apply"]

_numbers = itertools.count()
_active: "weakref.WeakKeyDictionary[Any, Policy]" = weakref.WeakKeyDictionary()  # text model -> what is in force


class Applied:
    """A policy in force; leaving the `with` block, or `undo()`, restores the model bit by bit.

    Attributes:
        policy: what is in force.
    """

    def __init__(self, policy: Policy, config: Any, undo: ExitStack) -> None:
        self.policy = policy
        self._config = config
        self._undo = undo

    def new_cache(self, **options: Any) -> KVCache:
        """An empty cache for `generate(past_key_values=...)` or a forward pass; with window policies its size is bounded.

        Args:
            options: codec, page_size and context of `attnkit.kv.KVCache`.
        """
        return KVCache(self._config, **options)

    def undo(self) -> None:
        """Restore the attention implementation, rotary buffers, hooks and registries; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def apply(model: Any, policy: Policy | str) -> Applied:
    """Switch a policy on at once; the result undoes it, at the end of a `with` block or by `undo()`.

    Args:
        model: a decoder-only transformers model, or one that has such a part; its vision towers are left alone.
        policy: a `Policy`, or a name from `available()`.
    Raises:
        OptionError: an unknown name.
        PolicyError: another policy is active, attention weights are to be returned, dropout is on, or the policy needs a
            causal model.
        UnsupportedArchitecture: attention that does not go through transformers' attention interface, or a rotary
            embedding that the policy cannot work with. Nothing has been touched then.

    >>> with apply(model, "window") as h:  # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=h.new_cache())
    """
    policy = named(policy) if isinstance(policy, str) else policy
    text = compat.text_model(model)
    modules = compat.attention_modules(text)
    _check(text, modules, policy)
    cache_needs: frozenset[str] = frozenset() if policy.cache is None else policy.cache.needs
    turns = policy.prefill.needs_rotation or bool(cache_needs & {"rope", "moments"})
    needs_rope = policy.position is not None or turns
    rope = RopeSpec.from_model(model) if needs_rope else None
    if rope is not None and policy.position is not None:
        rope = policy.position.rescale(rope)
    if rope is not None and turns:
        rope.check_rotation()
    with ExitStack() as undo:
        _install(undo, text, modules, policy, rope)
        undo.callback(_active.pop, text)
        _active[text] = policy
        return Applied(policy, text.config, undo.pop_all())


def _check(text: Any, modules: list[Any], policy: Policy) -> None:
    if text in _active:
        raise PolicyError(f"{_active[text]} is active on this model; leave its `with` block or call undo() first")
    if text.config.output_attentions:
        raise PolicyError("config.output_attentions asks for attention weights, which policies do not compute; set it to False")
    if text.training and getattr(text.config, "attention_dropout", 0.0):
        raise PolicyError(
            "the model is in training mode with attention dropout; policies are for inference, call model.eval() first"
        )
    causal = getattr(text.config, "is_causal", True) and all(getattr(module, "is_causal", True) for module in modules)
    if policy.prefill.needs_causal and not causal:
        raise PolicyError(f"{policy.prefill} needs a causal model; {type(text).__name__} attends in both directions")


def _install(undo: ExitStack, text: Any, modules: list[Any], policy: Policy, rope: RopeSpec | None) -> None:
    """Change the model step by step, each step with its way back."""
    bridge = Bridge(policy, text, modules, rope)
    if rope is not None and policy.position is not None:
        rotary = compat.Rotary.of(text)
        undo.callback(rotary.write, rotary.inv_freq.clone(), rotary.scaling)
        rotary.write(rope.inv_freq, rope.attention_factor)
    name = f"attnkit_{next(_numbers)}"
    undo.callback(compat.unregister, name)
    compat.register(name, bridge.attention, bridge.mask)
    undo.callback(text.register_forward_pre_hook(bridge.before, with_kwargs=True).remove)
    undo.callback(text.register_forward_hook(bridge.after, always_call=True).remove)
    if policy.cache is not None and "hidden" in policy.cache.needs:
        for module in modules:
            undo.callback(module.register_forward_pre_hook(bridge.before_module, with_kwargs=True).remove)
    for config in {id(part.config): part.config for part in [text, *modules]}.values():
        undo.callback(compat.set_attention_name, config, compat.get_attention_name(config))
        compat.set_attention_name(config, name)
