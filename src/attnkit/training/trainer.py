"""transformers' Trainer, set up: nothing here trains by itself."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from attnkit._core.errors import InputError, UnsupportedError
from attnkit._core.events import Event
from attnkit.modules import AlphaSchedule
from attnkit.training.callbacks import AlphaCallback, JournalCallback, RedrawCallback, SealCallback, StopCallback
from attnkit.training.data.packing import Row
from attnkit.training.model import compile_parts
from attnkit.training.recipe import Recipe

__all__ = ["TrainingData", "journal_of", "make_trainer"]

VALIDATION_ROWS = 64
_KEPT_CHECKPOINTS = 2  # the newest may be half written when a run ends


class TrainingData(Protocol):
    """What can be trained on: rows, made in any order, with their work known beforehand."""

    @property
    def train(self) -> Any:
        """A map-style dataset of whole batches with `work(index)`."""
        ...

    @property
    def validation(self) -> Any:
        """The same, kept apart."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """For result files."""
        ...


def make_trainer(
    model: Any,
    data: TrainingData,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    validation_rows: int = VALIDATION_ROWS,
    on_event: Callable[[Event], None] = lambda event: None,
    alpha: AlphaSchedule | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    options: Mapping[str, Any] | None = None,
) -> Trainer:
    """Build a plain `transformers.Trainer` with our data, recipe and callbacks.

    Start it with `trainer.train()`, or `trainer.train(resume_from_checkpoint=last_complete(out))`. A resumed run has the
    losses of one that was never interrupted: rows are functions of their number, and weights, optimizer, schedule and random
    states come from the checkpoint.

    Args:
        model: a causal language model of transformers, or of `attnkit.models`.
        data: see `load_text_data` and `TaskData`.
        recipe: see `Recipe`.
        out: folder for `log.jsonl` and `checkpoint-*`.
        device: "auto", "cpu" or "cuda".
        validation_rows: rows of text that a validation reads at most; tasks are always read whole.
        on_event: told the progress, in tokens.
        alpha: where the alpha of the model's entmax layers goes; in a compiled model by four jumps, else with every step.
        callbacks: further ones, for example a `SnapshotCallback`.
        options: further fields of `transformers.TrainingArguments`, for example {"gradient_checkpointing": True}.
    Raises:
        InputError: the data has more tokens in its vocabulary or its sequences than the model, or too few rows.
        OptionError: a schedule of alpha, and no entmax layer that it could be for.
    """
    _check(model, data, recipe)
    if recipe.compile:
        compile_parts(model)
    scheduled = []
    if alpha is not None:
        alpha.apply(model)  # refuses models that have no use for it
        scheduled = [AlphaCallback(alpha, data, recipe)]
    logged = JournalCallback(data, recipe, out, on_event=on_event, validation_rows=validation_rows)
    trainer = Trainer(
        model=model,
        args=_arguments(recipe, out, device, options or {}),
        train_dataset=_OneByOne(data.train),
        data_collator=_unwrap,
        callbacks=[StopCallback(), RedrawCallback(), *scheduled, logged, SealCallback(), *callbacks],
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    _check_rows(data, recipe, trainer.args.world_size)
    return trainer


def journal_of(trainer: Trainer) -> JournalCallback:
    """The callback of a trainer that keeps the log and the meters."""
    return next(found for found in trainer.callback_handler.callbacks if isinstance(found, JournalCallback))


def _arguments(recipe: Recipe, out: Path, device: str, options: Mapping[str, Any]) -> TrainingArguments:
    on_gpu = device != "cpu" and torch.cuda.is_available()
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": 1,  # a row is a whole batch
        "gradient_accumulation_steps": recipe.accumulate,
        "train_sampling_strategy": "sequential",  # rows are shuffled already, and must come in order to go on exactly
        "optim": "adamw_torch_fused",
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "max_grad_norm": recipe.clip,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": recipe.decay_steps, "decay_type": "linear"},
        "warmup_steps": recipe.warmup_steps,
        "bf16": recipe.precision == "bf16",
        "seed": recipe.seed,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_every or recipe.steps,
        "save_total_limit": _KEPT_CHECKPOINTS,
        "eval_strategy": "no",
        "ddp_find_unused_parameters": False,  # looking for them costs a walk over the graph each step
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},  # the copy of a row would wait for the step before
        "use_cpu": device == "cpu",
    }
    clash = sorted(set(options) & {"max_steps", "per_device_train_batch_size", "train_sampling_strategy", "save_total_limit"})
    if clash:
        raise UnsupportedError(f"options={', '.join(clash)}: exact resuming rests on these; leave them out")
    arguments = TrainingArguments(**{**fields, **options})
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # torch's DataParallel would split rows apart; several GPUs are served by torchrun
    return arguments


class _OneByOne(Dataset[Row]):
    """The rows as the Trainer counts them; a process may ask for any."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row: Row = self._rows[index]
        return row


def _unwrap(rows: list[Row]) -> Row:
    """The collator: one row is a batch."""
    (row,) = rows
    return row


def _check(model: Any, data: TrainingData, recipe: Recipe) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and data.max_length > positions:
        raise InputError(
            f"the data has sequences of {data.max_length} tokens, and the model {positions} positions; shorten the "
            f"sequences (--context, --lengths), or raise max_position_embeddings"
        )
    if data.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the data has {data.vocab_size:,} token ids, and the model a vocabulary of {model.config.vocab_size:,}; "
            f"train with the tokenizer that the model was made for"
        )


def _check_rows(data: TrainingData, recipe: Recipe, world_size: int) -> None:
    needed = recipe.steps * recipe.accumulate * world_size
    if len(data.train) < needed:
        raise InputError(
            f"the data has {len(data.train):,} rows, and {recipe.steps:,} steps of {recipe.accumulate} row(s) on "
            f"{world_size} device(s) need {needed:,}; make the data with rows={needed}"
        )
