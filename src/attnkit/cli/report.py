"""`attnkit report`: result files to one HTML page."""

from pathlib import Path

import click

from attnkit.cli._common import verb


@verb(
    "report",
    examples=("attnkit report out/result.json -o report.html", "attnkit report benchmarks/results/*.json -o races.html"),
    python='from attnkit import report\nreport.write_html(Path("report.html"), [report.read_envelope(Path("result.json"))])',
)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
def command(files: tuple[Path, ...], output: Path) -> None:
    """Turn result FILES of attnkit commands into one self-contained HTML page: no network, printable, dark and light."""
    from attnkit.report import read_envelope, write_html

    write_html(output, [read_envelope(path) for path in files])
    click.echo(output)
