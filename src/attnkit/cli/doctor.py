"""`attnkit doctor`: what runs on this machine, what refuses, and why."""

import importlib.metadata
import json
import os
import platform
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnkit.cli._common import emit, json_option, verb, warn

if TYPE_CHECKING:
    from attnkit._core.opspec import OpSpec

_HIDDEN_EXTRAS = {"all", "test", "dev", "docs"}  # of no use to somebody who asks what is missing
TESTED_TRANSFORMERS = ((5, 17), (5, 23))
_SHORT = ("backward", "packed", "grouped heads", "compile")


@verb(
    "doctor",
    examples=("attnkit doctor", "attnkit doctor --bundle bug.zip"),
    python="import attnkit\nprint(attnkit.explain(attnkit.ops.attention, q, k, v))",
)
@json_option
@click.option(
    "--bundle",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.zip",
    help="Also write this report and the list of packages.",
)
@click.pass_context
def command(ctx: click.Context, as_json: bool, bundle: Path | None) -> None:
    """Say what runs on this machine, what refuses, and why: versions, device, operators, extras, assets.

    Exit code 1 when an operator can not run. A bundle holds this report, the installed packages and ATTNKIT_* variables.
    """
    facts = _facts()
    if facts["transformers_note"]:
        warn(facts["transformers_note"])
    if bundle is not None:
        _write_bundle(bundle, facts)
    emit(facts, as_json, *_tables(facts))
    if facts["problems"]:
        ctx.exit(1)


def _facts() -> dict[str, Any]:
    from attnkit.assets import ASSETS, installed
    from attnkit.ops import OPS
    from attnkit.report import versions

    devices = _devices()
    operators = [_operator(spec, devices) for spec in OPS.values()]
    problems = [
        f"{operator['operator']} has no backend on {device}"
        for operator in operators
        for device, backend in operator["runs"].items()
        if backend["chosen"] is None
    ]
    found = versions()
    return {
        "versions": found,
        "platform": platform.platform(),
        "devices": devices,
        "operators": operators,
        "extras": _extras(),
        "assets": {asset.key: installed(asset.key) for asset in ASSETS.values()},
        "transformers_note": transformers_note(found["transformers"]),
        "problems": problems,
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) // 1024
        memory = properties.total_memory / 2**30
        name = f"{properties.name} (sm_{properties.major}{properties.minor}, {shared} KiB shared, {memory:.0f} GiB)"
        devices.append({"device": f"cuda:{index}", "name": name})
    return devices


def _operator(spec: "OpSpec", devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Which backend takes the operator's first conformance case on each kind of device, and why others do not."""
    import torch

    runs = {}
    for kind in dict.fromkeys(device["device"].split(":")[0] for device in devices):
        inputs = spec.cases[0].make(torch.Generator().manual_seed(0))
        inputs.pop("return_lse", None)  # the plain call is what most people make
        inputs = {name: value.to(kind) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        runs[kind] = _explain(spec, inputs)
    return {
        "operator": spec.name,
        "runs": runs,
        "capabilities": dict(spec.capabilities),
        "refusals": [{"what": refusal.what, "why": refusal.why} for refusal in spec.refusals],
    }


def _explain(spec: "OpSpec", inputs: Mapping[str, Any]) -> dict[str, Any]:
    from attnkit.ops import explain

    explanation = explain(spec.name, **spec.arguments(dict(inputs)))
    return {"chosen": explanation.chosen, "rejected": explanation.rejected}


def _extras() -> dict[str, bool]:
    """Extra -> whether all its packages are here, from attnkit's own metadata."""
    try:
        names = importlib.metadata.metadata("attnkit").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources, which do not say what is installed
        return {}
    return {name: all(map(_installed, _packages(name))) for name in names if name not in _HIDDEN_EXTRAS}


def _packages(extra: str) -> set[str]:
    packages: set[str] = set()
    for requirement in importlib.metadata.requires("attnkit") or []:
        found = re.match(r"""([\w.-]+)(?:\[([\w,]+)\])?.*extra == ["']([\w-]+)["']""", requirement)
        if found is None or found[3] != extra:
            continue
        if found[1] == "attnkit":
            packages.update(*(_packages(inner) for inner in found[2].split(",")))
        else:
            packages.add(found[1])
    return packages


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def transformers_note(version: str | None) -> str:
    """What to know about an installed transformers outside the tested range; empty when it lies inside or is absent."""
    if version is None:
        return ""
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    low, high = TESTED_TRANSFORMERS
    if low <= parts <= high:
        return ""
    tested = "..".join(".".join(map(str, bound)) for bound in TESTED_TRANSFORMERS)
    return f"transformers {version} is outside the tested range {tested}; policies check what they need and refuse by name"


def _tables(facts: Mapping[str, Any]) -> list[Any]:
    from attnkit.report import table

    kinds = list(facts["operators"][0]["runs"]) if facts["operators"] else []
    rows = [
        (
            operator["operator"],
            *(operator["runs"][kind]["chosen"] or "NONE" for kind in kinds),
            *(_short(operator["capabilities"].get(name)) for name in _SHORT),
        )
        for operator in facts["operators"]
    ]
    refused = [
        f"  {operator['operator']} on {kind}: not {backend}: {'; '.join(reasons)}"
        for operator in facts["operators"]
        for kind in kinds
        for backend, reasons in operator["runs"][kind]["rejected"].items()
    ]
    extras = [
        f"{extra} yes" if here else f'{extra} no (pip install "attnkit[{extra}]")' for extra, here in facts["extras"].items()
    ]
    assets = [f"{key} {'yes' if here else 'no'}" for key, here in facts["assets"].items()]
    missing = sum(not here for here in facts["extras"].values())
    return [
        "   ".join(f"{name} {version}" for name, version in facts["versions"].items() if version),
        *(f"{device['device']}: {device['name']}" for device in facts["devices"]),
        table(("operator", *(f"{kind} runs" for kind in kinds), *_SHORT), rows),
        "Limits and refusals of one operator: attnkit ops show NAME",
        *(["Backends that refused a small call here:", *refused] if refused else []),
        f"extras   {' | '.join(extras)}",
        f"assets   {' | '.join(assets)}   (attnkit assets fetch KEY)",
        *(f"problem: {problem}" for problem in facts["problems"]),
        f"{len(facts['problems'])} problems, {missing} extras missing",
    ]


def _short(capability: str | None) -> str:
    return "-" if capability is None else "no" if capability.startswith("no") else "yes"


def _write_bundle(path: Path, facts: Mapping[str, Any]) -> None:
    from attnkit.report import plain

    names = {f"{item.name}=={item.version}" for item in importlib.metadata.distributions()}
    variables = {name: value for name, value in os.environ.items() if name.startswith("ATTNKIT_")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("doctor.json", json.dumps(plain(facts), indent=1))
        bundle.writestr("packages.txt", "\n".join(sorted(names)) + "\n")
        bundle.writestr("environment.json", json.dumps(variables, indent=1))
    click.echo(f"wrote {path}", err=True)
