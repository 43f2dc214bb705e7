"""`attnkit numerics conformance`: `attnkit ops check` beside the other instruments of numerics."""

from typing import Any

import click

from attnkit.cli._common import device_option, dtype_option, json_option, quiet_option, verb
from attnkit.cli.ops import check, jobs_option, level_option

__all__ = ["command"]


@verb(
    "conformance",
    examples=("attnkit numerics conformance", "attnkit numerics conformance --op attention --level full"),
    python=check.python,
    memory_hint=check.memory_hint,
)
@click.option("--op", "names", multiple=True, metavar="NAME", help="Only this operator; may be repeated.")
@device_option
@dtype_option
@level_option
@jobs_option
@json_option
@quiet_option
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Compare outputs and gradients of operators with float64, on this machine: the same as `attnkit ops check`."""
    context.invoke(check, **options)
