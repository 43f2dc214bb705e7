"""`attnkit systems`: the thirty-one systems and how far each one is."""

import click

from attnkit import systems as catalogue
from attnkit.cli._common import emit, json_option, verb


@verb(
    "systems",
    examples=("attnkit systems", "attnkit systems --markdown"),
    python="from attnkit import systems\nfor system in systems.load():\n    print(system.number, system.title, system.status)",
)
@json_option
@click.option("--markdown", is_flag=True, help="Print the README's table.")
def command(as_json: bool, markdown: bool) -> None:
    """List the thirty-one published systems: where each lives in attnkit, its paper, its status.

    planned: nothing yet. partial: a usable part. works: all of it, tested. measured: raced against its peers.
    """
    from attnkit.report import table

    systems = catalogue.load()
    if markdown:
        click.echo(catalogue.markdown(systems))
        return
    rows = [(system.number, system.title, system.area, system.arxiv, system.status) for system in systems]
    notes = [f"{system.number}: {system.note}" for system in systems if system.note]
    shown = table(("#", "system", "in attnkit", "arXiv", "status"), rows)
    emit({"systems": systems}, as_json, shown, *notes, catalogue.summary(systems))
