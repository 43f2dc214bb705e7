"""`attnkit numerics weights-study`: five trainings that show what flash attention changes in weights."""

import shlex
import sys
from pathlib import Path

import click

from attnkit._core.errors import OptionError
from attnkit.cli._common import (
    device_option,
    emit,
    json_option,
    out_option,
    quiet_option,
    resolve_device,
    resume_option,
    seed_option,
    verb,
)
from attnkit.cli._listener import Listener
from attnkit.cli.numerics_weights import tables

__all__ = ["command"]

_SIZE = click.IntRange(min=1)


@verb(
    "weights-study",
    examples=(
        "attnkit numerics weights-study --steps 300 --out study",
        "attnkit numerics weights-study --steps 1000 --every 50 --dim 384 --layers 6 --heads 6 --context 512 --out study",
    ),
    python=(
        "from attnkit.lab.numerics.weight_study import WeightStudy\n"
        "result = WeightStudy(steps=300).run(out)"
    ),
    memory_hint="finished trainings are kept; use a smaller --batch, --context or --dim",
)  # fmt: skip
@click.option("--steps", type=_SIZE, default=300, show_default=True, help="Optimizer steps of each training.")
@click.option("--every", type=_SIZE, default=25, show_default=True, help="Steps between comparisons.")
@click.option("--text", default="stdlib", show_default=True, metavar="ASSET|FILE", help="As of `attnkit train lm`.")
@click.option("--dim", type=_SIZE, default=128, show_default=True, help="Width of the model.")
@click.option("--layers", type=_SIZE, default=2, show_default=True, help="Blocks.")
@click.option("--heads", type=_SIZE, default=2, show_default=True, help="Attention heads.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of the longest sequence.")
@click.option("--batch", type=_SIZE, default=4, show_default=True, help="Contexts a step.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True, help="Learning rate.")
@device_option
@seed_option
@out_option
@resume_option
@json_option
@quiet_option
def command(
    steps: int,
    every: int,
    text: str,
    dim: int,
    layers: int,
    heads: int,
    context: int,
    batch: int,
    lr: float,
    device: str,
    seed: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a small model with baseline and with flash attention in bf16, and three runs to measure their distance against.

    The three differ from the baseline in their random start, in float32, and in nothing. Every training is a folder in --out
    (default: attnkit-weights) that `attnkit numerics weights` reads; weights.json, weights.html, weights.svg and weights.png
    are written beside them. A CPU computes with one thread, so that a repetition is exact. Ctrl-C keeps what is done.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-weights")
    if place.index:
        raise OptionError(f"--device {device}: the trainer takes the first visible GPU; set CUDA_VISIBLE_DEVICES={place.index}")
    from attnkit.lab.numerics.weight_study import WeightStudy

    study = WeightStudy(
        steps=steps, every=every, text=text, dim=dim, layers=layers, heads=heads, context=context, batch=batch,
        learning_rate=lr, seed=seed,
    )  # fmt: skip
    with Listener("training, tokens", folder, silent=quiet or as_json, unit="tokens").listening() as listener:
        document = study.run(
            folder, device=place.type, resume=resume, on_event=listener.hear, command=shlex.join(["attnkit", *sys.argv[1:]])
        )
    emit(document, as_json, *tables(document), f"page: {folder / 'weights.html'}   data: {folder / 'weights.json'}")
