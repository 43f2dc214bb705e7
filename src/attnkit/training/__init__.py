"""Training on transformers' Trainer: packed texts, synthetic tasks, recipes, exact resuming, meters."""

from attnkit._core.lazy import require

for _package in ("transformers", "accelerate"):
    require(_package, extra="train")  # where one is missing, this says how to get it

from attnkit.training.baselines import KneserNey  # noqa: E402
from attnkit.training.callbacks import SnapshotCallback  # noqa: E402
from attnkit.training.checkpoints import last_complete  # noqa: E402
from attnkit.training.data import PackedRows, TextData, Work, load_text_data, pack  # noqa: E402
from attnkit.training.evaluate import Validation, validate  # noqa: E402
from attnkit.training.model import load_model, new_model  # noqa: E402
from attnkit.training.recipe import Recipe  # noqa: E402
from attnkit.training.run import train  # noqa: E402
from attnkit.training.tasks import TASKS, Examples, Score, TaskData, score  # noqa: E402
from attnkit.training.tokenizers import TOKENIZERS, TextTokenizer, load_tokenizer  # noqa: E402
from attnkit.training.trainer import TrainingData, make_trainer  # noqa: E402

__all__ = [
    "TASKS",
    "TOKENIZERS",
    "Examples",
    "KneserNey",
    "PackedRows",
    "Recipe",
    "Score",
    "SnapshotCallback",
    "TaskData",
    "TextData",
    "TextTokenizer",
    "TrainingData",
    "Validation",
    "Work",
    "last_complete",
    "load_model",
    "load_text_data",
    "load_tokenizer",
    "make_trainer",
    "new_model",
    "pack",
    "score",
    "train",
    "validate",
]
