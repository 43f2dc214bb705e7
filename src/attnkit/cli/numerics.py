"""`attnkit numerics`: how far attention is from the true value, and why. A verb is a file and its name here."""

import click

from attnkit.cli import numerics_sites, numerics_sweep

__all__ = ["command"]

command = click.Group(
    "numerics",
    commands=[numerics_sweep.command, numerics_sites.command],
    help="Deviation from float64: over formats, lengths and tiles, and by rounding site.",
)
