"""Races: an operator of ours against its peers, interleaved in one process on the same inputs.

The protocol, the same for every operator, pass and shape:

*Inputs* are normal random numbers, drawn on the device from one seed, in the operator's own layout. Every contestant gets
the same tensors; a peer with another layout gets views of them.

*Conformance.* Before a contestant is timed its outputs (and gradients, where the pass has them) are judged against float64
on a reduced shape of the same kind, with the error budget of the operator's `OpSpec`. Who fails is refused with the reason.
Who is not installed, cannot do a shape or breaks on it is listed under `skipped` with the reason.

*Baselines* compute something else, and are what an operator that leaves work out must be faster than (`Peer(...,
same_result=False)`). Their time and memory are measured; nobody judges their numbers; rows call them by their name and a star,
and their `note` says what they are.

*Time.* Everybody is warmed up, then runs once a round, in an order that changes from round to round, after one round that
does not count. One measurement is as many calls as fill 50 ms, between two CUDA events on a GPU, by the clock on a CPU.
`ours_ms` and `peer_ms` are medians over rounds, `ratio` is peer_ms / ours_ms, and `spread` is the interquartile range of
the ratios of single rounds divided by their median: what slows a whole round cancels out of it.

*Decoding.* The steps "decode" and "step" are bound by memory. Their calls walk over copies of the inputs that together are
three times as large as the last-level cache, so that every call reads its keys and values from memory. On a GPU the calls
are captured in a CUDA graph and replayed, because a plain loop would measure Python; where capture fails plain calls are
timed and the row's `note` says so.

*Memory.* `peak_mib` is the largest memory during one call beyond what was allocated before it (the inputs).

*First call.* `first_call_s` is the time of our first call of a shape in this process, before anything else of that shape.
Triton's cache on disk is replaced by an empty folder for the length of the race, so compiling is part of it; kernels that an
earlier shape of the same race has compiled are not compiled again. It is null where kernels of ours were loaded before
the race began. `peer_first_call_s` is the peer's, what it makes beforehand included, before it is judged, which would compile
kernels for it.

*Inputs.* A race may vary more than sizes (`vary`). What it measures of its inputs are the `facts` of a row.

*Work.* `tflops` counts the operator's multiplications and additions as its race defines them. `bandwidth_share` is the
traffic that a decoding step cannot avoid, divided by our time and by `copy_gb_s`, the rate at which this device copied
memory in the same run. Races of operators that do little else than read and write have it in all passes, and no `tflops`.
"""

from attnkit._core.lazy import lazy_attributes

__all__ = ["OWN", "RACES", "Peer", "Race", "Shape", "run", "run_training"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "OWN": "attnkit.lab.bench.race",
        "RACES": "attnkit.lab.bench.races",
        "Peer": "attnkit.lab.bench.race",
        "Race": "attnkit.lab.bench.race",
        "Shape": "attnkit.lab.bench.race",
        "run": "attnkit.lab.bench.runner",
        "run_training": "attnkit.lab.bench.training",
    },
)
