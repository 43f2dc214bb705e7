"""Tile sizes of our kernels, measured on this device and kept in the user's cache.

For each (kernel, bits of the inputs, padded head width):

*Compile.* Worker processes build the candidates and the present configuration, and run each once; Triton's cache on disk
hands them on. A candidate that does not compile, does not run or takes too long is dropped with its reason.

*Time.* Who is left runs in one process, once a round in rotating order, between CUDA events; kernels shorter than their
launch are replayed from a CUDA graph. After a few rounds the fastest five meet the present configuration again, and only
these rounds count: among many candidates the luckiest looks fast once. `gain` is the median over rounds of
present / candidate, minus 1, and `spread` the interquartile range of these ratios divided by their median.

*Judge.* A candidate has to win by more than the spread, and its outputs must be as close to float64 as the others': an
error of at most the factor and slack of the operator's error budget, with the smallest error among those that are judged
(the present configuration included) in the place of the naive form's. Tile sizes change the order of sums and nothing else.

*Keep.* A winner is written to the cache at once, merged with earlier entries. Where nobody wins nothing is written.
"""

from attnkit._core.lazy import lazy_attributes

__all__ = ["TUNABLES", "Tunable", "run"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "TUNABLES": "attnkit.lab.tune.tunables",
        "Tunable": "attnkit.lab.tune.tunables",
        "run": "attnkit.lab.tune.runner",
    },
)
