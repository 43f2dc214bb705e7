"""The key-value cache: layers that know which tokens they store, the cache made of them, and codecs of pages."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["FP8", "AttnkitCache", "Codec", "IntN", "PositionedLayer", "Raw"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        **dict.fromkeys(("AttnkitCache", "PositionedLayer"), "attnkit.kv.layers"),
        **dict.fromkeys(("FP8", "Codec", "IntN", "Raw"), "attnkit.kv.codecs"),
    },
)
