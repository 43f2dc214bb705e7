"""The cache that policies hand to `generate`."""

import copy
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from attnkit.kv.layers import PositionedLayer, storages

__all__ = ["AttnkitCache"]


class AttnkitCache(Cache):
    """A cache whose full-attention layers are `PositionedLayer`s; sliding-window and linear layers are the stock ones.

    Args:
        config: the model's configuration (of the whole model or of its text part).

    >>> cache = AttnkitCache(model.config)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(self, config: Any) -> None:
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[PositionedLayer() if type(layer) is DynamicLayer else layer for layer in stock])

    def nbytes(self) -> int:
        """Bytes of the memory that all layers hold on to, whatever their kind; memory behind views counts in full."""
        return sum(storages([vars(layer) for layer in self.layers]).values())

    def clone(self) -> Self:
        """A copy that shares no tensor with this one, for going on in two ways from one prefill."""
        other = copy.copy(self)
        other.layers = []
        for layer in self.layers:
            twin = copy.copy(layer)
            vars(twin).update({name: _copied(value) for name, value in vars(layer).items()})
            other.layers.append(twin)
        return other


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value
