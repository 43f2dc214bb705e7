"""Does flash attention change what a model learns? Five trainings that differ in one thing each, and their weights."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnkit import report, training
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.numerics.divergence import WeightDivergence, save_divergence
from attnkit.lab.numerics.stored_attention import BASELINE
from attnkit.report.resuming import require_same

__all__ = ["ARMS", "Arm", "WeightStudy"]

_SETTINGS = "study.json"
_CHECKPOINTS = 4  # snapshots between checkpoints


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        mixer: "attention_baseline" stores scores and probabilities in the number format, "attention" does not.
        precision: of the recipe.
        other_seed: whether the weights begin elsewhere.
    """

    mixer: str = BASELINE
    precision: str = "bf16"
    other_seed: bool = False


ARMS = {
    "baseline": Arm(),
    "flash": Arm(mixer="attention"),
    "other-init": Arm(other_seed=True),
    "fp32": Arm(precision="fp32"),
    "repeat": Arm(),
}


@dataclass(frozen=True)
class WeightStudy:
    """The same small language model trained with baseline and with flash attention in bf16, and three reference runs.

    All read the same rows in the same order. The format is bf16, because that is what `attnkit.training` trains in beside
    float32.

    Attributes:
        steps: optimizer steps of each run.
        every: steps between snapshots.
        text: what is read, byte by byte; see `attnkit.training.load_text_data`.
        dim, layers, heads: of the model.
        context: tokens of the longest sequence.
        batch: contexts a step.
        learning_rate: of the recipe.
        seed: of weights and data.
    Raises:
        OptionError: a number below 1.
    """

    steps: int = 300
    every: int = 25
    text: str = "stdlib"
    dim: int = 128
    layers: int = 2
    heads: int = 2
    context: int = 256
    batch: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is not allowed; choose 1 or more")

    def run(
        self,
        out: Path,
        *,
        device: str = "auto",
        resume: bool = False,
        on_event: Callable[[Event], None] = lambda event: None,
        command: str | None = None,
    ) -> dict[str, Any]:
        """Train every arm into its own folder and compare their weights.

        On a CPU one thread is used, whatever is set: sums in bf16 depend on the number of threads there.

        Args:
            out: folder of the study; gets a run of `attnkit.training` for each arm and the files of `save_divergence`.
            device: "auto", "cpu" or "cuda".
            resume: keep the arms that are done, and go on with one that was interrupted.
            on_event: told the progress, in tokens.
            command: the command line to record; None records this call.
        Returns:
            the envelope of attnkit.weights/1, with the study's settings, losses, data and threads.
        Raises:
            OptionError: the folder holds a study and `resume` is not set, or holds another one.
            KeyboardInterrupt: a signal asked to stop; a checkpoint was written before.
        """
        started = time.monotonic()
        place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self._claim(out, device_name(place), resume=resume)
        with _one_thread(place):
            data = training.load_text_data(
                self.text, training.load_tokenizer("bytes"), row_tokens=self.batch * self.context,
                max_length=self.context, rows=self.steps, seed=self.seed,
                on_phase=lambda phase: on_event(Event("phase", phase, 0, 0)),
            )  # fmt: skip
            done, tokens = sum((out / name / "train.json").is_file() for name in ARMS), self.steps * self.batch * self.context
            on_event(Event("plan", "", done * tokens, len(ARMS) * tokens))
            for name, arm in ARMS.items():
                if not (out / name / "train.json").is_file():
                    listener = _shifted(on_event, name, done * tokens, len(ARMS) * tokens)
                    self._train(arm, data, out / name, place, listener)
                    done += 1
            runs = WeightDivergence(
                out / "baseline", out / "flash", random_init=out / "other-init", precision=out / "fp32", repeat=out / "repeat"
            )
            on_event(Event("phase", "comparing weights", len(ARMS) * tokens, len(ARMS) * tokens))
            divergence = runs.compare(device=place)
            threads = torch.get_num_threads()
        results = {name: report.read_envelope(out / name / "train.json") for name in ARMS}
        document = runs.document(
            divergence, margin=None, device=place, started=started,
            command=command or f"attnkit.lab.numerics.weight_study.{self!r}.run(...)",
            extra={
                "study": dataclasses.asdict(self),
                "data": data.facts,
                "parameters": results["baseline"]["model"]["parameters"],
                "losses": {name: result["rows"][-1]["validation_loss"] for name, result in results.items()},
                "threads": threads if place.type == "cpu" else None,
            },
        )  # fmt: skip
        save_divergence(out, document)
        return document

    def _claim(self, out: Path, device: str, *, resume: bool) -> None:
        """Write down what the folder is for, or see that it is for this."""
        path, now = out / _SETTINGS, report.plain(dataclasses.asdict(self) | {"device": device, "versions": report.versions()})
        if path.is_file():
            if not resume:
                raise OptionError(f"{out} holds a study; go on with resume (--resume), or choose another out (--out)")
            require_same(out, report.read_envelope(path)["rows"][0], now)
        report.write_json(path, {"schema": "attnkit.weight-study/1", "rows": [now]})

    def _train(self, arm: Arm, data: Any, out: Path, device: torch.device, on_event: Callable[[Event], None]) -> None:
        model = training.new_model(
            vocab_size=data.vocab_size, dim=self.dim, layers=self.layers, heads=self.heads, positions=self.context,
            mixer=arm.mixer, seed=self.seed + arm.other_seed,
        )  # fmt: skip
        recipe = training.Recipe(
            steps=self.steps, learning_rate=self.learning_rate, precision=arm.precision, seed=self.seed,
            log_every=self.every, save_every=_CHECKPOINTS * self.every,
        )  # fmt: skip
        training.train(
            model, data, recipe, out, resume=(out / "run.json").is_file(), device=device.type, on_event=on_event,
            callbacks=[training.SnapshotCallback(self.every)],
        )  # fmt: skip


def _shifted(on_event: Callable[[Event], None], arm: str, before: int, total: int) -> Callable[[Event], None]:
    """What an arm tells, as part of the whole."""

    def tell(event: Event) -> None:
        if event.kind != "plan":
            on_event(Event(event.kind, f"{arm}, {event.text}", before + event.done, total))

    return tell


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
