"""Where a cell works: its folder, the device, whoever listens, and trainings that go on where they were."""

import dataclasses
import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnkit import report
from attnkit._core.events import Event
from attnkit.modules import AlphaSchedule
from attnkit.report.resuming import require_same

if TYPE_CHECKING:
    from attnkit.training import PackedRows, Recipe, TextData

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
    ) -> dict[str, Any]:
        """Train, or go on with a training of this name, or find it done.

        Args:
            name: of the run, by convention the cell's.
            model, data, recipe, alpha, validation_rows: see `attnkit.training.train`.
        Returns:
            the result of attnkit.train/1.
        Raises:
            OptionError: the training of this name has another model, data or recipe.
        """
        from attnkit import training
        from attnkit.training.run import run_facts

        out = self.run_folder(name)
        if (out / "train.json").is_file():
            document = report.read_envelope(out / "train.json")
            require_same(out / "train.json", document, run_facts(model, data, recipe, alpha))
        else:
            if self.device.type == "cuda":  # the peak of each training is its own
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            document = training.train(
                model, data, recipe, out, resume=(out / "run.json").is_file(), device=self.device.type, alpha=alpha,
                validation_rows=validation_rows, on_event=self._hear,
            )  # fmt: skip
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return document

    def load(self, name: str) -> Any:
        """The language model of a finished training, on the device and in evaluation mode."""
        from attnkit import training

        return training.load_model(self.run_folder(name))[0].to(self.device)

    def text(self, source: str, *, row_tokens: int, length: int, rows: int, seed: int, joined: bool = False) -> "TextData":
        """A text, byte by byte; see `attnkit.training.load_text_data`.

        Args:
            source, row_tokens, rows, seed: as there.
            length: tokens of the longest sequence.
            joined: the documents of either side of the split follow each other as one, so that sequences have the full length.
        """
        from attnkit import training

        data = training.load_text_data(
            source, training.load_tokenizer("bytes"), row_tokens=row_tokens, max_length=length, rows=rows, seed=seed,
            on_phase=lambda phase: self.tell(0.0, phase),
        )  # fmt: skip
        if not joined:
            return data

        def packed(documents: Sequence[np.ndarray], rows: int | None, seed: int | None) -> "PackedRows":
            order = np.random.default_rng(0).permutation(len(documents))
            tokens = np.concatenate([documents[number] for number in order])
            return training.PackedRows(
                tokens, np.array([[0, len(tokens)]]), row_tokens=row_tokens, max_length=length, rows=rows, seed=seed
            )

        return dataclasses.replace(
            data, train=packed(data.train_documents, rows, seed), validation=packed(data.validation_documents, None, None),
            facts={**data.facts, "joined": True},
        )  # fmt: skip

    def _hear(self, event: Event) -> None:
        if event.kind == "step":
            self.tell(event.done / max(event.total, 1), event.text)
