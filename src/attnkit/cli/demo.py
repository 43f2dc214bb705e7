"""`attnkit demo`: the main job on the packaged model and text."""

from pathlib import Path

import click

from attnkit.cli._common import json_option, out_option, quiet_option, resolve_device, resolve_dtype, resume_option, verb
from attnkit.cli.compare import MEMORY_HINT, compare_and_show

__all__ = ["command"]

LENGTH = 2048


@verb(
    "demo",
    examples=("attnkit demo", "attnkit demo --out runs/demo"),
    python='from pathlib import Path\nfrom attnkit.lab import compare\nresult = compare.run(out=Path("report"))',
    memory_hint=MEMORY_HINT,
)
@out_option
@resume_option
@json_option
@quiet_option
def command(out: Path | None, resume: bool, as_json: bool, quiet: bool) -> None:
    """Compare the default methods on a real 135M model reading 2,048 tokens of an encyclopaedia, on the CPU.

    Takes about two and a half minutes on two cores, needs no network, and ends with tables here and a page in
    report/index.html. Before: pip install "attnkit[gguf]", then attnkit assets fetch lm wiki --run.

    Exit codes: 3 model, text or package not installed; 130 interrupted, finished parts kept for --resume.
    """
    place = resolve_device("cpu")
    if not quiet and not as_json:
        click.echo("SmolLM2-135M-Instruct on the CPU, 2,048 tokens; Ctrl-C keeps what is finished", err=True)
    compare_and_show(
        as_json=as_json,
        quiet=quiet,
        out=out or Path("report"),
        resume=resume,
        model="smollm2",
        text="wiki",
        lengths=(LENGTH,),
        methods=None,
        trials=1,
        device=place,
        dtype=resolve_dtype("auto", place),
        seed=0,
    )
