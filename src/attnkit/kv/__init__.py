"""The key-value cache: storage that may be thinned out, paged and quantised, and the presses that compress it."""

from attnkit._core.lazy import lazy_attributes

__all__ = [
    "Chain",
    "Codec",
    "CompactKeys",
    "EvictedMoments",
    "FP8",
    "IntN",
    "KVCache",
    "KVLayer",
    "Press",
    "QueryMoments",
    "Raw",
    "evicted_moments",
    "expected_attention_scores",
    "match_attention",
    "catalogue",
    "methods",
    "moment_partial",
    "parse",
    "press",
    "pressing",
    "reconstruction_error",
    "write",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    modules={"catalogue": "attnkit.kv.catalogue", "pressing": "attnkit.kv.pressing"},
    names={
        "FP8": "attnkit.kv.codecs",
        "Chain": "attnkit.kv.pressing",
        "Codec": "attnkit.kv.codecs",
        "CompactKeys": "attnkit.kv.compaction",
        "EvictedMoments": "attnkit.kv.compaction",
        "IntN": "attnkit.kv.codecs",
        "KVCache": "attnkit.kv.cache",
        "KVLayer": "attnkit.kv.layers",
        "Press": "attnkit.kv.pressing",
        "QueryMoments": "attnkit.kv.moments",
        "Raw": "attnkit.kv.codecs",
        "evicted_moments": "attnkit.kv.compaction",
        "expected_attention_scores": "attnkit.kv.expected",
        "match_attention": "attnkit.kv.compaction",
        "methods": "attnkit.kv.catalogue",
        "moment_partial": "attnkit.kv.compaction",
        "parse": "attnkit.kv.notation",
        "press": "attnkit.kv.pressing",
        "reconstruction_error": "attnkit.inference.reconstruction",  # a model has to run
        "write": "attnkit.kv.notation",
    },
)
