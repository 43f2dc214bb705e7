"""Where a cell works: its folder, the device, whoever listens, and trainings that go on where they were."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnkit import report
from attnkit._core.events import Event
from attnkit.assets import load_text
from attnkit.modules import AlphaSchedule

if TYPE_CHECKING:
    from attnkit.training import Recipe, TextData

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """What a cell is given.

    Attributes:
        folder: of all trainings of the claim.
        device: where to compute.
        tell: told (share of the cell that is done, what is being done).
    """

    folder: Path
    device: torch.device
    tell: Callable[[float, str], None]

    @property
    def precision(self) -> str:
        """Of trainings: "bf16" on a GPU, "fp32" on a CPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def run_folder(self, name: str) -> Path:
        """Where the training of this name is, or will be."""
        return self.folder / name.replace(", ", "-").replace(" ", "-")

    def train(
        self,
        name: str,
        model: Any,
        data: Any,
        recipe: "Recipe",
        *,
        alpha: AlphaSchedule | None = None,
        validation_rows: int = 64,
    ) -> tuple[dict[str, Any], Any]:
        """Train, or go on with a training of this name, or find it done.

        Args:
            name: of the run, by convention the cell's.
            model, data, recipe, alpha, validation_rows: see `attnkit.training.train`.
        Returns:
            the result of attnkit.train/1, and the trained model on the device, in evaluation mode.
        """
        from attnkit import training

        out = self.run_folder(name)
        if (out / "train.json").is_file():
            document = report.read_envelope(out / "train.json")
        else:
            document = training.train(
                model, data, recipe, out, resume=(out / "run.json").is_file(), device=self.device.type, alpha=alpha,
                validation_rows=validation_rows, on_event=self._hear,
            )  # fmt: skip
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return document, self.load(name)

    def load(self, name: str) -> Any:
        """The model of a finished training, on the device and in evaluation mode."""
        from attnkit import training

        return training.load_model(self.run_folder(name))[0].to(self.device)

    def text(self, source: str, *, row_tokens: int, length: int, rows: int, seed: int, joined: bool = False) -> "TextData":
        """A text, byte by byte; see `attnkit.training.load_text_data`.

        Args:
            source, row_tokens, rows, seed: as there.
            length: tokens of the longest sequence.
            joined: all documents one after the other, in an order drawn once, as one: then sequences have the full length.
        """
        from attnkit import training

        if joined:
            source = str(self._joined(source))
        return training.load_text_data(
            source, training.load_tokenizer("bytes"), row_tokens=row_tokens, max_length=length, rows=rows, seed=seed,
            on_phase=lambda phase: self.tell(0.0, phase),
        )  # fmt: skip

    def _joined(self, source: str) -> Path:
        path = self.folder / "joined.txt"
        if not path.is_file():
            self.tell(0.0, f"joining the documents of {Path(source).name}")
            texts = [document.text for document in load_text(source)]
            random.Random(0).shuffle(texts)
            report.write_text(path, "\n\n".join(texts))
        return path

    def _hear(self, event: Event) -> None:
        if event.kind == "step":
            self.tell(event.done / max(event.total, 1), event.text)
