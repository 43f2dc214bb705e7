"""`attnkit compare`: methods x lengths on the user's model and text, quality and cost in one result."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

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
    section_of,
    seed_option,
    verb,
)
from attnkit.cli._listener import Listener

__all__ = ["MEMORY_HINT", "command", "compare_and_show"]

SHOWN_TABLES = ("Quality", "Cost")
MEMORY_HINT = "finished parts are kept; use shorter --lengths, --dtype bf16, or --device cpu"


@verb(
    "compare",
    examples=(
        "attnkit compare --model ./my-model --text book.txt --lengths 4k,16k --methods dense,window,yarn",
        "attnkit compare --methods snapkv@0.5,adakv:knorm:codec=int8@0.25 --out runs/first --resume",
    ),
    python='from attnkit.lab import compare\nresult = compare.run(model="./my-model", text="book.txt", lengths=[4096])',
    memory_hint=MEMORY_HINT,
)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="smollm2|DIR|FILE.gguf",
    help="The packaged model, a folder of safetensors, or a GGUF file.",
)
@click.option("--text", default="wiki", show_default=True, metavar="FILE|ASSET", help="A UTF-8 file, wiki or novels.")
@click.option(
    "--lengths",
    default="2048",
    show_default=True,
    callback=parse_lengths,
    metavar="N,..",
    help="Tokens of context: 2048 or 4k,16k.",
)
@click.option(
    "--methods",
    callback=parse_names,
    metavar="A,B,..|all",
    help="Methods, or presses of the cache (snapkv@0.5); dense always runs.  [default: the common ones]",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=1, show_default=True, help="Texts a length, and keys at each depth."
)
@device_option
@dtype_option
@seed_option
@out_option
@resume_option
@json_option
@quiet_option
def command(
    model: str,
    text: str,
    lengths: tuple[int, ...],
    methods: tuple[str, ...] | None,
    trials: int,
    device: str,
    dtype: str,
    seed: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare long-context methods: what each keeps (loss, pass-keys, agreement with dense) and costs (time, memory).

    Writes results.json and index.html into --out (default: attnkit-compare). Ctrl-C keeps what is finished.

    Exit codes: 3 model, text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    place = resolve_device(device)
    compare_and_show(
        as_json=as_json,
        quiet=quiet,
        out=out or Path("attnkit-compare"),
        resume=resume,
        model=model,
        text=text,
        lengths=lengths,
        methods=methods,
        trials=trials,
        device=place,
        dtype=resolve_dtype(dtype, place),
        seed=seed,
    )


def compare_and_show(*, as_json: bool, quiet: bool, out: Path, resume: bool, **arguments: Any) -> None:
    """Run a comparison with progress on stderr, then print its tables and say where its files are.

    Args:
        as_json: print the envelope instead of tables.
        quiet: no progress.
        out, resume, arguments: see `attnkit.lab.compare.run`.
    """
    from attnkit.lab import compare

    with Listener("comparing", out, silent=quiet or as_json).listening() as listener:
        line = shlex.join(["attnkit", *sys.argv[1:]])
        document = compare.run(**arguments, out=out, resume=resume, on_event=listener.hear, command=line)
    emit(document, as_json, *_tables(document), f"report: {out / 'index.html'}   data: {out / 'results.json'}")


def _tables(document: dict[str, Any]) -> list[Any]:
    """Two tables of the report, without the column that a terminal is too narrow for; what it holds follows in lines."""
    shown, _ = section_of(document, hidden=("policy",), titles=SHOWN_TABLES)
    longest = max(row["length"] for row in document["rows"])
    policies = [f"  {row['method']:<16} {row['policy']}" for row in document["rows"] if row["length"] == longest]
    return [*shown, f"Policies at {longest:,} tokens:", *policies, ""]
