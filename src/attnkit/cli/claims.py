"""`attnkit claims`: what papers claim, and small experiments that could refute it."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from attnkit._core.errors import OptionError
from attnkit.cli._common import (
    device_option,
    emit,
    json_option,
    out_option,
    parse_names,
    quiet_option,
    resolve_device,
    resume_option,
    section_of,
    verb,
    warn,
)
from attnkit.cli._listener import Listener

__all__ = ["command"]


@verb(
    "list",
    examples=("attnkit claims list", "attnkit claims list --json"),
    python="from attnkit.lab.claims import CLAIMS\nfor claim in CLAIMS.values():\n    print(claim.name, claim.says)",
)
@json_option
def _list(as_json: bool) -> None:
    """Every claim that can be tested, with its systems and what a test costs."""
    from attnkit.lab.claims import CLAIMS
    from attnkit.report import table

    names = ("name", "systems", "says", "device", "minutes")
    rows = [{name: getattr(claim, name) for name in names} for claim in CLAIMS.values()]
    cells = [
        [row["name"], ", ".join(map(str, row["systems"])), row["says"], f"{row['minutes']:g} min, {row['device']}"]
        for row in rows
    ]
    emit({"claims": rows}, as_json, table(["claim", "systems", "the paper says", "costs"], cells))


@verb(
    "show",
    examples=("attnkit claims show entmax-recall", "attnkit claims show scfa-lm --json"),
    python="from attnkit.lab.claims import CLAIMS\nprint(CLAIMS['entmax-recall'].protocol)",
)
@click.argument("name")
@json_option
def _show(name: str, as_json: bool) -> None:
    """What the paper of claim NAME says, how it is tested here, and the settings with their defaults."""
    import dataclasses

    from attnkit.lab.claims import CLAIMS
    from attnkit.report import table

    claim = CLAIMS[name]
    settings = dataclasses.asdict(claim.settings())
    told = {field: getattr(claim, field) for field in ("name", "systems", "says", "source", "protocol", "device", "minutes")}
    cells = [[field, _text(value), _text(claim.quick.get(field, value))] for field, value in settings.items()]
    lead = [
        f"{claim.name}, of system {', '.join(map(str, claim.systems))} ({claim.source})",
        f"The paper says: {claim.says}.",
        f"Here: {claim.protocol}",
        f"About {claim.minutes:g} minutes, meant for: {claim.device}.",
    ]
    emit(
        told | {"settings": settings, "quick": dict(claim.quick)}, as_json, *lead,
        table(["setting (--set)", "full form", "quick form"], cells),
    )  # fmt: skip


def _text(value: Any) -> str:
    return (
        ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


@verb(
    "run",
    examples=(
        "attnkit claims run entmax-iterations --out claims",
        "attnkit claims run entmax-lm --device cuda --set steps=100 --set lengths=2048,8192 --out claims",
    ),
    python=(
        "from attnkit.lab import claims\n"
        "result = claims.run(claims.CLAIMS['entmax-recall'], out, quick=True)\n"
        "print(result['verdict']['outcome'])"
    ),
    memory_hint="finished cells are kept; use smaller --set lengths, step_tokens or dim",
)
@click.argument("name")
@device_option
@click.option("--quick", is_flag=True, help="A form of seconds on a CPU, which decides nothing.")
@click.option("--seeds", callback=parse_names, metavar="N,..", help="Seeds.  [default: those of the form]")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a setting; lists are written 1,2,3.")
@click.option("--only", default="", metavar="TEXT", help="Do the cells whose names contain TEXT.  [default: all]")
@out_option
@resume_option
@json_option
@quiet_option
def _run(
    name: str,
    device: str,
    quick: bool,
    seeds: tuple[str, ...] | None,
    changes: tuple[str, ...],
    only: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Test claim NAME: train and measure its cells, and say whether it holds.

    Writes NAME.json after every cell, with the verdict so far, then NAME.html and NAME.png; trainings are kept in NAME-runs.
    All of them lie in --out (default: attnkit-claims). Ctrl-C keeps what is done. The exit code does not depend on the
    verdict. Cells can run side by side, on a GPU each, with --only and folders of their own; with all of their NAME-runs copied
    into one folder, --resume there makes one result of them.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device or out of memory; 130 interrupted.
    """
    place, folder = resolve_device(device), out or Path("attnkit-claims")
    if place.index:
        raise OptionError(f"--device {device}: the trainer takes the first visible GPU; set CUDA_VISIBLE_DEVICES={place.index}")
    from attnkit.lab.claims import CLAIMS, run

    claim = CLAIMS[name]
    if claim.device == "cuda" and place.type == "cpu" and not quick and not changes:
        warn(f"{name} takes about {claim.minutes:g} minutes on a GPU and very long here; --quick shows that it works")
    settings = claim.configure(quick=quick, seeds=_numbers(seeds), changes=dict(map(_pair, changes)))
    with Listener(name, folder, silent=quiet or as_json, unit="units of work").listening() as listener:
        document = run(
            claim, folder, settings=settings, device=place, quick=quick, only=only, resume=resume, on_event=listener.hear,
            command=shlex.join(["attnkit", *sys.argv[1:]]),
        )  # fmt: skip
    tables, lead = section_of(document)
    emit(document, as_json, *tables, *lead, "", f"page: {folder / name}.html   data: {folder / name}.json")


def _numbers(texts: tuple[str, ...] | None) -> tuple[int, ...] | None:
    if texts is None:
        return None
    if not all(text.isdecimal() for text in texts):
        raise OptionError(f"--seeds {','.join(texts)}: write numbers, for example 0,1,2")
    return tuple(map(int, texts))


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark:
        raise OptionError(f"--set {text}: write NAME=VALUE; `attnkit claims show` lists the settings")
    return name, value


command = click.Group("claims", commands=[_list, _show, _run], help="What papers claim, tested small: list, show, run.")
