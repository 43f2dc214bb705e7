"""The cache: a transformers cache whose layers may be thinned out, paged, ragged per head and quantised."""

import copy
from typing import Any, Self

from attnkit._core.errors import OptionError
from attnkit._core.lazy import require
from attnkit._core.registry import Registry
from attnkit.kv.codecs import FP8, Codec, IntN, Raw

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer  # noqa: E402

from attnkit.kv.layers import KVLayer  # noqa: E402
from attnkit.kv.storage import copied, storages  # noqa: E402

__all__ = ["CODECS", "KVCache"]

CODECS: Registry[Codec] = Registry("codec")
CODECS.register("raw", Raw())
CODECS.register("int8", IntN(bits=8))
CODECS.register("int4", IntN(bits=4))
CODECS.register("fp8", FP8())


class KVCache(Cache):
    """A cache whose full-attention layers are `KVLayer`s; sliding-window and linear layers are the stock ones.

    Args:
        config: the model's configuration (of the whole model or of its text part).
        codec: how compressed layers write their pages: "raw", "int8", "int4", "fp8" or an object; None is raw, and layers
            that nothing compresses stay as they are. With a codec all layers move into pages when the context was read.
        page_size: tokens a page, a power of two from 16 to 128; None is the codec's own.
        context: tokens after which the prefill is complete, for a context that is read in several passes; None is one pass.
    Raises:
        OptionError: an unknown codec, or another page size.

    >>> cache = KVCache(model.config)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self, config: Any, *, codec: Codec | str | None = None, page_size: int | None = None, context: int | None = None
    ) -> None:
        if page_size is not None and page_size not in (16, 32, 64, 128):
            raise OptionError(f"page_size={page_size} is not allowed; it is 16, 32, 64 or 128")
        if context is not None and context < 1:
            raise OptionError(f"context={context} is not allowed; it counts tokens, 1 or more")
        made = CODECS[codec] if isinstance(codec, str) else codec
        stock = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                KVLayer(codec=made, page_size=page_size, context=context) if type(layer) is DynamicLayer else layer
                for layer in stock
            ]
        )

    @property
    def kv_layers(self) -> list[KVLayer]:
        """The layers that keep positions."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def nbytes(self) -> int:
        """Bytes of the memory that all layers hold on to, whatever their kind; memory behind views counts in full."""
        own = sum(layer.nbytes for layer in self.kv_layers)
        return own + sum(storages([vars(layer) for layer in self.layers if not isinstance(layer, KVLayer)]).values())

    def clone(self) -> Self:
        """A copy for going on in two ways from one prefill; only pages that never change are shared with it."""
        other = copy.copy(self)
        other.layers = [layer.fork() if isinstance(layer, KVLayer) else _twin(layer) for layer in self.layers]
        return other


def _twin(layer: Any) -> Any:
    twin = copy.copy(layer)
    vars(twin).update({name: copied(value) for name, value in vars(layer).items()})
    return twin
