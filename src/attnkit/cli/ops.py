"""`attnkit ops`: list operators, show what they accept, check their numerics on this machine."""

import inspect
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from attnkit._core.errors import CheckFailed
from attnkit.cli._common import (
    DTYPES,
    Progress,
    device_option,
    dtype_option,
    emit,
    json_option,
    quiet_option,
    resolve_device,
    verb,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from attnkit._core.opspec import OpSpec
    from attnkit.lab.numerics.conformance import Row

__all__ = ["check", "command", "jobs_option", "level_option"]

_SHOWN_FAILURES = 20
level_option = click.option(
    "--level", type=click.Choice(["fast", "full"]), default="fast", show_default=True, help="How many cases."
)


def _parse_jobs(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise click.BadParameter(f"{value!r} is no number of processes; write auto, or 1 or more")
    return int(value)


jobs_option = click.option(
    "--jobs",
    default="auto",
    callback=_parse_jobs,
    show_default=True,
    metavar="auto|N",
    help="Processes; auto is as many as cores and memory allow, one where there is little to do.",
)


@verb("list", examples=("attnkit ops list", "attnkit ops list --json"), python="from attnkit.ops import OPS\nlist(OPS)")
@json_option
def _list(as_json: bool) -> None:
    """List the operators: what each computes, its backends in order of preference, its dtypes."""
    from attnkit.ops import OPS
    from attnkit.report import table

    rows = [
        {"operator": spec.name, "summary": spec.summary, "backends": _backends(spec), "dtypes": _dtypes(spec.dtypes)}
        for spec in OPS.values()
    ]
    cells = [(spec.name, spec.summary, ", ".join(_backends(spec)), ", ".join(_dtypes(spec.dtypes))) for spec in OPS.values()]
    shown = table(("operator", "what it computes", "backends", "dtypes"), cells, named=True)
    emit({"operators": rows}, as_json, shown, "More about one: attnkit ops show NAME")


@verb(
    "show",
    examples=("attnkit ops show attention", "attnkit ops show attention --json"),
    python='from attnkit.ops import OPS\nOPS["attention"].capabilities, OPS["attention"].refusals',
)
@click.argument("name")
@json_option
def _show(name: str, as_json: bool) -> None:
    """Show one operator: signature, source, capabilities, and what it refuses and why."""
    from attnkit.ops import OPS
    from attnkit.report import table

    spec = OPS[name]
    invariances = [invariance.name for invariance in spec.invariances]
    signature = inspect.signature(spec.function)
    plain = signature.replace(
        parameters=[parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    result = {
        "operator": spec.name,
        "summary": spec.summary,
        "source": spec.source,
        "signature": f"{spec.name}{plain}",
        "outputs": spec.outputs,
        "backends": _backends(spec),
        "dtypes": _dtypes(spec.dtypes),
        "capabilities": dict(spec.capabilities),
        "refusals": [{"what": refusal.what, "why": refusal.why} for refusal in spec.refusals],
        "sites": spec.sites,
        "invariances": invariances,
        "cases": len(spec.cases),
    }
    emit(
        result,
        as_json,
        f"attnkit.ops.{result['signature']}\n\n{spec.summary}\nsource: {spec.source}",
        table(("it can", "how far"), spec.capabilities.items()),
        table(("it refuses", "because"), [(refusal.what, refusal.why) for refusal in spec.refusals]),
        f"backends, in order of preference: {', '.join(_backends(spec))}; {len(spec.cases)} conformance cases",
        f"in 16 bits it rounds at: {', '.join(spec.sites)}",
        f"invariances: {', '.join(invariances) or 'none'}",
    )


@verb(
    "check",
    examples=("attnkit ops check", "attnkit ops check attention --dtype bf16 --level full"),
    python='from attnkit.lab.numerics import conformance\nconformance.run(["attention"], device="cuda")',
    memory_hint="use --jobs 1, or --device cpu",
)
@click.argument("names", nargs=-1)
@device_option
@dtype_option
@level_option
@jobs_option
@json_option
@quiet_option
def check(names: tuple[str, ...], device: str, dtype: str, level: str, jobs: int | None, as_json: bool, quiet: bool) -> None:
    """Compare outputs and gradients of the operators NAMES (all by default) with float64, on this machine.

    An operator passes where its error stays within a small multiple of the error that the plain form of the same precision
    makes on the same inputs. --dtype auto checks fp32, bf16 and fp16. Exit code 6 when something fails.
    """
    import torch

    from attnkit._core.devices import device_name
    from attnkit.lab.numerics import conformance
    from attnkit.report import envelope

    started = time.monotonic()
    where = resolve_device(device)
    dtypes = [getattr(torch, DTYPES[name]) for name in (DTYPES if dtype == "auto" else [dtype])]
    chosen = list(names) or None
    with Progress("checking", conformance.plan(chosen, dtypes=dtypes, level=level), silent=quiet or as_json) as progress:
        rows = conformance.run(chosen, dtypes=dtypes, device=where, level=level, jobs=jobs, on_row=_Cells(progress))
        progress.finish()
    document = envelope(
        "attnkit.conformance/1",
        rows,
        command=shlex.join(["attnkit", *sys.argv[1:]]),
        seed=None,
        device=device_name(where),
        dtype=", ".join(_dtypes(dtypes)),
        wall_s=time.monotonic() - started,
        extra={"level": level},
    )
    emit(document, as_json, *_tables(rows))
    failed = [row for row in rows if not row.ok]
    if failed:
        broken = ",".join(dict.fromkeys(f"{row.op}.{row.backend}" for row in failed))
        advice = f"switch off here with ATTNKIT_DISABLE={broken}; report with: attnkit doctor --bundle bug.zip"
        raise CheckFailed(f"{len(failed)} of {len(rows)} quantities lie outside their error budget; {advice}")


class _Cells:
    """Advances a progress by one whenever the rows of another (operator, case, dtype) begin."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._last: tuple[str, str, str] | None = None

    def __call__(self, row: "Row") -> None:
        cell = (row.op, row.case, row.dtype)
        if cell != self._last:
            self._last = cell
            self._progress.advance(note=f"{row.op}, {row.case}")


def _tables(rows: "list[Row]") -> list[Any]:
    """One table an operator with the worst case of each quantity, then every failure, then the count."""
    from attnkit.report import table

    headers = ("quantity", "max error", "allowed", "naive error", "dtype", "backend", "case", "verdict")
    shown: list[Any] = []
    for op in dict.fromkeys(row.op for row in rows):
        worst: dict[str, Row] = {}
        for row in rows:
            if row.op == op and (row.quantity not in worst or _severity(row) > _severity(worst[row.quantity])):
                worst[row.quantity] = row
        title = f"{op}: worst case of each quantity, against float64"
        shown.append(table(headers, [_cells(row) for row in worst.values()], title=title))
    failed = [row for row in rows if not row.ok]
    shown += [
        f"FAIL {row.op}.{row.backend}, {row.dtype}, {row.case}, {row.quantity}: {row.note or _figures(row)}"
        for row in failed[:_SHOWN_FAILURES]
    ]
    if len(failed) > _SHOWN_FAILURES:
        shown.append(f"... and {len(failed) - _SHOWN_FAILURES} more; --json lists all")
    return [*shown, f"{len(rows) - len(failed)} of {len(rows)} quantities pass"]


def _cells(row: "Row") -> tuple[object, ...]:
    errors = (f"{row.error:.1e}", f"{row.budget:.1e}", f"{row.naive_error:.1e}")
    return (row.quantity, *errors, row.dtype, row.backend, row.case, "pass" if row.ok else "FAIL")


def _figures(row: "Row") -> str:
    return f"error {row.error:.1e}, allowed {row.budget:.1e}"


def _severity(row: "Row") -> tuple[bool, float]:
    return not row.ok, row.error / row.budget if row.budget else row.error


def _backends(spec: "OpSpec") -> list[str]:
    return [backend.name for backend in spec.backends]


def _dtypes(dtypes: "Iterable[torch.dtype]") -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


command = click.Group("ops", commands=[_list, _show, check], help="Operators: what they accept, and how exact they are here.")
