"""`attnkit numerics localise`: which layer and head an error comes from, and what removes it."""

import shlex
import sys
from pathlib import Path

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
from attnkit.cli._listener import Listener
from attnkit.cli._reading_options import reading_options

__all__ = ["command"]


@verb(
    "localise",
    examples=(
        "attnkit numerics localise --model runs/novels",
        "attnkit numerics localise --model runs/novels --batches 40 --out runs/novels/localise",
    ),
    python="from attnkit.lab.numerics import localise\nfound = localise(model, batches)['found']",
    memory_hint="use a shorter --length or a smaller --batch",
)
@reading_options(batches=20, least=8)
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
    device: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the same batches with one thing changed at a time, and name the head whose error leans one way.

    Writes localise.json and localise.html where --out says.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory; 6 a head leans one way.
    """
    place = resolve_device(device)
    from attnkit._core.errors import CheckFailed
    from attnkit.lab.numerics import localise
    from attnkit.lab.numerics.recorded import read_batches

    loaded, read = read_batches(model, text, batches=batches, batch=batch, length=length, seed=seed, device=place)
    advice = "nothing is kept; fewer --batches take less time"
    with Listener("localising", out or Path(), silent=quiet or as_json, advice=advice, unit="changes").listening() as listener:
        document = localise(
            loaded, list(read), rows=rows, precision=precision, command=shlex.join(["attnkit", *sys.argv[1:]]),
            on_event=listener.hear,
        )  # fmt: skip
    deliver(document, "localise", out, as_json)
    found = document["found"]
    if found is not None:
        raise CheckFailed(f"{found['layer']}, head {found['head']}: eps leans one way (z = {found['z']:.1f})")
