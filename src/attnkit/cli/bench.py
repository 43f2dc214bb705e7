"""`attnkit bench`: our operators against other implementations, on this machine."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from attnkit._core.errors import CheckFailed
from attnkit.cli._common import (
    device_option,
    dtype_option,
    emit,
    json_option,
    out_option,
    parse_lengths,
    parse_names,
    quiet_option,
    resolve_device,
    resolve_dtype,
    resume_option,
    seed_option,
    verb,
)
from attnkit.cli._listener import Listener

__all__ = ["command"]

_WIDE = ("first call s", "ours MiB", "peer MiB")  # columns that a terminal is too narrow for; the page has them


def _parse_heads(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a number of heads; write 32, or 32/8 for 8 key heads")
    return int(parts[0]), int(parts[-1])


@verb(
    "kernels",
    examples=(
        "attnkit bench kernels attention",
        "attnkit bench kernels attention --peers cudnn,flex --lengths 4k,16k --dims 128 --passes fwd,decode",
    ),
    python='from attnkit.lab import bench\nresult = bench.run("attention", lengths=[4096], dims=[64], device="cuda")',
    memory_hint="finished shapes are kept; use shorter --lengths or fewer --heads",
)
@click.argument("name")
@click.option("--peers", callback=parse_names, metavar="A,B,..", help="Whom to race.  [default: all made for the device]")
@click.option("--lengths", callback=parse_lengths, metavar="N,..", help="Tokens, e.g. 4k,16k.  [default: by device]")
@click.option("--dims", callback=parse_lengths, metavar="D,..", help="Head widths.  [default: the operator's]")
@click.option("--passes", callback=parse_names, metavar="P,..", help="fwd, fwd+bwd, decode, step.  [default: all it has]")
@click.option("--heads", callback=_parse_heads, metavar="H[/Hkv]", help="Query and key heads.  [default: the operator's]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences in a batch.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Which of our backends runs.")
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True, help="Measurements of each contestant.")
@device_option
@dtype_option
@seed_option
@out_option
@resume_option
@json_option
@quiet_option
def _kernels(
    name: str,
    peers: tuple[str, ...] | None,
    lengths: tuple[int, ...] | None,
    dims: tuple[int, ...] | None,
    passes: tuple[str, ...] | None,
    heads: tuple[int, int] | None,
    batch: int,
    backend: str,
    rounds: int,
    device: str,
    dtype: str,
    seed: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Race the operator NAME against other implementations: interleaved, on the same inputs, after a check of numerics.

    Writes NAME.json and NAME.html into --out (default: attnkit-bench). Ctrl-C keeps the finished shapes.

    Exit codes: 1 a peer named by --peers was not raced on some shape (listed); 4 bad input; 5 no such device; 6 ours failed
    on some shape (listed); 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-bench")
    from attnkit.lab import bench

    with Listener("racing", folder, silent=quiet or as_json).listening() as listener:
        document = bench.run(
            name,
            peers=peers,
            lengths=lengths,
            dims=dims,
            passes=passes,
            heads=heads,
            batch=batch,
            backend=backend,
            rounds=rounds,
            device=place,
            dtype=resolve_dtype(dtype, place),
            seed=seed,
            out=folder,
            resume=resume,
            on_event=listener.hear,
            command=shlex.join(["attnkit", *sys.argv[1:]]),
        )
    emit(document, as_json, *_tables(document), f"page: {folder / name}.html   data: {folder / name}.json")
    failed = [entry for entry in document["skipped"] if entry["peer"] == bench.OWN]
    if failed:
        raise CheckFailed(f"{name} failed on {len(failed)} of {len(document['finished'])} shapes: {failed[0]['reason']}")
    if peers and document["skipped"]:
        raise click.exceptions.Exit(1)


def _tables(document: dict[str, Any]) -> list[Any]:
    """The tables of the page, without what a terminal is too narrow for, and from where ours pays."""
    from attnkit.report import SECTIONS, Table, table
    from attnkit.report.race import crossovers

    shown: list[Any] = []
    for block in SECTIONS[document["schema"]].draw(document).blocks:
        if isinstance(block, Table):
            columns = [index for index, header in enumerate(block.headers) if header not in _WIDE]
            cells = [[row[index] for index in columns] for row in block.rows]
            shown += [table([block.headers[index] for index in columns], cells, title=block.title), block.note, ""]
    return [*shown, *crossovers(document["rows"]), ""]


command = click.Group("bench", commands=[_kernels], help="Races: our operators against other implementations, on this machine.")
