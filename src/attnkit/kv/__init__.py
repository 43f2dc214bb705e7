"""The key-value cache: storage that may be thinned out, paged and quantised, and the presses that compress it."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["Chain", "KVCache", "KVLayer", "Press", "methods", "press", "pressing"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    modules={"pressing": "attnkit.kv.pressing"},
    names={
        "Chain": "attnkit.kv.pressing",
        "KVCache": "attnkit.kv.cache",
        "KVLayer": "attnkit.kv.layers",
        "Press": "attnkit.kv.pressing",
        "methods": "attnkit.kv.pressing",
        "press": "attnkit.kv.pressing",
    },
)
