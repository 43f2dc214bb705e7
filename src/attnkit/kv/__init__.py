"""The key-value cache: layers that know which tokens they store, and the cache made of them."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["KVCache", "KVLayer"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={"KVCache": "attnkit.kv.layers", "KVLayer": "attnkit.kv.layers"},
)
