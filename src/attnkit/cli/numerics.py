"""`attnkit numerics`: how far attention is from the true value, and why. A verb is a file and its name here."""

import click

from attnkit.cli import (
    numerics_conformance,
    numerics_localise,
    numerics_probe,
    numerics_reproduce,
    numerics_sites,
    numerics_sweep,
)

__all__ = ["command"]

command = click.Group(
    "numerics",
    commands=[
        numerics_sweep.command,
        numerics_sites.command,
        numerics_conformance.command,
        numerics_probe.command,
        numerics_localise.command,
        numerics_reproduce.command,
    ],
    help="Deviation from float64: over formats, lengths and tiles, by rounding site, of real operators, in trained models.",
)
