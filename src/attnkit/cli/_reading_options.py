"""The options of verbs that let a trained model read batches of a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["reading_options"]

Command = Callable[..., Any]


def reading_options(batches: int, least: int = 1) -> Callable[[Command], Command]:
    """--model, --text, --batches, --batch, --length, --rows and --precision, as `read_batches` and looks at calls take them.

    Args:
        batches: the default.
        least: of them.
    """
    options = (
        click.option(
            "--model",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            required=True,
            metavar="DIR",
            help="The --out of a finished attnkit train.",
        ),
        click.option("--text", metavar="ASSET|FILE", help="What it reads.  [default: the one it was trained on]"),
        click.option(
            "--batches", type=click.IntRange(min=least), default=batches, show_default=True, help="Samples of each head."
        ),
        click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences of a batch."),
        click.option(
            "--length", type=click.IntRange(min=2), help="Tokens of a sequence.  [default: 256, or what the model has]"
        ),
        click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Sampled rows of a call."),
        click.option(
            "--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of matrix products."
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
