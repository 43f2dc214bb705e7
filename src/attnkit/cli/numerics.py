"""`attnkit numerics`: how far attention is from the true value, and why. A verb is a file and its name here."""

import click

from attnkit.cli import (
    numerics_conformance,
    numerics_localise,
    numerics_probe,
    numerics_reproduce,
    numerics_shadow,
    numerics_sites,
    numerics_sweep,
    numerics_weights,
    numerics_weights_study,
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
        numerics_shadow.command,
        numerics_reproduce.command,
        numerics_weights.command,
        numerics_weights_study.command,
    ],
    help="Deviation from float64: emulated, of real operators, in trained models; and of the weights of training runs.",
)
