"""`attnkit train`: language models on texts, and models on synthetic tasks."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from attnkit._core.errors import InputError, OptionError
from attnkit._core.events import Event
from attnkit.cli._common import emit, parse_lengths, parse_names, resolve_device, resolve_dtype, verb
from attnkit.cli._listener import Listener
from attnkit.cli._train_options import SIZE, model_options, recipe_options, shared_options

__all__ = ["command"]

_HINT = "checkpoints are kept; use a smaller --batch, --context or --dim, or --accumulate"


@verb(
    "lm",
    examples=(
        "attnkit train lm --text novels --tokenizer bytes --tokens 10M --dim 192 --layers 4 --heads 4 --out runs/novels",
        "attnkit train lm --text book.txt --tokenizer smollm2 --tokens 5M --out runs/book --resume",
    ),
    python="from attnkit import training\nresult = training.train(model, data, training.Recipe(steps=1000), out)",
    memory_hint=_HINT,
)
@click.option("--text", required=True, metavar="ASSET|FILE", help="novels, wiki, pubmed, stdlib, or a UTF-8 file.")
@click.option("--tokenizer", default="bytes", show_default=True, metavar="NAME", help="bytes or smollm2.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of the longest sequence.")
@click.option("--batch", type=SIZE, default=16, show_default=True, help="Contexts a row: a batch has batch x context tokens.")
@model_options
@recipe_options
@shared_options
def _lm(text: str, tokenizer: str, context: int, batch: int, seed: int, quiet: bool, as_json: bool, **rest: Any) -> None:
    """Train a language model on a text, packed into rows of batch x context tokens with exact document borders.

    The text is split by document; the validation side is never trained on. Writes log.jsonl, checkpoints, train.json,
    index.html, the loss curve and the model into --out. Ctrl-C saves a checkpoint.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    from attnkit import training

    def make(rows: int, listener: Listener) -> Any:
        return training.load_text_data(
            text,
            training.load_tokenizer(tokenizer),
            row_tokens=batch * context,
            max_length=context,
            rows=rows,
            seed=seed,
            on_phase=lambda phase: listener.hear(Event("phase", phase, 0, 0)),
        )

    _run(make, row_tokens=batch * context, positions=context, seed=seed, quiet=quiet, as_json=as_json, **rest)


