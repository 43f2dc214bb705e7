"""The entry: arguments are checked, steps are done, files are written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkit import report
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.compare import loading, texts
from attnkit.lab.compare.comparison import Comparison, Setup
from attnkit.lab.compare.loading import LoadedModel
from attnkit.lab.compare.methods import select
from attnkit.lab.compare.plan import DEFAULT, TASKS
from attnkit.lab.compare.state import State

__all__ = ["placement", "run"]

MIN_LENGTH = 64


def run(
    *,
    model: str | Path | LoadedModel = loading.PACKAGED,
    text: str = "wiki",
    lengths: Sequence[int] = (2048,),
    methods: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    trials: int = 1,
    tasks: Sequence[str] = DEFAULT,
    query_aware: bool = False,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Compare methods on one model and one text; the package's docstring has the protocol.

    Args:
        model: "smollm2", a folder with safetensors, a .gguf file, or a `LoadedModel`.
        text: "wiki", "novels", or the path of a UTF-8 file.
        lengths: of the context in tokens, each at least 64.
        methods: names in METHODS, or presses of the cache ("adakv:snapkv@0.25", see `attnkit.lab.compare.methods.named`); None
            means the default ones, ("all",) all. The baseline, dense, always runs.
        device: where to compute, "cpu" by default; a `LoadedModel` stays where it is.
        dtype: of the model, by default bfloat16 on CUDA and float32 elsewhere; a `LoadedModel` keeps its own.
        out: folder for state.json, results.json and index.html; None writes nothing.
        resume: go on with the unfinished comparison in `out`.
        seed: of keys, haystacks and intervals.
        trials: text windows, and questions of each task at each depth, for every length.
        tasks: what is read, of "text", "needle" (pass-keys), "vt", "cwe", "fwe" and "assoc"; ("all",) all of them.
        query_aware: whether a question is read in one pass with the context, so that methods see it before
            they drop anything.
        on_event: called as the work goes on.
        command: the command line to record; None records this call.
    Returns:
        the envelope of attnkit.compare/1, as in results.json.
    Raises:
        AttnkitError: an argument that cannot be used, something that is not installed, a model that lacks what a method
            needs; the message names it and the fix. Finished steps stay in `out`, after KeyboardInterrupt too.
    """
    place, number = placement(model, device, dtype)
    tasks = TASKS if tuple(tasks) == ("all",) else tasks
    setup = Setup(
        source=model if isinstance(model, LoadedModel) else loading.locate(model),
        text=texts.read(text),
        lengths=_checked(lengths, trials, tasks),
        methods=select(methods),
        trials=trials,
        seed=seed,
        device=place,
        dtype=number,
        tasks=tuple(task for task in TASKS if task in tasks),
        query_aware=query_aware,
    )
    state = State(out, setup.identity, resume=resume)
    comparison = Comparison(setup, state, on_event)
    if comparison.todo:
        comparison.measure()
    call = ", ".join(f"{name}={value!r}" for name, value in setup.call.items())
    document = comparison.envelope(command or f"attnkit.lab.compare.run({call})")
    if out is not None:
        report.write_json(out / "results.json", document)
        report.write_html(out / "index.html", [document])
        state.write(finished=True)
    return document


def _checked(lengths: Sequence[int], trials: int, tasks: Sequence[str]) -> tuple[int, ...]:
    if not tasks or not set(tasks) <= set(TASKS):
        raise OptionError(f"tasks={','.join(tasks) or 'none'} is not allowed; give some of {', '.join(TASKS)}")
    if not lengths or min(lengths) < MIN_LENGTH:
        given = ",".join(map(str, lengths)) or "none"
        raise OptionError(f"lengths={given} is not allowed; give at least one, each {MIN_LENGTH} or more")
    if trials < 1:
        raise OptionError(f"trials={trials} is not allowed; at least 1, a key at each depth")
    return tuple(sorted(set(lengths)))


def placement(
    model: str | Path | LoadedModel, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in which format: what is given, or the defaults of `run`.

    Raises:
        OptionError: something is given for a model that is loaded already.
    """
    if isinstance(model, LoadedModel):
        if device is not None or dtype is not None:
            raise OptionError("device and dtype are those of the loaded model; leave them out, or move the model first")
        return model.model.device, model.model.dtype
    place = torch.device(device or "cpu")
    return place, dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
