"""`attnkit numerics conformance`: `attnkit ops check` beside the other instruments of numerics."""

from typing import Any

import click

from attnkit.cli._common import device_option, dtype_option, json_option, quiet_option, verb
from attnkit.cli.ops import check, level_option

__all__ = ["command"]


@verb(
    "conformance",
    examples=("attnkit numerics conformance", "attnkit numerics conformance --op attention --level full"),
    python=check.python,
)
@click.option("--op", "names", multiple=True, metavar="NAME", help="Only this operator; may be repeated.")
@device_option
@dtype_option
@level_option
@json_option
@quiet_option
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Compare outputs and gradients of operators with float64, on this machine: the same as `attnkit ops check`."""
    context.invoke(check, **options)
