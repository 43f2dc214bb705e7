"""The entry: arguments are checked, each form of the data is raced, files are written."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attnkit import report
from attnkit._core.checks import check_choice
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError
from attnkit._core.events import Event, Kind
from attnkit.lab.bench import machine
from attnkit.lab.bench.training.heat import TOLERANCE, Out, race
from attnkit.lab.bench.training.rows import FORMS, load_tokens, make_data, random_tokens
from attnkit.lab.bench.training.sides import MASKED, PEER, Setup, initial_llama, make_recipe
from attnkit.models import AttnkitDecoderConfig

__all__ = ["run_training"]

SCHEMA = "attnkit.race/1"
NAME = "training"
MIN_ROUNDS = 3  # below that a median and quartiles say nothing
MIN_STEPS = 4  # a quarter of them does not count
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def run_training(
    config: AttnkitDecoderConfig,
    *,
    context: int,
    batch: int,
    forms: Sequence[str] = FORMS,
    text: str | None = None,
    steps: int = 20,
    rounds: int = 3,
    compiled: bool = False,
    device: str | torch.device = "cpu",
    precision: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    command: str = "attnkit.lab.bench.run_training(...)",
) -> dict[str, Any]:
    """Train our decoder and transformers' Llama from the same weights on the same data, in turns; docs/race.md says how.

    Args:
        config: sizes of both models.
        context: tokens of a sequence; the longest, where they are packed.
        batch: contexts in a batch.
        forms: "rows" (whole sequences), "packed" (sequences of all lengths in one row), or both.
        text: an asset or a UTF-8 file, read as bytes; None draws random tokens.
        steps: of a run, at least 4; a quarter of them does not count.
        rounds: timed runs of each side, at least 3.
        compiled: compile both, each in its own way.
        device: "cpu", or "cuda" where one GPU is visible.
        precision: "fp32" or "bf16"; None means bf16 on a GPU, fp32 elsewhere.
        seed: of weights and data.
        out: folder for training.json and training.html; None writes nothing.
        on_event: called as the work goes on, in forms.
        command: the command line to record.
    Returns:
        the envelope of attnkit.race/1, as in the file: a row for each form, or the reason why there is none under `skipped`.
    Raises:
        OptionError: an unknown form or precision, or a value outside its range.
        InputError: data that does not fit the model.
        UnsupportedError: a model that Llama is not.
        MissingAsset: the text is not here.
    """
    place = torch.device(device)
    precision = precision or ("bf16" if place.type == "cuda" else "fp32")
    _check(forms, precision, place)
    _check_least(context=(context, 2), batch=(batch, 1), steps=(steps, MIN_STEPS), rounds=(rounds, MIN_ROUNDS))
    recipe = make_recipe(steps=steps, precision=precision, seed=seed, compiled=compiled)
    llama = initial_llama(config, seed)
    chosen = [form for form in FORMS if form in forms]
    tell = _Teller(on_event, len(chosen))
    if text is None:
        tokens = random_tokens(steps * batch * context, config.vocab_size, context, seed)
    else:
        tokens = load_tokens(text, on_phase=lambda phase: tell("phase", phase))
    facts = {
        "rounds": rounds,
        "parameters": llama.num_parameters(),
        "recipe": recipe.facts(),
        "data": tokens.facts,
        "tolerance": TOLERANCE[precision],
        "threads": torch.get_num_threads(),
        "commit": machine.commit(),
    }
    common = {"command": command, "seed": seed, "device": device_name(place), "dtype": _DTYPES[precision]}
    book = _Book(out, common, facts)
    tell("plan", "")
    with machine.cold_kernels() as cold:
        for form in chosen:
            data = make_data(tokens, form, batch=batch, context=context, steps=steps, seed=seed)
            spot = {"shape": _shape(config, form, batch, context), "dtype": _DTYPES[precision], "pass": "step"}
            setup = Setup(llama, recipe, place, data)
            try:
                found = race(setup, rounds, partial(tell.begins, form))
                note = {"note": MASKED} if compiled or form == "packed" else {}
                book.rows.append({"op": NAME, **spot, "peer": PEER, **found, **note})
                if not cold:
                    book.rows[-1]["first_call_s"] = None
            except Out as error:
                book.skipped.append({"peer": error.side, **spot, "reason": str(error)})
            book.finished.append(form)
            book.save(complete=False)
            tell("step", form)
    document = book.save(complete=True)
    if out is not None:
        report.write_html(out / f"{NAME}.html", [document])
    return document


class _Teller:
    """Counts forms and tells who listens."""

    def __init__(self, listener: Callable[[Event], None], total: int) -> None:
        self._listener, self._total, self._done = listener, total, 0

    def __call__(self, kind: Kind, text: str) -> None:
        self._done += kind == "step"
        self._listener(Event(kind, text, self._done, self._total))

    def begins(self, form: str, what: str) -> None:
        """Something slow of one form begins."""
        self("phase", f"{form}: {what}")


class _Book:
    """The result, written after every form.

    Args:
        out: its folder; None keeps it in memory.
        common: what every envelope says.
        facts: what this one says besides.
    """

    def __init__(self, out: Path | None, common: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._out, self._common, self._facts = out, common, facts
        self._began = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.finished: list[str] = []

    def save(self, *, complete: bool) -> dict[str, Any]:
        """Put everything on disk, whole or not at all, and return it."""
        progress = {"op": NAME, "peers": [PEER], "skipped": self.skipped, "finished": self.finished, "complete": complete}
        document = report.envelope(
            SCHEMA, self.rows, wall_s=time.perf_counter() - self._began, extra={**self._facts, **progress}, **self._common
        )
        document["versions"]["accelerate"] = machine.package_version("accelerate")
        if self._out is not None:
            report.write_json(self._out / f"{NAME}.json", document)
        return document


def _shape(config: AttnkitDecoderConfig, form: str, batch: int, context: int) -> dict[str, int | str]:
    return {
        "form": form,
        "B": batch,
        "T": context,
        "C": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "Hkv": config.num_key_value_heads or config.num_attention_heads,
        "vocab": config.vocab_size,
    }


def _check(forms: Sequence[str], precision: str, place: torch.device) -> None:
    for form in forms or ("",):
        check_choice("forms", form, FORMS)
    check_choice("precision", precision, tuple(_DTYPES))
    if place.type == "cuda" and torch.cuda.device_count() > 1:
        raise OptionError(
            f"{torch.cuda.device_count()} GPUs are visible, and transformers' Trainer would use them all; "
            f"set CUDA_VISIBLE_DEVICES to the one that is raced on"
        )


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise OptionError(f"{name}={value} is not allowed; choose {least} or more")
