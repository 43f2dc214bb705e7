"""What the paper on failing low-precision training says, scaled down until it runs while one waits.

Four parts: "bias" (the table of biased rounding), "algebra" (what an error of delta does to gradients), "training" (small
models on a task full of ties, with a dose of lost bits) and "text" (a model of ten million parameters on bytes, for a GPU).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from attnkit import assets, report
from attnkit._core.checks import check_choice
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.numerics.identities import bias_table, gradient_identities
from attnkit.lab.numerics.memory import Memory
from attnkit.lab.numerics.simulate import Arm, Training, majority_batches, text_batches, train

__all__ = ["PARTS", "SCHEMA", "Part", "Reproduction"]

SCHEMA = "attnkit.reproduce/1"
Part = Literal["bias", "algebra", "training", "text"]
PARTS: tuple[Part, ...] = get_args(Part)
_FILE = "reproduce"

_DOSE = 4  # bits of the arms that are to help
TRAINING_ARMS = (
    Arm("rounded once", policy="kernel"),
    *(Arm(f"running output, {bits} bits", bits=bits) for bits in (8, 7, 6, 5, _DOSE)),
    *(Arm(f"{_DOSE} bits, dynamic maximum, beta {b:g}", bits=_DOSE, stable="dynamic_max", beta=b) for b in (2.0, 4.0, 7.0)),
    Arm(f"{_DOSE} bits, delta", bits=_DOSE, stable="delta"),
    Arm(f"{_DOSE} bits, exact delta", bits=_DOSE, stable="exact_delta"),
    Arm(f"{_DOSE} bits, 0.5 above the maximum", bits=_DOSE, offset=0.5),
)
TEXT_ARMS = (
    Arm("running output in bf16"),
    Arm("running output in bf16, dynamic maximum, beta 7", stable="dynamic_max", beta=7.0),
    Arm("running output in bf16, exact delta", stable="exact_delta"),
    Arm("kernel", policy=None),
    Arm("kernel, delta", policy=None, stable="delta"),
    Arm("kernel, exact delta", policy=None, stable="exact_delta"),
)


@dataclass(frozen=True)
class _Job:
    """A part of the work that is done or not.

    Attributes:
        name: in the file's memory.
        rows: does it.
    """

    name: str
    rows: Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Reproduction:
    """What is run.

    Attributes:
        parts: of PARTS.
        seeds: of trainings: inputs and weights.
        steps: of a training.
        bias_rows: rows of attention in the table of biased rounding.
        layers, dim, heads, context, batch: of the model that reads text.
        text: what it reads, an asset or a file.
    Raises:
        OptionError: an unknown part, nothing to do, or a number below 1.
    """

    parts: tuple[Part, ...] = ("bias", "algebra", "training")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    bias_rows: int = 40_000
    layers: int = 6
    dim: int = 384
    heads: int = 6
    context: int = 256
    batch: int = 16
    text: str = "stdlib"

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        if not self.parts or not self.seeds:
            raise OptionError("parts or seeds is empty; give at least one")
        if min(self.steps, self.bias_rows, self.layers, self.dim, self.heads, self.context, self.batch) < 1:
            raise OptionError("steps, bias_rows and the sizes of the model must be at least 1")

    def run(
        self,
        out: Path | None = None,
        *,
        device: str | torch.device = "cpu",
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        command: str | None = None,
    ) -> dict[str, Any]:
        """Do everything.

        Args:
            out: folder for reproduce.json and reproduce.html; None writes nothing.
            device: of the trainings; "bias" and "algebra" run on the CPU.
            resume: keep what the file in `out` is done with.
            on_event: called as the work goes on.
            command: the command line to record; None records this call.
        Returns:
            the envelope of attnkit.reproduce/1: rows with "part" and what `bias_table`, `gradient_identities` and `train` say.
        Raises:
            OptionError: the file is unfinished and `resume` is not set, or is of another run and it is.
            MissingAsset, InputError: the text is not there, or too short.
        """
        place = torch.device(device)
        rules = {name: getattr(self, name) for name in self.__dataclass_fields__}
        memory = Memory(
            None if out is None else out / f"{_FILE}.json", schema=SCHEMA, what="reproduction", rules=rules,
            command=command or f"attnkit.lab.numerics.{self!r}.run()", device=device_name(place), dtype="bf16",
            resume=resume,
        )  # fmt: skip
        jobs = list(self._jobs(place))
        todo = [job for job in jobs if job.name not in memory.finished]
        tell, done = on_event or (lambda event: None), len(jobs) - len(todo)
        tell(Event("plan", "", done, len(jobs)))
        for count, job in enumerate(todo, done + 1):
            memory.add(job.name, job.rows())
            tell(Event("step", job.name, count, len(jobs)))
        document = memory.save(complete=True)
        if out is not None:
            report.write_html(out / f"{_FILE}.html", [document])
        return document

    def _jobs(self, device: torch.device) -> Iterator[_Job]:
        if "bias" in self.parts:
            yield _Job("bias", lambda: [{"part": "bias", **row} for row in bias_table(self.bias_rows, 0)])
        if "algebra" in self.parts:
            yield _Job("algebra", lambda: [{"part": "algebra", **row} for row in gradient_identities(0)])
        for part, arms, run in (("training", TRAINING_ARMS, self._train), ("text", TEXT_ARMS, self._read)):
            if part in self.parts:
                yield from self._trainings(part, arms, run, device)

    def _trainings(
        self,
        part: str,
        arms: Sequence[Arm],
        run: Callable[[Arm, int, torch.device], list[dict[str, Any]]],
        device: torch.device,
    ) -> Iterator[_Job]:
        for seed in self.seeds:
            for arm in arms:

                def rows(arm: Arm = arm, seed: int = seed) -> list[dict[str, Any]]:
                    facts = {"part": part, "arm": arm.name, "bits": arm.bits, "seed": seed}
                    return [facts | row for row in run(arm, seed, device)]

                yield _Job(f"{part}: {arm.name}, seed {seed}", rows)

    def _train(self, arm: Arm, seed: int, device: torch.device) -> list[dict[str, Any]]:
        """The tie-rich task: two layers without positions, so that equal tokens are equal keys."""
        from attnkit.training import new_model

        model = new_model(vocab_size=8, dim=64, layers=2, heads=2, positions=48, mixer="attention_nope", seed=seed)
        batches = majority_batches(seed, batch=8, length=48, alphabet=8)
        moved = ((ids.to(device), targets.to(device)) for ids, targets in batches)
        return train(model.to(device), moved, arm, Training(self.steps, 3e-3))

    def _read(self, arm: Arm, seed: int, device: torch.device) -> list[dict[str, Any]]:
        from attnkit.training import new_model

        model = new_model(vocab_size=256, dim=self.dim, layers=self.layers, heads=self.heads, positions=self.context, seed=seed)
        text = "\n".join(document.text for document in assets.load_text(self.text)).encode()
        batches = text_batches(text, seed, batch=self.batch, length=self.context, device=device)
        return train(model.to(device), batches, arm, Training(self.steps, 2e-3))
