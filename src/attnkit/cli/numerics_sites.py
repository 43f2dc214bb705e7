"""`attnkit numerics sites`: which rounding causes how much deviation."""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from attnkit.cli._common import device_option, emit, json_option, out_option, resolve_device, seed_option, verb

__all__ = ["command"]

_SIZE = click.IntRange(min=1)


@verb(
    "sites",
    examples=(
        "attnkit numerics sites",
        "attnkit numerics sites --format fp16 --policy kernel --algorithm baseline --distribution value-mean",
    ),
    python=(
        "from attnkit.lab.numerics import BF16, SitePolicy, attribute_sites\n"
        'found = attribute_sites(q, k, v, SitePolicy.preset("paper", BF16), BF16, block_k=16)'
    ),
    memory_hint="use a shorter --length",
)
@click.option("--format", "name", default="bf16", show_default=True, metavar="F", help="As of `attnkit numerics sweep`.")
@click.option("--policy", default="paper", show_default=True, metavar="P", help="paper, kernel, autocast_ref or all.")
@click.option("--algorithm", default="fa2", show_default=True, metavar="A", help="baseline, fa1, fa2 or lagged.")
@click.option(
    "--mode", type=click.Choice(["one_in", "one_out"]), default="one_in", show_default=True,
    help="Round at one site alone, or at all but one.",
)  # fmt: skip
@click.option("--distribution", default="normal", show_default=True, metavar="D", help="Inputs.")
@click.option("--length", type=_SIZE, default=1024, show_default=True, help="Tokens.")
@click.option("--block", type=_SIZE, default=16, show_default=True, help="Keys of a tile.")
@click.option("--dim", type=_SIZE, default=64, show_default=True, help="Head width.")
@device_option
@seed_option
@out_option
@json_option
def command(
    name: str,
    policy: Any,
    algorithm: Any,
    mode: Any,
    distribution: str,
    length: int,
    block: int,
    dim: int,
    device: str,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the deviation that each rounding site of a policy causes.

    Writes sites.json and sites.html where --out says.

    Exit codes: 4 bad input; 5 no such device or out of memory.
    """
    started, place = time.monotonic(), resolve_device(device)
    import torch

    from attnkit import report
    from attnkit._core.devices import device_name
    from attnkit.lab.numerics import DISTRIBUTIONS, FORWARD_SITES, SitePolicy, attribute_sites, parse_format, round_to

    fmt = parse_format(name)
    drawn = DISTRIBUTIONS[distribution].draw(torch.Generator().manual_seed(seed), length, 1, dim)
    q, k, v = (round_to(t.double(), fmt).to(place) for t in drawn)
    sites = SitePolicy.preset(policy, fmt)
    found = attribute_sites(q, k, v, sites, fmt, mode=mode, algorithm=algorithm, block_k=block)
    meaning = {**FORWARD_SITES, "accumulator": "partial sums inside products", "all": "everything that the policy rounds"}
    document = report.envelope(
        "attnkit.sites/1",
        [{"site": site, "what": meaning[site], **dataclasses.asdict(row)} for site, row in found.items()],
        command=shlex.join(["attnkit", *sys.argv[1:]]),
        seed=seed,
        device=device_name(place),
        dtype=fmt.name,
        wall_s=time.monotonic() - started,
        extra={
            "mode": mode, "algorithm": algorithm, "policy": policy, "distribution": distribution, "length": length,
            "block": block,
        },
    )  # fmt: skip
    if out is not None:
        report.write_json(out / "sites.json", document)
        report.write_html(out / "sites.html", [document])
    section = report.SECTIONS[document["schema"]].draw(document)
    tables = [report.table(part.headers, part.rows) for part in section.blocks if isinstance(part, report.Table)]
    emit(document, as_json, *tables, *section.lead)
