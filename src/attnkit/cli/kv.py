"""`attnkit kv`: compressing the key-value cache, what it keeps and what it costs."""

import re
import shlex
import sys
from collections.abc import Callable
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
    parse_numbers,
    parse_size,
    quiet_option,
    resolve_device,
    resolve_dtype,
    resume_option,
    section_of,
    seed_option,
    verb,
)
from attnkit.cli._listener import Listener

MEMORY_HINT = "finished parts are kept; use a shorter --length, --dtype bf16, or --device cpu"
CODECS = ("int8", "int4", "fp8")
_Command = Callable[..., Any]

_model = click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="smollm2|DIR|FILE.gguf",
    help="The packaged model, a folder of safetensors, or a GGUF file.",
)
_text = click.option("--text", default="wiki", show_default=True, metavar="FILE|ASSET", help="A UTF-8 file, wiki or novels.")
_length = click.option(
    "--length", default="2048", show_default=True, callback=parse_size, metavar="N", help="Tokens of context: 2048 or 8k."
)
_codec = click.option("--codec", type=click.Choice(CODECS), default=None, help="Write the cache in 8 or 4 bits.")
_task = click.option(
    "--task",
    "tasks",
    default="text,needle",
    show_default=True,
    callback=parse_names,
    metavar="A,B,..|all",
    help="text: loss of its last tokens; needle: pass-keys; vt, cwe, fwe, assoc: chains, counts and pairs in the text.",
)
_trials = click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Texts, and questions of each task at each depth.",
)
_aware = click.option("--query-aware", is_flag=True, help="Read the question with the context, before keys are dropped.")


def _measured(command: _Command) -> _Command:
    """The options that `run` and `sweep` share."""
    options = (
        _codec, _model, _text, _task, _trials, _aware, device_option, dtype_option, seed_option, out_option, resume_option,
        json_option, quiet_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@verb(
    "list",
    examples=("attnkit kv list", "attnkit kv list --json"),
    python="from attnkit import kv\nkv.methods()",
)
@json_option
def _list(as_json: bool) -> None:
    """List the methods that compress the cache, what each needs and where it comes from; then what goes around them.

    A press is NAME[:OPTION=VALUE].., with wrappers before the name: adakv:snapkv:window=32.
    """
    from attnkit import kv
    from attnkit.report import table

    bases, wrappers, aliases = kv.catalogue.bases(), kv.catalogue.wrappers(), kv.catalogue.aliases()
    shown = [
        table(
            ("method", "what stays", "needs", "source"),
            [(each.name, each.summary, ", ".join(each.needs) or None, _short(each.source)) for each in bases],
            title=f"{len(bases)} base methods",
            named=True,
        ),
        table(
            ("wrapper", "what it does", "source"),
            [(each.name, each.summary, _short(each.source)) for each in wrappers],
            title=f"{len(wrappers)} wrappers, written before a method: adakv:snapkv",
            named=True,
        ),
    ]
    if aliases:
        shown.append(table(("alias", "stands for"), sorted(aliases.items()), title="Other names"))
    emit({"methods": bases, "wrappers": wrappers, "aliases": aliases}, as_json, *shown)


@verb(
    "run",
    examples=(
        "attnkit kv run --press adakv:expected_attention --ratio 0.5 --task needle --length 4k",
        "attnkit kv run --press snapkv:window=32 --ratio 0.75 --codec int8 --query-aware",
    ),
    python='from attnkit.lab import compare\ncompare.run(methods=["snapkv:window=32:codec=int8@0.75"], tasks=["needle"])',
    memory_hint=MEMORY_HINT,
)
@click.option("--press", required=True, metavar="PRESS", help="A name of `attnkit kv list`, with its options.")
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True, help="Fraction removed.")
@_length
@_measured
def _run(press: str, ratio: float, length: int, **options: Any) -> None:
    """Press the cache of a model and ask it about a text, next to the same model with everything in its cache.

    Writes results.json, results.csv, curves.png and index.html into --out (default: attnkit-kv-run).
    """
    document = _swept(Path("attnkit-kv-run"), presses=(press,), ratios=(ratio,), lengths=(length,), **options)
    if not options["as_json"]:
        for row in document["rows"]:
            for trial in row["trials"]:
                verdict = "found" if trial["hit"] else "missed"
                answer = trial["answer"].replace("\n", " ")
                wanted = f"{'key' if trial['task'] == 'needle' else trial['task']} {trial['key']}"
                click.echo(f"{row['method']}, {wanted} at {100 * trial['depth']:.0f} %, {verdict}: {answer}")


