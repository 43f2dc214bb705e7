"""`attnkit tune`: tile sizes of the kernels, measured on this GPU."""

import shlex
import sys
from typing import Any

import click

from attnkit._core.errors import DeviceUnavailable
from attnkit.cli._common import (
    device_option,
    dtype_option,
    emit,
    json_option,
    parse_lengths,
    parse_names,
    quiet_option,
    resolve_device,
    resolve_dtype,
    verb,
)
from attnkit.cli._listener import Listener

__all__ = ["command"]


@verb(
    "tune",
    examples=("attnkit tune mlstm --dims 128,256", "attnkit tune --kernels fwd,decode --dims 64,128 --dtype fp16 --dry-run"),
    python='from attnkit.lab import tune\nresult = tune.run("attention", dims=[64, 128], device="cuda")',
    memory_hint="what is finished is kept; free memory of the GPU, or use smaller --dims",
)
@click.argument("name", default="attention")
@click.option("--kernels", callback=parse_names, metavar="K,..", help="By name; a wrong one gets the list.  [default: all]")
@click.option("--dims", callback=parse_lengths, metavar="D,..", help="Padded head widths: 16, 32, .. 256.  [default: all]")
@click.option("--dry-run", is_flag=True, help="Measure and print, but keep nothing.")
@device_option
@dtype_option
@json_option
@quiet_option
def command(
    name: str,
    kernels: tuple[str, ...] | None,
    dims: tuple[int, ...] | None,
    dry_run: bool,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure tile sizes of the kernels of NAME, attention or mlstm, on this GPU and keep the best for later calls.

    Of attention (default) they are fwd, decode, bwd_dq, bwd_dkdv, and gather_fwd, gather_dq, gather_dkdv of sparse attention by
    index; of mlstm walk, outputs, d_queries, d_keys, d_values, which scalar decay and lightning attention run through as well.

    A few dozen configurations a kernel are compiled in parallel, timed against the present one, and compared with float64.
    Winners go to the user's cache folder, kernel by kernel; Ctrl-C keeps them. bf16 and fp16 share one table. A head width
    between two of --dims runs with the wider one's.

    Exit codes: 1 a kernel runs with no configuration (listed); 4 bad input; 5 no GPU; 130 interrupted.
    """
    place = resolve_device(device)
    if place.type != "cuda":
        raise DeviceUnavailable(f"--device {device}: tuning measures kernels on a GPU, and this is the CPU")
    from attnkit.lab import tune
    from attnkit.lab.tune.tunables import TUNABLES

    path = TUNABLES[name]().table.path(place)
    advice = "name the rest with --kernels and --dims"
    with Listener("tuning", path, silent=quiet or as_json, advice=advice).listening() as listener:
        document = tune.run(
            name,
            dtypes=[resolve_dtype(dtype, place)],
            dims=dims,
            kernels=kernels,
            device=place,
            store=not dry_run,
            on_event=listener.hear,
            command=shlex.join(["attnkit", *sys.argv[1:]]),
        )
    broken = [row for row in document["rows"] if row["best_ms"] is None]
    emit(document, as_json, *_shown(document, broken, dry_run))
    if broken:
        raise click.exceptions.Exit(1)


def _shown(document: dict[str, Any], broken: list[dict[str, Any]], dry_run: bool) -> list[Any]:
    """The table, what is missing, and where the result is."""
    from attnkit.report import table

    headers = ("kernel", "dtype", "width", "present", "ms", "best", "ms", "gain", "tried", "dropped")
    shown: list[Any] = [table(headers, [_cells(row) for row in document["rows"]], title="rows x keys, warps, stages")]
    shown += [f"{row['kernel']}, width {row['width']}: nothing runs; {row['dropped'][0]['reason']}" for row in broken]
    shown += dict.fromkeys(note for row in document["rows"] for note in row["notes"])
    if dry_run:
        return [*shown, "Nothing was kept."]
    if document["wrote"]:
        return [*shown, f"kept in: {document['path']}\nto undo: delete that file"]
    return [*shown, "Nothing was faster by more than the spread of its times; nothing was written."]


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    changed = row["best"] != row["present"]
    gain = "-" if not changed else "runs" if row["gain"] is None else f"+{row['gain']:.0%}"
    before, after = (_tile(row[name]) for name in ("present", "best"))
    times = ["-" if row[name] is None else f"{row[name]:.3g}" for name in ("present_ms", "best_ms")]
    counts = (row["tried"], len(row["dropped"]))
    return (row["kernel"], row["dtype"], row["width"], before, times[0], after if changed else "same", times[1], gain, *counts)


def _tile(config: dict[str, int]) -> str:
    return f"{config['block_m']}x{config['block_n']}, {config['num_warps']}, {config['num_stages']}"