@verb(
    "task",
    examples=(
        "attnkit train task mqar --lengths 64,128,256 --tokens 10M --dim 64 --heads 1 --out runs/mqar",
        "attnkit train task permutations --lengths 32 --tokens 20M --layers 4 --out runs/words",
    ),
    python=(
        "from attnkit import training\n"
        "task = training.TASKS['mqar']()\n"
        "data = training.TaskData.make(task, [64], row_tokens=4096, rows=1000, seed=0, validation_rows=4)\n"
        "result = training.train(model, data, training.Recipe(steps=1000), out)"
    ),
    memory_hint=_HINT,
)
@click.argument("name")
@click.option(
    "--lengths", default="64", show_default=True, callback=parse_lengths, metavar="N,..", help="Tokens of an example."
)
@click.option("--set", "settings", callback=parse_names, metavar="A=N,..", help="Fields of the task, e.g. alphabet=256.")
@click.option("--batch-tokens", type=SIZE, default=4096, show_default=True, help="Tokens of a batch.")
@model_options
@recipe_options
@shared_options
def _task(
    name: str,
    lengths: tuple[int, ...],
    settings: tuple[str, ...] | None,
    batch_tokens: int,
    seed: int,
    quiet: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Train a model on the synthetic task NAME: mqar, needle, needle-multikey, variables, copy, permutations or ruler.

    Every batch has examples of one of --lengths. Writes the same files as `attnkit train lm`, with exact scores.

    Exit codes: 3 a package is not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    from attnkit import training

    task = make_task(name, settings)

    def make(rows: int, listener: Listener) -> Any:
        return training.TaskData.make(
            task, lengths, row_tokens=batch_tokens, rows=rows, seed=seed, validation_rows=_VALIDATION_BATCHES
        )

    _run(make, row_tokens=batch_tokens, positions=max(lengths), seed=seed, quiet=quiet, as_json=as_json, **rest)


_VALIDATION_BATCHES = 4  # of every length


def make_task(name: str, settings: tuple[str, ...] | None) -> Any:
    """A registered task with the fields that `--set` gives.

    Raises:
        OptionError: an unknown task or field, or a value that is no positive integer.
    """
    import dataclasses

    from attnkit.training import TASKS

    kind: Any = TASKS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    chosen: dict[str, int] = {}
    for item in settings or ():
        field, _, value = item.partition("=")
        if field not in known or not value.isdigit() or int(value) < 1:
            raise OptionError(f"--set {item}: write FIELD=N; {name} has {', '.join(known)}")
        chosen[field] = int(value)
    return kind(**chosen)


def _run(
    make: Callable[[int, Listener], Any],
    *,
    row_tokens: int,
    positions: int,
    tokens: int,
    mixer: str,
    dim: int,
    layers: int,
    heads: int,
    accumulate: int,
    lr: float,
    weight_decay: float,
    alpha_schedule: tuple[float, float, int] | None,
    init: Path | None,
    compile: bool | None,
    save_every: int,
    out: Path,
    resume: bool,
    device: str,
    dtype: str,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    place = resolve_device(device)
    if place.index:
        raise OptionError(f"--device {device}: the trainer takes the first visible GPU; set CUDA_VISIBLE_DEVICES={place.index}")
    number_format = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    if number_format == "float16":
        raise OptionError(f"--dtype {dtype} is fp16 here, which is not trained in; use fp32, or bf16 where the GPU has it")
    precision = "bf16" if number_format == "bfloat16" else "fp32"
    from attnkit import training

    world, first = int(os.environ.get("WORLDSIZE", "1")), os.environ.get("RANK", "0") == "0"  # set by torchrun
    steps = max(1, round(tokens / (row_tokens * accumulate * world)))
    every = max(1, min(10, steps // 20))
    part = max(every, -(-(save_every or steps // 10) // every) * every)
    recipe = training.Recipe(
        steps=steps, learning_rate=lr, weight_decay=weight_decay, accumulate=accumulate, precision=precision,
        compile=place.type == "cuda" if compile is None else compile, seed=seed,
        log_every=every, save_every=part, validate_every=part,
    )  # fmt: skip
    with Listener("training, tokens", out, silent=quiet or as_json or not first, unit="tokens").listening() as listener:
        data = make(steps * accumulate * world, listener)
        model = training.new_model(
            vocab_size=data.vocab_size, dim=dim, layers=layers, heads=heads, positions=positions, mixer=mixer, seed=seed
        )
        if init is not None:
            _take_weights(model, init)
        document = training.train(
            model, data, recipe, out, resume=resume, device=place.type, on_event=listener.hear,
            alpha=_schedule(alpha_schedule, row_tokens * accumulate * world),
            command=shlex.join(["attnkit", *sys.argv[1:]]),
        )  # fmt: skip
    if first:
        emit(document, as_json, *_tables(document), f"page: {out / 'index.html'}   model: {out / 'model'}")


def _schedule(given: tuple[float, float, int] | None, step_tokens: int) -> Any:
    """`--alpha-schedule`, whose steps are counted in tokens."""
    from attnkit.modules import AlphaSchedule

    return None if given is None else AlphaSchedule(given[1], warmup_tokens=given[2] * step_tokens, start=given[0])


def _take_weights(model: Any, folder: Path) -> None:
    """Begin where another run ended.

    Raises:
        InputError: the model there has other parameters.
    """
    from attnkit import training

    try:
        model.load_state_dict(training.load_model(folder)[0].state_dict())
    except RuntimeError as error:
        raise InputError(
            f"--init {folder}: that model has other parameters; give the --dim, --layers and so on it has"
        ) from error


def _tables(document: dict[str, Any]) -> list[Any]:
    from attnkit.report import SECTIONS, Table, table

    section = SECTIONS[document["schema"]].draw(document)
    shown: list[Any] = [*section.lead, ""]
    for block in section.blocks:
        if isinstance(block, Table):
            shown += [table(block.headers, block.rows, title=block.title), ""]
    return shown


command = click.Group("train", commands=[_lm, _task], help="Train a model on a text or a synthetic task.")
