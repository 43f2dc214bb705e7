"""`attnkit bench`: our operators and our training against other implementations, on this machine."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from attnkit._core.errors import CheckFailed, OptionError
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

__all__ = ["command"]

_WIDE = ("first call s", "ours MiB", "peer MiB")  # columns that a terminal is too narrow for; the page has them
_TOLD = (*_WIDE, "ours TFLOP/s", "peer TFLOP/s", "ours tokens/s", "peer tokens/s")  # what the sentences say, too
_SIZE = click.IntRange(min=1)


def _parse_heads(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a number of heads; write 32, or 32/8 for 8 key heads")
    return int(parts[0]), int(parts[-1])


def _parse_vary(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    chosen: dict[str, tuple[str, ...]] = {}
    for value in values:
        name, _, texts = value.partition("=")
        parts = tuple(part.strip() for part in texts.split(","))
        if not name or not all(parts):
            raise click.BadParameter(f"{value!r} is not NAME=V,..; write nb=4,16")
        chosen[name] = chosen.get(name, ()) + parts
    return chosen


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
@click.option("--batch", type=_SIZE, help="Sequences in a batch.  [default: the operator's]")
@click.option("--vary", callback=_parse_vary, multiple=True, metavar="NAME=V,..", help="Other sizes, e.g. nb=4,16; repeatable.")
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
    batch: int | None,
    vary: dict[str, tuple[str, ...]],
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
            **({"vary": vary} if vary else {}),
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
    from attnkit.report.race import crossovers

    shown = [*section_of(document, hidden=_WIDE)[0], *crossovers(document["rows"]), ""]
    emit(document, as_json, *shown, f"page: {folder / name}.html   data: {folder / name}.json")
    failed = [entry for entry in document["skipped"] if entry["peer"] == bench.OWN]
    if failed:
        raise CheckFailed(f"{name} failed on {len(failed)} of {len(document['finished'])} shapes: {failed[0]['reason']}")
    if peers and document["skipped"]:
        raise click.exceptions.Exit(1)


@verb(
    "training",
    examples=(
        "attnkit bench training",
        "attnkit bench training --preset decoder-50m --text wiki --context 2048 --batch 16 --forms packed --out results",
    ),
    python=(
        "from attnkit.lab import bench\n"
        "from attnkit.models import PRESETS\n"
        "result = bench.run_training(PRESETS['decoder-50m'](), context=2048, batch=16, device='cuda')"
    ),
    memory_hint="use a smaller --batch or --context, or --forms rows",
)
@click.option("--preset", metavar="NAME", help="Sizes of the model.  [default: decoder-50m, on a CPU decoder-tiny]")
@click.option("--dim", type=_SIZE, help="Width, in place of the preset's; the feed-forward part grows with it.")
@click.option("--layers", type=_SIZE, help="Blocks, in place of the preset's.")
@click.option("--heads", callback=_parse_heads, metavar="H[/Hkv]", help="Heads, in place of the preset's.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens of the longest sequence.  [default: 2048, on a CPU 128]")
@click.option("--batch", type=_SIZE, help="Contexts in a batch.  [default: 16, on a CPU 4]")
@click.option("--forms", callback=parse_names, metavar="A,B", help="rows (whole contexts), packed.  [default: both]")
@click.option("--text", metavar="ASSET|FILE", help="novels, wiki, pubmed, stdlib, or a UTF-8 file.  [default: random tokens]")
@click.option("--steps", type=click.IntRange(min=4), default=20, show_default=True, help="Of a run; a quarter warms up.")
@click.option("--rounds", type=click.IntRange(min=3), default=3, show_default=True, help="Timed runs of each side.")
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="Compile both models.")
@device_option
@dtype_option
@seed_option
@out_option
@json_option
@quiet_option
def _training(
    preset: str | None,
    dim: int | None,
    layers: int | None,
    heads: tuple[int, int] | None,
    context: int | None,
    batch: int | None,
    forms: tuple[str, ...] | None,
    text: str | None,
    steps: int,
    rounds: int,
    compiled: bool,
    device: str,
    dtype: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Race our training against transformers' Llama under its own Trainer: same weights, same data, in turns.

    Writes training.json and training.html into --out (default: attnkit-bench). Ctrl-C keeps the finished form.

    Exit codes: 1 the peer failed (listed); 3 text or package not installed; 4 bad input; 5 no such device or out of memory;
    6 ours failed or the losses differ (listed); 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-bench")
    number_format = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    if number_format == "float16":
        raise OptionError(f"--dtype {dtype} is fp16 here, which is not trained in; use fp32, or bf16 where the GPU has it")
    from attnkit.lab import bench
    from attnkit.report.race_training import lead

    fast = place.type == "cuda"
    length = context or (2048 if fast else 128)
    config = _config(preset or ("decoder-50m" if fast else "decoder-tiny"), dim, layers, heads, length, text)
    advice = "race the other with --forms, into another --out"
    with Listener("racing", folder, silent=quiet or as_json, unit="forms", advice=advice).listening() as listener:
        document = bench.run_training(
            config,
            context=length,
            batch=batch or (16 if fast else 4),
            forms=forms or ("rows", "packed"),
            text=text,
            steps=steps,
            rounds=rounds,
            compiled=compiled,
            device=place,
            precision="bf16" if number_format == "bfloat16" else "fp32",
            seed=seed,
            out=folder,
            on_event=listener.hear,
            command=shlex.join(["attnkit", *sys.argv[1:]]),
        )
    shown = [*section_of(document, hidden=_TOLD)[0], *lead(document["rows"]), ""]
    emit(document, as_json, *shown, f"page: {folder / 'training.html'}   data: {folder / 'training.json'}")
    for entry in document["skipped"]:
        if entry["peer"] == bench.OWN:
            raise CheckFailed(f"{entry['shape']['form']}: {entry['reason']}")
    if document["skipped"]:
        raise click.exceptions.Exit(1)


def _config(
    preset: str, dim: int | None, layers: int | None, heads: tuple[int, int] | None, context: int, text: str | None
) -> Any:
    """The preset with other sizes where they are asked for."""
    from attnkit.models import PRESETS, AttnkitDecoderConfig
    from attnkit.training.tokenizers import BYTES_VOCABULARY

    base: Any = PRESETS[preset]()
    if not isinstance(base, AttnkitDecoderConfig):
        raise OptionError(f"--preset {preset} is no decoder; choose one whose name begins with decoder")
    sizes: dict[str, Any] = {"max_position_embeddings": context, "num_hidden_layers": layers or base.num_hidden_layers}
    if dim:
        sizes |= {"hidden_size": dim, "intermediate_size": base.intermediate_size * dim // base.hidden_size}
    if heads:
        sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if text:
        sizes["vocab_size"] = max(base.vocab_size, BYTES_VOCABULARY)
    return PRESETS[preset](**sizes)


command = click.Group(
    "bench", commands=[_kernels, _training], help="Races: ours against other implementations, on this machine."
)
