"""What the verbs of `attnkit train` are asked: sizes of the model, the recipe, and how these are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from attnkit.cli._common import device_option, dtype_option, json_option, quiet_option, seed_option

__all__ = ["SIZE", "model_options", "recipe_options", "shared_options"]


def _parse_tokens(ctx: click.Context, param: click.Parameter, value: str) -> int:
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits, unit = (value[:-1], units[value[-1:].lower()]) if value[-1:].lower() in units else (value, 1)
    try:
        tokens = float(digits) * unit
    except ValueError:
        tokens = 0.0
    if not 1 <= tokens < 10**15:
        raise click.BadParameter(f"{value!r} is no number of tokens; write 500k, 20M or 1.5B")
    return round(tokens)


def _parse_schedule(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float, int] | None:
    """`1:1.5:200` -> (1.0, 1.5, 200)."""
    if value is None:
        return None
    try:
        start, target, steps = value.split(":")
        return float(start), float(target), int(steps)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no schedule; write START:TARGET:STEPS, for example 1:1.5:200") from None


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


SIZE = click.IntRange(min=1)
model_options = _options(
    click.option(
        "--mixer",
        default="attention",
        show_default=True,
        metavar="NAME",
        help="What mixes tokens in each block; options after colons, NAME:OPTION=VALUE.",
    ),
    click.option("--dim", type=SIZE, default=128, show_default=True, help="Width of the model."),
    click.option("--layers", type=SIZE, default=2, show_default=True, help="Blocks."),
    click.option("--heads", type=SIZE, default=2, show_default=True, help="Attention heads."),
)
recipe_options = _options(
    click.option(
        "--tokens", default="1M", callback=_parse_tokens, show_default=True, metavar="N", help="To train on: 500k, 20M, 1.5B."
    ),
    click.option("--accumulate", type=SIZE, default=1, show_default=True, help="Batches a step, one after the other."),
    click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True, help="Learning rate."),
    click.option("--weight-decay", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Of AdamW."),
    click.option(
        "--alpha-schedule",
        callback=_parse_schedule,
        metavar="A:B:STEPS",
        help="Alpha of entmax layers goes from A to B in so many steps, e.g. 1:1.5:200.",
    ),
    click.option(
        "--init",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Begin with the weights of a finished run of the same sizes.",
    ),
    click.option("--compile/--no-compile", default=None, help="Compile the model.  [default: on a GPU]"),
    click.option("--save-every", type=click.IntRange(min=0), default=0, help="Steps between checkpoints.  [default: a tenth]"),
    click.option(
        "--out", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="DIR", help="Folder of the run."
    ),
    click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in --out."),
)
shared_options = _options(device_option, dtype_option, seed_option, json_option, quiet_option)