@verb(
    "sweep",
    examples=(
        "attnkit kv sweep --press expected_attention,snapkv,knorm --ratio 0,.25,.5,.75 --task needle --length 8k",
        "attnkit kv sweep --press snapkv,adakv:snapkv --ratio .5,.9 --codec int4 --task needle,assoc,vt --out runs/kv --resume",
    ),
    python='from attnkit.lab import compare\ncompare.sweep(presses=["snapkv", "knorm"], ratios=[0, 0.5], lengths=[2048])',
    memory_hint=MEMORY_HINT,
)
@click.option("--press", required=True, callback=parse_names, metavar="A,B,..", help="Names of `attnkit kv list`.")
@click.option(
    "--ratio", "ratios", default="0,.25,.5,.75", show_default=True, callback=parse_numbers, metavar="R,..", help="Removed."
)
@click.option(
    "--length", "lengths", default="2048", show_default=True, callback=parse_lengths, metavar="N,..", help="Tokens of context."
)
@_measured
def _sweep(press: tuple[str, ...], ratios: tuple[float, ...], lengths: tuple[int, ...], **options: Any) -> None:
    """Compare presses over a grid of ratios: quality next to the memory that is really held.

    Dense always runs. Writes results.json, results.csv, curves.png and index.html into --out (default: attnkit-kv-sweep).
    Ctrl-C keeps what is finished.

    Exit codes: 3 model, text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    _swept(Path("attnkit-kv-sweep"), presses=press, ratios=ratios, lengths=lengths, **options)


def _swept(folder: Path, *, device: str, dtype: str, out: Path | None, as_json: bool, quiet: bool, **given: Any) -> Any:
    from attnkit.lab import compare
    from attnkit.report import presses

    place, folder = resolve_device(device), out or folder
    with Listener("comparing", folder, silent=quiet or as_json).listening() as listener:
        document = compare.sweep(
            **given,
            device=place,
            dtype=resolve_dtype(dtype, place),
            out=folder,
            on_event=listener.hear,
            command=_line(),
        )
    hidden = ("length",) if len(given["lengths"]) == 1 else ()
    shown, _ = section_of(document, hidden=hidden, titles=(presses.TITLE,))
    emit(document, as_json, *shown, f"report: {folder / 'index.html'}   data: {folder / 'results.json'}, results.csv")
    return document


@verb(
    "memory",
    examples=(
        "attnkit kv memory --press snapkv,adakv:snapkv,think --ratio .5,.75 --length 4k",
        "attnkit kv memory --press knorm --ratio 0,.5 --codec int4 --json",
    ),
    python='from attnkit.lab import compare\ncompare.memory(methods=["snapkv@0.5", "knorm:codec=int4@0.5"], length=4096)',
    memory_hint=MEMORY_HINT,
)
@click.option("--press", required=True, callback=parse_names, metavar="A,B,..", help="Names of `attnkit kv list`.")
@click.option("--ratio", "ratios", default=".5", show_default=True, callback=parse_numbers, metavar="R,..", help="Removed.")
@_codec
@_length
@_model
@_text
@device_option
@dtype_option
@out_option
@json_option
@quiet_option
def _memory(
    press: tuple[str, ...], ratios: tuple[float, ...], codec: str | None, device: str, dtype: str, out: Path | None,
    as_json: bool, quiet: bool, **given: Any,
) -> None:  # fmt: skip
    """Weigh the cache after one context: its tensors and what the allocator holds, next to the ratio and to dense.

    Writes results.json, memory.png and index.html into --out (default: attnkit-kv-memory).
    """
    from attnkit.lab import compare

    place, folder = resolve_device(device), out or Path("attnkit-kv-memory")
    with Listener("weighing", folder, silent=quiet or as_json, advice="nothing is written").listening() as listener:
        document = compare.memory(
            methods=compare.grid(press, ratios, codec),
            device=place,
            dtype=resolve_dtype(dtype, place),
            out=folder,
            on_event=listener.hear,
            command=_line(),
            **given,
        )
    emit(document, as_json, *section_of(document)[0], f"report: {folder / 'index.html'}   data: {folder / 'results.json'}")


@verb(
    "calibrate",
    examples=(
        "attnkit kv calibrate --out stats.safetensors",
        "attnkit kv calibrate --model ./my-model --text book.txt --what lukv:snapkv --rows 100 --out curves.safetensors",
    ),
    python='from attnkit import inference\ninference.calibrate(model, rows, what=["lukv:snapkv"], path="curves.safetensors")',
)
@_model
@_text
@click.option(
    "--what", default="expected_attention_stats,qfilter,duo", show_default=True, callback=parse_names, metavar="A,B,..",
    help="For which methods; lukv:METHOD for lukv around this method.",
)  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Pieces of the text to read.")
@click.option("--length", default="512", show_default=True, callback=parse_size, metavar="N", help="Tokens of a piece.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Safetensors to write."
)
@device_option
@dtype_option
@json_option
@quiet_option
def _calibrate(
    model: str, text: str, what: tuple[str, ...], rows: int, length: int, out: Path, device: str, dtype: str, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Let a model read texts and write down what some methods want to know of it beforehand.

    Methods take the file as an option: expected_attention_stats:stats=FILE, qfilter:filters=FILE, duo_attention:pattern=FILE,
    lukv:METHOD:curves=FILE. What is learnt for lukv is for the method that --what names behind it.
    """
    from attnkit import inference
    from attnkit.lab.compare import loading, texts

    place = resolve_device(device)
    source, words = loading.locate(model), texts.read(text)
    loaded = loading.load(source, place, resolve_dtype(dtype, place))
    ids = texts.tokenize(words, loaded.tokenizer, lengths=[length], trials=rows)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:rows]
    with Listener("reading", out, silent=quiet or as_json, advice="nothing is written").listening() as listener:
        found = inference.calibrate(loaded.model, pieces, what=what, path=out, on_event=listener.hear)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    lines = [f"{name}: {' x '.join(map(str, shape))}" for name, shape in shapes.items()]
    emit({"file": out, "pieces": len(pieces), "tensors": shapes}, as_json, *lines, f"{len(pieces)} pieces read; wrote {out}")


def _short(source: str) -> str | None:
    """The number of a paper where there is one."""
    found = re.search(r"arXiv:[\d.]+\d|doi \S+", source)
    return found[0] if found else source or None


def _line() -> str:
    return shlex.join(["attnkit", *sys.argv[1:]])


command = click.Group(
    "kv", commands=[_list, _run, _sweep, _memory, _calibrate], help="Compress the key-value cache: what stays, what it costs."
)
