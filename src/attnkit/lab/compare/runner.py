"""The comparison itself: `run`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attnkit import report
from attnkit._core.errors import OptionError
from attnkit.lab.compare import loading, passkey, texts
from attnkit.lab.compare.loading import LoadedModel
from attnkit.lab.compare.methods import Method, select
from attnkit.lab.compare.plan import Input, inputs, order
from attnkit.lab.compare.rows import make_rows
from attnkit.lab.compare.session import Session, TextInput
from attnkit.lab.compare.state import State

__all__ = ["SCHEMA", "Event", "run"]

SCHEMA = "attnkit.compare/1"
MIN_LENGTH = 64


@dataclass(frozen=True)
class Event:
    """What a running comparison tells.

    Attributes:
        kind: "plan" (once, first), "phase" (something slow begins), "warning", or "step" (a method has read an input).
        text: one line.
        done, total: steps, those found by resuming among the done ones.
    """

    kind: Literal["plan", "phase", "warning", "step"]
    text: str
    done: int
    total: int


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
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Compare methods on one model and one text; the package's docstring has the protocol.

    Args:
        model: "smollm2", a folder with safetensors, a .gguf file, or a `LoadedModel`.
        text: "wiki", "novels", or the path of a UTF-8 file.
        lengths: of the context in tokens, each at least 64.
        methods: names in METHODS; None means the default ones, ("all",) all. The baseline, dense, always runs.
        device: where to compute, "cpu" by default; a `LoadedModel` stays where it is.
        dtype: of the model, by default bfloat16 on CUDA and float32 elsewhere; a `LoadedModel` keeps its own.
        out: folder for state.json, results.json and report/index.html; None writes nothing.
        resume: go on with the unfinished comparison in `out`.
        seed: of keys, haystacks and intervals.
        trials: text windows, and keys at each depth, for every length.
        on_event: called as the work goes on.
        command: the command line to record; None records this call.
    Returns:
        the envelope of attnkit.compare/1, as in results.json.
    Raises:
        OptionError, InputError: an argument that cannot be used; the message names it and the fix.
        MissingAsset, MissingExtra: what is not installed, with the line that installs it.
        PolicyError: the model lacks what a method needs.
        KeyboardInterrupt: passed on; finished steps are in `out`.
    """
    chosen = select(methods)
    lengths = _check_lengths(lengths)
    if trials < 1:
        raise OptionError(f"trials={trials} is not allowed; at least one key at each depth")
    if resume and out is None:
        raise OptionError("resume=True needs out, the folder of the comparison to continue")
    place, number = _placement(model, device, dtype)
    source = model if isinstance(model, LoadedModel) else loading.locate(model)
    content = texts.read(text)
    config = {
        "model": source.name,
        **source.identity,
        "text": content.name,
        "text_sha256": content.sha256,
        "lengths": list(lengths),
        "methods": [method.name for method in chosen],
        "trials": trials,
        "seed": seed,
        "device": place.type,
        "dtype": _short(number),
        **{f"{name} version": version for name, version in report.versions().items() if name != "triton"},
    }
    state = State(out, config, resume=resume)
    comparison = _Comparison(chosen, lengths, trials, seed, state, on_event)
    if comparison.todo:
        comparison.measure(source, content, place, number)
    call = ", ".join(f"{name}={config[name]!r}" for name in ("model", "text", "lengths", "methods", "trials", "seed"))
    document = comparison.envelope(
        command or f"attnkit.lab.compare.run({call})",
        device=torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"{place.type}, {torch.get_num_threads()} threads",
        dtype=_short(number),
        extra={"model": source.name, "text": content.name, "text_sha256": content.sha256},
    )
    if out is not None:
        report.write_json(out / "results.json", document)
        report.write_html(out / "report" / "index.html", [document])
        state.write(finished=True)
    return document


