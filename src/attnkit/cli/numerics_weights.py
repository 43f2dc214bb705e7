"""`attnkit numerics weights`: how far two training runs are apart, and whether that is much."""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from attnkit._core.errors import OptionError
from attnkit.cli._common import device_option, emit, json_option, out_option, quiet_option, resolve_device, verb
from attnkit.cli._listener import Listener

__all__ = ["command", "tables"]

_RUN = click.Path(path_type=Path)
_NARROW = 6  # columns that a terminal is wide enough for; the page has all


@verb(
    "weights",
    examples=(
        "attnkit numerics weights runs/bf16 runs/other",
        "attnkit numerics weights study/baseline study/flash --bands study/other-init study/fp32 --margin 1.0 --out report",
    ),
    python=(
        "from attnkit.lab.numerics import WeightDivergence\n"
        "divergence = WeightDivergence(run_a, run_b, random_init=r1, precision=r2).compare()\n"
        "divergence.significance(), divergence.verdict(margin=1.0)"
    ),
    memory_hint="use --device cpu; tensors are compared one at a time",
)
@click.argument("run_a", type=_RUN)
@click.argument("run_b", type=_RUN)
@click.option(
    "--bands", type=_RUN, nargs=2, default=None, metavar="R1 R2",
    help="Runs to measure against: R1 began with other weights than RUN_A, R2 has another number format.",
)  # fmt: skip
@click.option("--repeat", type=_RUN, default=None, metavar="R0", help="RUN_A done again: what differs there is noise.")
@click.option(
    "--margin", type=click.FloatRange(min=0, min_open=True), default=None, metavar="X",
    help="Judge: accept what is below X times the smaller band. With --bands; there is no default.",
)  # fmt: skip
@device_option
@out_option
@json_option
@quiet_option
def command(
    run_a: Path,
    run_b: Path,
    bands: tuple[Path, Path] | None,
    repeat: Path | None,
    margin: float | None,
    device: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how far the weights of RUN_B are from those of RUN_A at every step that both have kept.

    Runs are folders of `attnkit train` or of models with safetensors. Writes weights.json, weights.html, weights.svg and
    weights.png where --out says. The verdict bounds how similar two trainings are; it is no proof that either is stable.

    Exit codes: 4 bad input; 5 no such device or out of memory.
    """
    if (margin is None) != (bands is None):
        raise OptionError("--bands and --margin belong together: give both runs and how many bands are too many")
    started, place = time.monotonic(), resolve_device(device)
    from attnkit.lab.numerics import WeightDivergence
    from attnkit.lab.numerics.divergence import save_divergence

    first, second = bands or (None, None)
    runs = WeightDivergence(run_a, run_b, random_init=first, precision=second, repeat=repeat)
    listener = Listener("comparing", run_a, silent=quiet or as_json, advice="nothing is kept", unit="pairs of weights")
    with listener.listening():
        divergence = runs.compare(device=place, on_event=listener.hear)
    line = shlex.join(["attnkit", *sys.argv[1:]])
    document = runs.document(divergence, margin=margin, command=line, device=place, started=started)
    if out is not None:
        save_divergence(out, document)
    emit(document, as_json, *tables(document))


def tables(document: dict[str, Any]) -> list[Any]:
    """What the terminal shows of a result: the distances at the last step, and what came out."""
    from attnkit.report import SECTIONS, Table, table

    section = SECTIONS[document["schema"]].draw(document)
    shown: list[Any] = []
    for block in section.blocks:
        if isinstance(block, Table) and block.title.startswith("Distances"):
            cells = [row[:_NARROW] for row in block.rows]
            shown += [table(block.headers[:_NARROW], cells, title=block.title), block.note, ""]
    return [*shown, *section.lead]
