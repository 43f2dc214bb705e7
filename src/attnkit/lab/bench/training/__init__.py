"""The race of training: our decoder under `attnkit.training` against transformers' Llama under its own Trainer.

*Contestants.* The same sizes, the same initial weights, the same rows in the same order, the same optimizer, schedule,
clipping and number format. Ours goes through `attnkit.training.make_trainer`, the peer through a `Trainer` that is set up
here by transformers' documentation. The time of a step is whatever passes in `Trainer.train()` between the ends of two
steps: data, forward, backward, clipping, optimizer, schedule, callbacks.

*Rounds.* One run is `steps` optimizer steps from the initial weights, in a fresh trainer. A first round, which is not
timed, reads the loss after every step. Where the losses differ nobody is timed. In the rounds after it both run once, in
turns first; their first steps do not count, and the loss is read at the end only, so that nobody waits for it. Its mean
must be that of the first round.
"""

from attnkit._core.lazy import require

for _package in ("transformers", "accelerate"):
    require(_package, extra="train")  # where one is missing, this says how to get it

from attnkit.lab.bench.training.run import run_training  # noqa: E402

__all__ = ["run_training"]
