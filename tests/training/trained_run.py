"""A run for tests in a process of its own: python trained_run.py TEXT OUT STEPS and the options below.

At `--stop-at` it writes `waiting` beside the log and sleeps until it is killed.
"""

import argparse
import time
from pathlib import Path

from training_examples import text_data, tiny

from attnkit import training
from attnkit._core.events import Event


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()

    def wait(event: Event) -> None:
        if event.kind == "step" and event.text.startswith(f"step {given.stop_at},"):
            (given.out / "waiting").touch()
            time.sleep(120)

    recipe = training.Recipe(
        steps=given.steps, learning_rate=3e-3, accumulate=given.accumulate, log_every=2, save_every=4, validate_every=8,
        precision=given.precision, compile=given.compile,
    )  # fmt: skip
    data = text_data(given.text, rows=given.steps * given.accumulate * given.world)
    training.train(tiny(), data, recipe, given.out, resume=given.resume, device=given.device, on_event=wait)


if __name__ == "__main__":
    main()
