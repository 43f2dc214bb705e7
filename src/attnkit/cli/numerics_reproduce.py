"""`attnkit numerics reproduce`: why low-precision training fails, scaled down."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from attnkit.cli._common import (
    device_option,
    emit,
    json_option,
    out_option,
    parse_names,
    quiet_option,
    resolve_device,
    resume_option,
    section_of,
    verb,
)
from attnkit.cli._listener import Listener

__all__ = ["command"]


@verb(
    "reproduce",
    examples=(
        "attnkit numerics reproduce --device cpu --out reproduction",
        "attnkit numerics reproduce --parts text --seeds 1 --device cuda --out reproduction-text",
    ),
    python='from attnkit.lab.numerics import Reproduction\nresult = Reproduction(parts=("bias", "algebra")).run()',
    memory_hint="finished trainings are kept; the part text needs a GPU of 16 GB",
)
@click.option(
    "--parts", default="bias,algebra,training", callback=parse_names, show_default=True, metavar="P,..",
    help="bias, algebra, training, text (10M parameters on bytes, for a GPU).",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each kind.")
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True, help="Steps of a training.")
@device_option
@out_option
@resume_option
@json_option
@quiet_option
def command(
    parts: tuple[Any, ...],
    seeds: int,
    steps: int,
    device: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure biased rounding, check what it does to gradients, and train small models with and without it.

    Writes reproduce.json and reproduce.html into --out (default: attnkit-reproduction). Ctrl-C keeps finished parts and
    trainings.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-reproduction")
    from attnkit.lab.numerics import Reproduction

    plan = Reproduction(parts=parts, seeds=tuple(range(seeds)), steps=steps)
    with Listener("reproducing", folder, silent=quiet or as_json, unit="parts").listening() as listener:
        document = plan.run(
            folder, device=place, resume=resume, on_event=listener.hear, command=shlex.join(["attnkit", *sys.argv[1:]])
        )
    tables, lead = section_of(document)
    emit(document, as_json, *tables, *lead, f"page: {folder / 'reproduce.html'}   data: {folder / 'reproduce.json'}")
