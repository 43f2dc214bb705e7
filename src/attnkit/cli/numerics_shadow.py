"""`attnkit numerics shadow`: a trained model's attention beside a second computation, head by head."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from attnkit.cli._common import (
    deliver,
    device_option,
    json_option,
    out_option,
    quiet_option,
    resolve_device,
    seed_option,
    verb,
)
from attnkit.cli._progress import Progress
from attnkit.cli._reading_options import reading_options

__all__ = ["command"]


@verb(
    "shadow",
    examples=(
        "attnkit numerics shadow --model runs/novels",
        "attnkit numerics shadow --model runs/novels --against reference --batches 50 --out runs/novels/shadow",
    ),
    python=(
        "from attnkit.lab.numerics import Shadow\n"
        "with Shadow(model, every=1) as log:\n"
        "    model(ids)  # batch by batch\n"
        "log.report()"
    ),
    memory_hint="use a shorter --length or a smaller --batch",
)
@reading_options(batches=4)
@click.option(
    "--against", default="golden", show_default=True, metavar="golden|BACKEND",
    help="The second computation: float64, or a backend of attnkit.ops.attention.",
)  # fmt: skip
@device_option
@seed_option
@out_option
@json_option
@quiet_option
def command(
    model: Path,
    text: str | None,
    batches: int,
    batch: int,
    length: int | None,
    rows: int,
    precision: str,
    against: str,
    device: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read batches, compute the attention of each a second time, and say how far apart the two are in every layer and head.

    Writes shadow.json and shadow.html where --out says.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory.
    """
    place = resolve_device(device)
    import torch

    from attnkit import ops
    from attnkit.lab.numerics import Shadow
    from attnkit.lab.numerics.recorded import read_batches

    loaded, read = read_batches(model, text, batches=batches, batch=batch, length=length, seed=seed, device=place)
    other: Any = "golden" if against == "golden" else partial(ops.attention, backend=against)
    progress = Progress("following", batches, silent=quiet or as_json)
    with torch.no_grad(), Shadow(loaded, other, every=1, rows=rows) as log, progress:
        for fields in read:
            with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
                loaded(**fields)
            progress.advance()
    document = log.report(shlex.join(["attnkit", *sys.argv[1:]]))
    deliver(document, "shadow", out, as_json)
