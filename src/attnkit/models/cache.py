"""The cache of a forward pass: transformers' own, made or checked."""

from typing import Any

from attnkit._core.errors import UnsupportedError
from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers import DynamicCache  # noqa: E402

from attnkit.models.configuration import HybridConfig  # noqa: E402

__all__ = ["StateCache", "check_cache", "has_keys", "new_cache"]


class StateCache(DynamicCache):
    """A cache of layers that keep states only: transformers' layers of that kind do not count tokens, so this does.

    Attributes:
        seen: tokens so far; the model adds to it.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config=config)
        self.seen = 0

    @property
    def is_compileable(self) -> bool:
        """False: generation would prepare masks for a compiled model, which ours are not."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.seen = 0


def has_keys(config: HybridConfig) -> bool:
    """Whether any layer keeps keys, whose number is the number of tokens."""
    return any(kind != "linear_attention" for kind in config.layer_types or ())


def new_cache(config: HybridConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    return DynamicCache(config=config) if has_keys(config) else StateCache(config)


def check_cache(cache: Any, config: HybridConfig) -> None:
    """Refuse caches that would give wrong numbers.

    Raises:
        UnsupportedError: a static cache, whose length is not its number of tokens; or one that cannot count tokens.
    """
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(
            f"past_key_values: {type(cache).__name__} is static; attnkit models take caches that grow, such as "
            f"DynamicCache(config=model.config)"
        )
    if not has_keys(config) and not isinstance(cache, StateCache):
        raise UnsupportedError(
            f"past_key_values: no layer keeps keys, so that {type(cache).__name__} cannot count tokens; give "
            f"attnkit.models.StateCache(model.config), or nothing"
        )
