"""The key-value cache: storage that may be thinned out, paged and quantised, and the presses that compress it."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["FP8", "Chain", "Codec", "IntN", "KVCache", "KVLayer", "Press", "Raw", "methods", "press", "pressing"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    modules={"pressing": "attnkit.kv.pressing"},
    names={
        "FP8": "attnkit.kv.codecs",
        "Chain": "attnkit.kv.pressing",
        "Codec": "attnkit.kv.codecs",
        "IntN": "attnkit.kv.codecs",
        "KVCache": "attnkit.kv.cache",
        "KVLayer": "attnkit.kv.layers",
        "Press": "attnkit.kv.pressing",
        "Raw": "attnkit.kv.codecs",
        "methods": "attnkit.kv.pressing",
        "press": "attnkit.kv.pressing",
    },
)
