"""The two contestants: each a Trainer that is ready to train, from the same initial weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from attnkit import training
from attnkit.lab.bench.race import OWN
from attnkit.lab.bench.training.rows import RaceData
from attnkit.models import AttnkitDecoderConfig, from_llama, llama_config
from attnkit.training.callbacks import StopCallback

__all__ = ["MASKED", "PEER", "SIDES", "Setup", "initial_llama", "make_recipe"]

PEER = "transformers-llama"
_ATTENTION = "sdpa"
# what it does with packed sequences, and with every batch when it is compiled, which no longer lets it look at values
MASKED = f"{PEER} writes the mask out, a boolean for each pair of tokens of a row, and repeats keys and values for the heads"


@dataclass(frozen=True)
class Setup:
    """What both sides have in common.

    Attributes:
        llama: the initial weights, on the CPU in float32; never trained itself.
        recipe: of the run; where it compiles, ours compiles blocks and loss, and the peer the whole model.
        device: where to train.
        data: what is trained on.
    """

    llama: LlamaForCausalLM
    recipe: training.Recipe
    device: torch.device
    data: RaceData


def initial_llama(config: AttnkitDecoderConfig, seed: int) -> LlamaForCausalLM:
    """Draw the initial weights of both sides as transformers does; torch's generator is left alone.

    Args:
        config: of our decoder.
        seed: of the weights.
    Raises:
        UnsupportedError: Llama has no such parts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = AutoModelForCausalLM.from_config(llama_config(config), attn_implementation=_ATTENTION)
    assert isinstance(llama, LlamaForCausalLM)
    return llama


def make_recipe(*, steps: int, precision: str, seed: int, compiled: bool) -> training.Recipe:
    """A short run that has every phase of the schedule; the loss is read after every step."""
    return training.Recipe(
        steps=steps, warmup=0.25, decay=0.25, precision=precision, compile=compiled, seed=seed, log_every=1
    )  # fmt: skip


def _ours(setup: Setup, out: Path) -> Trainer:
    """Our decoder, as `attnkit train` trains it; checkpoints are left out."""
    trainer = training.make_trainer(
        from_llama(setup.llama), setup.data, setup.recipe, out, device=setup.device.type, options={"save_strategy": "no"}
    )
    trainer.remove_callback(StopCallback)  # Ctrl-C ends the race, not the run
    return trainer


def _theirs(setup: Setup, out: Path) -> Trainer:
    """transformers' Llama under a plain Trainer. Packed sequences it knows by `position_ids` alone."""
    recipe = setup.recipe
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # a row of the data is a whole batch
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"},
        warmup_steps=recipe.warmup_steps,
        bf16=recipe.precision == "bf16",
        tf32=False,  # with torch_compile it would be on, for the whole process
        torch_compile=recipe.compile,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": setup.device.type == "cuda"},
        use_cpu=setup.device.type == "cpu",
    )
    trainer = Trainer(
        model=copy.deepcopy(setup.llama),
        args=arguments,
        train_dataset=setup.data.train.only("input_ids", "labels", "position_ids"),
        data_collator=lambda rows: rows[0],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


SIDES: dict[str, Callable[[Setup, Path], Trainer]] = {OWN: _ours, PEER: _theirs}
