"""`attnkit eval`: what a trained model can do."""

import shlex
import sys
import time
from pathlib import Path

import click

from attnkit.cli._common import (
    Progress,
    device_option,
    emit,
    json_option,
    out_option,
    parse_lengths,
    parse_names,
    quiet_option,
    resolve_device,
    seed_option,
    verb,
)

__all__ = ["command"]

TEXT = "text"


@verb(
    "run",
    examples=(
        "attnkit eval run mqar --model runs/mqar --lengths 64,128,256",
        "attnkit eval run text --model runs/novels --out runs/novels/eval",
    ),
    python=(
        "from attnkit.training import TASKS\n"
        "from attnkit.training.judge import judge_task\n"
        "rows = judge_task(folder, TASKS['mqar'](), [64], examples=1000, seed=0, device='cpu')"
    ),
)
@click.argument("task")
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, metavar="DIR",
    help="The --out of a finished attnkit train.",
)  # fmt: skip
@click.option(
    "--lengths", callback=parse_lengths, metavar="N,..", help="Tokens of an example.  [default: those it was trained on]"
)
@click.option("--set", "settings", callback=parse_names, metavar="A=N,..", help="Fields of the task, e.g. alphabet=256.")
@click.option("--examples", type=click.IntRange(min=1), default=1000, show_default=True, help="Examples of each length.")
@click.option("--text", metavar="ASSET|FILE", help="For the task text.  [default: the one it was trained on]")
@device_option
@seed_option
@out_option
@json_option
@quiet_option
def _run(
    task: str,
    model: Path,
    lengths: tuple[int, ...] | None,
    settings: tuple[str, ...] | None,
    examples: int,
    text: str | None,
    device: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Judge a model on TASK: a synthetic one (mqar, copy, ..) on fresh examples, or `text` beside a 5-gram.

    With --out, writes eval-TASK.json there.

    Exit codes: 3 text or package not installed; 4 bad input; 5 no such device.
    """
    place = resolve_device(device)
    from attnkit import report
    from attnkit.training.judge import judge_task, judge_text
    from attnkit.training.model import load_model

    started = time.monotonic()
    with Progress(f"judging {task}", 100, silent=quiet or as_json) as progress:

        def tell(done: int, total: int) -> None:
            progress.advance(100 * done // total - progress.done)

        if task == TEXT:
            rows = judge_text(model, text, device=str(place), on_row=tell, on_phase=progress.phase)
        else:
            from attnkit.cli.train import make_task

            asked = make_task(task, settings)
            trained = load_model(model)[1]["data"].get("lengths")
            chosen = lengths or tuple(trained or (64,))
            rows = judge_task(model, asked, chosen, examples=examples, seed=seed, device=str(place), on_row=tell)
    document = report.envelope(
        "attnkit.eval/1", rows, command=shlex.join(["attnkit", *sys.argv[1:]]), seed=seed, device=str(place), dtype="fp32",
        wall_s=time.monotonic() - started,
    )  # fmt: skip
    if out is not None:
        report.write_json(out / f"eval-{task}.json", document)
    left_out = {"sha256", "right", "answers"}
    headers = [name for name in rows[0] if name not in left_out]
    cells = [[f"{row[name]:.4f}" if isinstance(row[name], float) else row[name] for name in headers] for row in rows]
    emit(document, as_json, report.table(headers, cells, title=f"{task} of {model}"))


command = click.Group("eval", commands=[_run], help="Judge trained models.")
