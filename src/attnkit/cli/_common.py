"""What verbs share: their declaration, options, the choice of device and dtype, progress, printing."""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnkit._core.errors import DeviceUnavailable, DTypeError
from attnkit.cli._boundary import DEFAULT_MEMORY_HINT, error_boundary
from attnkit.cli._progress import Progress

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

__all__ = [
    "DTYPES",
    "Progress",
    "Verb",
    "deliver",
    "device_option",
    "dtype_option",
    "emit",
    "json_option",
    "out_option",
    "parse_lengths",
    "parse_names",
    "parse_numbers",
    "parse_size",
    "quiet_option",
    "resolve_device",
    "resolve_dtype",
    "resume_option",
    "section_of",
    "seed_option",
    "verb",
    "warn",
]

TABLE_WIDTH = 100
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Verb(click.Command):
    """A command whose help ends with examples and the Python equivalent, and whose foreseen errors are one line."""

    examples: tuple[str, ...] = ()
    python: str = ""
    memory_hint: str = DEFAULT_MEMORY_HINT

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the Python equivalent, unwrapped so that they can be copied."""
        for title, lines in (("Examples", self.examples), ("In Python", tuple(self.python.splitlines()))):
            with formatter.section(title):
                for line in lines:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb inside the error boundary with its own memory hint."""
        with error_boundary(self.memory_hint):
            return super().invoke(ctx)


def verb(
    name: str, *, examples: tuple[str, str], python: str, memory_hint: str = DEFAULT_MEMORY_HINT
) -> Callable[[Callable[..., object]], Verb]:
    """Declare a verb; the function's docstring is its help.

    Args:
        name: as typed by the user.
        examples: two command lines.
        python: the equivalent Python, a few lines.
        memory_hint: the smallest change that makes this verb need less memory; ends the out-of-memory message.
    """

    def declare(function: Callable[..., object]) -> Verb:
        command = click.command(name, cls=Verb)(function)
        command.examples, command.python, command.memory_hint = examples, python, memory_hint
        return command

    return declare


def parse_names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Option callback: `a,b,c` -> ("a", "b", "c"); empty items are a usage error."""
    if value is None:
        return None
    names = tuple(item.strip() for item in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{value!r} has an empty item; write a,b,c")
    return names


def parse_lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Option callback: `512,4k,64k` -> (512, 4096, 65536), k = 1024."""
    names = parse_names(ctx, param, value)
    if names is None:
        return None
    lengths = []
    for item in names:
        digits = item.lower().removesuffix("k")
        if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
            raise click.BadParameter(f"{item!r} is not a length; write tokens, e.g. 512 or 4k")
        lengths.append(int(digits) * (1024 if item.lower().endswith("k") else 1))
    return tuple(lengths)


def parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Option callback: `8k` -> 8192; one length."""
    lengths = parse_lengths(ctx, param, value)
    if lengths is None or len(lengths) != 1:
        raise click.BadParameter(f"{value!r} is several lengths; give one")
    return lengths[0]


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Option callback: `0,.25,.5` -> (0.0, 0.25, 0.5)."""
    names = parse_names(ctx, param, value)
    try:
        return None if names is None else tuple(map(float, names))
    except ValueError:
        raise click.BadParameter(f"{value!r} has an item that is no number; write 0,.25,.5") from None


def _check_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise click.BadParameter(f"{value!r} is not known; choose auto, cpu, cuda or cuda:<i>")
    return value


device_option = click.option(
    "--device",
    default="auto",
    callback=_check_device,
    show_default=True,
    metavar="auto|cpu|cuda[:i]",
    help="Where to compute; auto takes a GPU if there is one.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="Number format; auto is bf16 on a GPU, fp32 on a CPU.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random."
)
out_option = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=None, metavar="DIR", help="Folder for result files."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a table.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
resume_option = click.option("--resume", is_flag=True, help="Keep the finished parts found in --out and do the rest.")


def resolve_device(name: str) -> "torch.device":
    """`--device` -> a device that exists.

    Raises:
        DeviceUnavailable: cuda was asked for by name and is not here.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        cause = "no CUDA device is visible" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        raise DeviceUnavailable(f"--device {name}: {cause}; use --device cpu")
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise DeviceUnavailable(f"--device {name}: {count} CUDA device(s) here; choose cuda:0 .. cuda:{count - 1}")
    return torch.device(name)


def resolve_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """`--dtype` -> a torch dtype that the device computes in.

    Raises:
        DTypeError: fp16 on a CPU, or bf16 on a GPU without it.
    """
    import torch

    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if bf16 else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise DTypeError("--dtype fp16 on the CPU: models overflow and run slower there; use --dtype bf16 or fp32")
    if name == "bf16" and not bf16:
        raise DTypeError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16 units; use --dtype fp16 or fp32")
    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def emit(result: Mapping[str, Any], as_json: bool, *tables: "RenderableType") -> None:
    """Print a verb's result on stdout: one JSON object, or tables (and plain strings) of at most 100 columns."""
    if as_json:
        from attnkit.report import plain

        click.echo(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    terminal = os.get_terminal_size().columns if sys.stdout.isatty() else TABLE_WIDTH
    console = Console(width=min(terminal, TABLE_WIDTH), markup=False, highlight=False, emoji=False)
    for table in tables:
        console.print(table)


def section_of(
    result: Mapping[str, Any], *, hidden: Collection[str] = (), titles: Collection[str] | None = None
) -> "tuple[list[RenderableType], list[str]]":
    """What a result's page says, for a terminal: its tables with their notes, and its sentences.

    Args:
        result: an envelope.
        hidden: headers of columns that a terminal is too narrow for.
        titles: of the tables to show; None shows all.
    """
    from attnkit.report import SECTIONS, Table, table

    section = SECTIONS[result["schema"]].draw(result)
    shown: list[RenderableType] = []
    for block in section.blocks:
        if isinstance(block, Table) and (titles is None or block.title in titles):
            columns = [index for index, header in enumerate(block.headers) if header not in hidden]
            cells = [[row[index] for index in columns] for row in block.rows]
            shown += [table([block.headers[index] for index in columns], cells, title=block.title), block.note, ""]
    return shown, list(section.lead)


def deliver(document: Mapping[str, Any], name: str, out: Path | None, as_json: bool) -> None:
    """Print what the page of an envelope says; into `out`, if there is one, go `name`.json and `name`.html."""
    if out is not None:
        from attnkit import report

        report.write_json(out / f"{name}.json", document)
        report.write_html(out / f"{name}.html", [document])
    tables, lead = section_of(document)
    emit(document, as_json, *tables, *lead)


def warn(message: str) -> None:
    """One warning line on stderr."""
    click.echo(f"warning: {message}", err=True)
