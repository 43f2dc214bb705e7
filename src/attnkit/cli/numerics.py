"""`attnkit numerics`: how far attention is from the true value, and why. A verb is a file and its name here."""

import click

from attnkit.cli import numerics_sites, numerics_sweep, numerics_weights, numerics_weights_study

__all__ = ["command"]

command = click.Group(
    "numerics",
    commands=[numerics_sweep.command, numerics_sites.command, numerics_weights.command, numerics_weights_study.command],
    help="Deviation from float64, by format, length, tile and rounding site; and of the weights of training runs.",
)
