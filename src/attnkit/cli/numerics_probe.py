"""`attnkit numerics probe`: what rounding does to the attention of a trained model, head by head."""

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
from attnkit.cli._progress import Progress
from attnkit.cli._reading_options import reading_options

__all__ = ["command"]


@verb(
    "probe",
    examples=(
        "attnkit numerics probe --model runs/novels",
        "attnkit numerics probe --model runs/novels --text notes.txt --batches 50 --out runs/novels/probe",
    ),
    python=(
        "from attnkit.lab.numerics import StabilityMonitor\n"
        "monitor = StabilityMonitor(model, every=1)  # then loss.backward() and monitor.step(), batch by batch\n"
        "monitor.report()"
    ),
    memory_hint="use a shorter --length or a smaller --batch",
)
@reading_options(batches=25, least=1)
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
    """Read batches forward and backward, without training, and say how attention's rounding leans in each head.

    Writes probe.json and probe.html where --out says.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory.
    """
    place = resolve_device(device)
    import torch

    from attnkit.lab.numerics import StabilityMonitor
    from attnkit.lab.numerics.recorded import read_batches

    loaded, read = read_batches(model, text, batches=batches, batch=batch, length=length, seed=seed, device=place)
    progress = Progress("probing", batches, silent=quiet or as_json)
    with StabilityMonitor(loaded, every=1, rows=rows) as monitor, progress:
        for fields in read:
            with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
                loaded(**fields).loss.backward()
            loaded.zero_grad()
            monitor.step()
            progress.advance()
    document = monitor.report(shlex.join(["attnkit", *sys.argv[1:]]))
    deliver(document, "probe", out, as_json)