class _Comparison:
    """The steps of one call, those done and those to do."""

    def __init__(
        self,
        methods: list[Method],
        lengths: Sequence[int],
        trials: int,
        seed: int,
        state: State,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.methods, self.lengths, self.trials, self.seed, self.state = methods, lengths, trials, seed, state
        self.inputs = inputs(lengths, trials)
        self._on_event = on_event
        self._tell("plan", f"{len(methods)} methods, {len(self.inputs)} inputs")

    @property
    def todo(self) -> list[tuple[Input, list[Method]]]:
        """Inputs that some method has not read, with those methods in their order."""
        missing = [
            (item, [method for method in order(item, self.methods) if item.key(method) not in self.state.results])
            for item in self.inputs
        ]
        return [(item, methods) for item, methods in missing if methods]

    def measure(self, source: loading.Source | LoadedModel, text: texts.Text, device: torch.device, dtype: torch.dtype) -> None:
        """Do what is to do."""
        if isinstance(source, loading.Source):
            self._tell("phase", f"loading {source.name}")
            source = loading.load(source, device, dtype)
        self._warn_beyond_positions(source.model)
        session, frame = Session(source, self.methods), passkey.Frame(source.tokenizer)
        self._tell("phase", f"reading {text.name}")
        ids = texts.tokenize(text, source.tokenizer, lengths=self.lengths, trials=self.trials)
        session.check(self.methods, min(self.lengths))
        for item, methods in self.todo:
            content = self._content(item, ids, frame)
            session.begin()
            for method in methods:
                began = time.perf_counter()
                if isinstance(content, TextInput):
                    result = session.read_text(content, method, item.length)
                else:
                    result = session.ask(content, method, item.length)
                self.state.add(item.key(method), result, wall_s=self.state.wall_s + time.perf_counter() - began)
                self._tell("step", item.key(method))

    def envelope(self, command: str, *, device: str, dtype: str, extra: dict[str, Any]) -> dict[str, Any]:
        """The result of all steps."""
        texts_read, asked = self._by_place(False), self._by_place(True)
        shared = [method.name for method in self.methods if method.shares_dense_prefill]
        facts = {
            "tail": texts.tail_length(self.lengths),
            "shared_prefill": shared if len(shared) > 1 else [],
            "depths": passkey.DEPTHS,
            "prompt": passkey.NEEDLE + "..." + passkey.QUESTION,
        }
        return report.envelope(
            SCHEMA,
            make_rows(self.methods, self.lengths, texts_read, asked, seed=self.seed),
            command=command,
            seed=self.seed,
            device=device,
            dtype=dtype,
            wall_s=self.state.wall_s,
            extra={**extra, **facts},
        )

    def _content(self, item: Input, ids: list[int], frame: passkey.Frame) -> TextInput | passkey.Prompt:
        if item.depth is not None:
            seed = [self.seed, item.length, round(100 * item.depth), item.trial]
            return frame.prompt(ids, length=item.length, depth=item.depth, seed=seed)
        tail = texts.tail_length(self.lengths)
        end = texts.window_ends(len(ids), max(self.lengths), self.trials)[item.trial]
        return TextInput(ids[end - item.length : end - tail], ids[end - tail : end])

    def _by_place(self, asked: bool) -> dict[tuple[int, str], list[Any]]:
        places: dict[tuple[int, str], list[Any]] = {}
        for item in self.inputs:
            for method in self.methods:
                if (item.depth is not None) == asked:
                    places.setdefault((item.length, method.name), []).append(self.state.results[item.key(method)])
        return places

    def _warn_beyond_positions(self, model: Any) -> None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        beyond = [length for length in self.lengths if limit is not None and length > limit]
        if beyond:
            lengths = ", ".join(map(str, beyond))
            self._tell("warning", f"length {lengths} is beyond the {limit} positions the model was made for")

    def _tell(self, kind: Literal["plan", "phase", "warning", "step"], text: str) -> None:
        if self._on_event is not None:
            self._on_event(Event(kind, text, len(self.state.results), len(self.inputs) * len(self.methods)))


def _check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    if not lengths or min(lengths) < MIN_LENGTH:
        raise OptionError(
            f"lengths={','.join(map(str, lengths)) or 'none'} is not allowed; give at least one, each {MIN_LENGTH} or more"
        )
    return tuple(sorted(set(lengths)))


def _placement(
    model: str | Path | LoadedModel, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    if isinstance(model, LoadedModel):
        if device is not None or dtype is not None:
            raise OptionError("device and dtype are those of the loaded model; leave them out, or move the model first")
        return model.model.device, model.model.dtype
    place = torch.device(device or "cpu")
    return place, dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
