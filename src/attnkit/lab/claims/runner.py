"""Running a claim: cells that are kept one by one, the verdict after each, and the files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.claims.claim import Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.place import Place
from attnkit.lab.numerics.memory import Memory
from attnkit.report.claims_plots import save_figures

__all__ = ["SCHEMA", "run"]

SCHEMA = "attnkit.claim/1"


def run(
    claim: Claim,
    out: Path,
    *,
    settings: Any = None,
    device: str | torch.device = "cpu",
    quick: bool = False,
    only: str = "",
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    command: str | None = None,
) -> dict[str, Any]:
    """Do the cells of a claim that are not done, and say what came out.

    Args:
        claim: of CLAIMS.
        out: folder; gets NAME.json (written after every cell, with the verdict so far), NAME.html, NAME.png (where matplotlib
            is installed), and NAME-runs with the trainings.
        settings: of `claim.configure`; None takes those of the form.
        device: where to compute.
        quick: the settings are those of the quick form, and so the verdict stays open.
        only: do the cells whose names contain this; the verdict stays open until all are done.
        resume: keep what is done, single trainings too: what several processes have trained in folders of their own is put
            together by copying their NAME-runs into one.
        on_event: told the progress.
        command: the command line to record; None records this call.
    Returns:
        the envelope of attnkit.claim/1, as in the file.
    Raises:
        OptionError: the folder holds this claim's trainings or an unfinished result and `resume` is not set; or `resume` is,
            and the result or a training has other settings; or no cell is called so.
        KeyboardInterrupt: a signal asked to stop; finished cells and a checkpoint are kept.
    """
    place = torch.device(device)
    chosen = claim.configure(quick=quick) if settings is None else settings
    said = {name: getattr(claim, name) for name in ("name", "systems", "says", "source", "protocol")}
    folder = out / f"{claim.name}-runs"
    memory = Memory(
        out / f"{claim.name}.json", schema=SCHEMA, what="claim",
        rules={"claim": said, "settings": dataclasses.asdict(chosen), "quick": quick},
        command=command or f"attnkit.lab.claims.run({claim.name!r}, ...)", device=device_name(place),
        dtype="bf16" if place.type == "cuda" else "fp32", resume=resume,
    )  # fmt: skip
    if not resume and folder.is_dir():
        raise OptionError(f"{folder} holds trainings already; go on with resume (--resume), or choose another out (--out)")
    every = claim.cells(chosen)
    cells = [cell for cell in every if only in cell.name]
    if not cells:
        raise OptionError(f"no cell of {claim.name} has {only!r} in its name; the first is {every[0].name!r}")
    total, done = sum(cell.work for cell in cells), sum(cell.work for cell in cells if cell.name in memory.finished)
    on_event(Event("plan", f"{len(cells)} cells", done, total))
    document = _save(memory, claim, chosen, len(every), quick)
    try:
        for cell in cells:
            if cell.name in memory.finished:
                continue

            def tell(share: float, text: str, name: str = cell.name, before: int = done, work: int = cell.work) -> None:
                on_event(Event("step", f"{name}, {text}", before + int(share * work), total))

            rows = [{"cell": cell.name, **row} for row in cell.run(Place(folder, place, tell))]
            memory.add(cell.name, report.plain(rows))
            done += cell.work
            document = _save(memory, claim, chosen, len(every), quick)
            on_event(Event("step", cell.name, done, total))
    finally:
        report.write_html(out / f"{claim.name}.html", [document])
        save_figures(out / f"{claim.name}.png", document)
    return document


def _save(memory: Memory, claim: Claim, settings: Any, cells: int, quick: bool) -> dict[str, Any]:
    rows: list[Row] = memory.rows
    found = claim.conclude(settings, rows) if rows else Conclusion(Verdict("undecided", "Nothing was measured."))
    verdict = found.verdict
    if len(memory.finished) < cells:
        so_far = f"{len(memory.finished)} of {cells} cells are done; so far: {verdict.outcome}. {verdict.reason}"
        verdict = Verdict("undecided", so_far, verdict.numbers)
    elif quick:
        so_far = f"The quick form is too small to decide; it gave: {verdict.outcome}. {verdict.reason}"
        verdict = Verdict("undecided", so_far, verdict.numbers)
    extra = {"verdict": dataclasses.asdict(verdict), "figures": list(found.figures), "tables": list(found.tables)}
    return memory.save(complete=len(memory.finished) == cells, extra=extra)
