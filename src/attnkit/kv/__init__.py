"""The key-value cache: layers that know which tokens they store, the cache made of them, and what chooses among its keys."""

from attnkit._core.lazy import lazy_attributes

__all__ = [
    "AttnkitCache",
    "CompactKeys",
    "EvictedMoments",
    "PositionedLayer",
    "QueryMoments",
    "evicted_moments",
    "expected_attention_scores",
    "match_attention",
    "moment_partial",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "AttnkitCache": "attnkit.kv.layers",
        "CompactKeys": "attnkit.kv.compaction",
        "EvictedMoments": "attnkit.kv.compaction",
        "PositionedLayer": "attnkit.kv.layers",
        "QueryMoments": "attnkit.kv.moments",
        "evicted_moments": "attnkit.kv.compaction",
        "expected_attention_scores": "attnkit.kv.expected",
        "match_attention": "attnkit.kv.compaction",
        "moment_partial": "attnkit.kv.compaction",
    },
)
