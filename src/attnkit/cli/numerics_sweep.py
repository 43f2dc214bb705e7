"""`attnkit numerics sweep`: deviation over formats, lengths, tiles, algorithms and inputs."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from attnkit.cli._common import (
    device_option,
    emit,
    json_option,
    out_option,
    parse_lengths,
    parse_names,
    quiet_option,
    resolve_device,
    resume_option,
    section_of,
    seed_option,
    verb,
)
from attnkit.cli._listener import Listener

__all__ = ["command"]

_WIDE = ("units of a row", "bits lost")  # columns that a terminal is too narrow for; the page has them


@verb(
    "sweep",
    examples=(
        "attnkit numerics sweep",
        "attnkit numerics sweep --formats bf16 --lengths 4k --blocks 16 --algorithms fa1,fa2 --seeds 5",
    ),
    python=(
        "from attnkit.lab.numerics import DeviationSweep\n"
        'result = DeviationSweep(formats=("bf16",), lengths=(4096,), blocks=(16,)).run()'
    ),
    memory_hint="finished inputs are kept; use shorter --lengths",
)
@click.option(
    "--formats", default="bf16,fp16", callback=parse_names, show_default=True, metavar="F,..",
    help="fp64, fp32, tf32, bf16, fp16, e5m2, e4m3, or p12 for 12 significant bits.",
)  # fmt: skip
@click.option("--lengths", default="256,1k,4k", callback=parse_lengths, show_default=True, metavar="N,..", help="Tokens.")
@click.option("--blocks", default="16,64", callback=parse_lengths, show_default=True, metavar="N,..", help="Keys of a tile.")
@click.option("--algorithms", default="fa2", callback=parse_names, show_default=True, metavar="A,..", help="fa1, fa2, lagged.")
@click.option(
    "--policies", default="paper,kernel", callback=parse_names, show_default=True, metavar="P,..",
    help="What is rounded: paper, kernel, autocast_ref, all.",
)  # fmt: skip
@click.option(
    "--distributions", default="normal", callback=parse_names, show_default=True, metavar="D,..",
    help="Inputs: normal, outliers, value-mean, peaked, sink.",
)  # fmt: skip
@click.option(
    "--normalizers", default="exact", callback=parse_names, show_default=True, metavar="N,..",
    help="What the output is divided by: exact sums, or consistent ones, of rounded probabilities.",
)  # fmt: skip
@click.option(
    "--kernels", callback=parse_names, metavar="A,..",
    help="Measure these on the device too: attnkit:triton, attnkit:triton:stable=delta, sdpa-flash, ...",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many, from --seed on.")
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Head width.")
@click.option("--causal", is_flag=True, help="Rows see the keys up to their own only.")
@device_option
@seed_option
@out_option
@resume_option
@json_option
@quiet_option
def command(
    formats: tuple[str, ...],
    lengths: tuple[int, ...],
    blocks: tuple[int, ...],
    algorithms: tuple[Any, ...],
    policies: tuple[Any, ...],
    distributions: tuple[str, ...],
    normalizers: tuple[Any, ...],
    kernels: tuple[str, ...] | None,
    seeds: int,
    dim: int,
    causal: bool,
    device: str,
    seed: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how far emulated attention is from float64, beside the baseline that stores scores and probabilities.

    Writes sweep.json and sweep.html into --out (default: attnkit-numerics). Ctrl-C keeps the finished inputs.

    Exit codes: 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-numerics")
    from attnkit.lab.numerics import DeviationSweep

    sweep = DeviationSweep(
        formats=formats, lengths=lengths, blocks=blocks, algorithms=algorithms, policies=policies,
        distributions=distributions, normalizers=normalizers, seeds=tuple(range(seed, seed + seeds)), width=dim,
        causal=causal,
    )  # fmt: skip
    with Listener("measuring", folder, silent=quiet or as_json, unit="sets of inputs").listening() as listener:
        document = sweep.run(
            folder, device=place, resume=resume, on_event=listener.hear, command=shlex.join(["attnkit", *sys.argv[1:]]),
            kernels=_kernels(kernels or (), place),
        )  # fmt: skip
    tables, lead = section_of(document, hidden=_WIDE)
    emit(document, as_json, *tables, *lead, f"page: {folder / 'sweep.html'}   data: {folder / 'sweep.json'}")


def _kernels(names: tuple[str, ...], device: Any) -> dict[str, Any]:
    """Contestants of the attention race, as functions of tensors of any size.

    Raises:
        OptionError: an unknown name, or one that cannot run on the device.
    """
    from attnkit._core.errors import OptionError
    from attnkit.lab.bench.race import Shape, contestants
    from attnkit.lab.bench.races import RACES

    def measure(peer: Any, **inputs: Any) -> Any:
        q, k = inputs["q"], inputs["k"]
        sizes = dict(zip("BTHD", q.shape, strict=True)) | {"Hkv": k.shape[2]}
        shape = Shape("fwd", sizes, q.dtype, q.device)
        if reasons := peer.reasons(shape):
            raise OptionError(f"--kernels {peer.name}: {'; '.join(reasons)}")
        return peer.make(shape)(**inputs)

    return {peer.name: partial(measure, peer) for peer in contestants(RACES["attention"], names, device)} if names else {}
