"""The steps of one comparison: those done, those to do, and the result of all of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.events import Event, Kind
from attnkit.lab.compare import loading, prompts, questions, texts
from attnkit.lab.compare.methods import Method
from attnkit.lab.compare.plan import DEFAULT, TASKS, Input, inputs, order
from attnkit.lab.compare.rows import make_rows
from attnkit.lab.compare.session import Session, TextInput
from attnkit.lab.compare.state import State

__all__ = ["SCHEMA", "Comparison", "Setup"]

SCHEMA = "attnkit.compare/1"


@dataclass(frozen=True)
class Setup:
    """Everything that decides the result; see `attnkit.lab.compare.run`."""

    source: loading.Source | loading.LoadedModel
    text: texts.Text
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    trials: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    tasks: tuple[str, ...] = DEFAULT
    query_aware: bool = False

    @property
    def call(self) -> dict[str, Any]:
        """The arguments as a user would write them."""
        return {
            "model": self.source.name,
            "text": self.text.name,
            "lengths": list(self.lengths),
            "methods": [method.name for method in self.methods],
            "trials": self.trials,
            "seed": self.seed,
            "tasks": list(self.tasks),
            "query_aware": self.query_aware,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        versions = {f"{name} version": version for name, version in report.versions().items()}
        where = {"device": self.device_name, "dtype": self.dtype_name}
        return {**self.call, **self.source.identity, "text_sha256": self.text.sha256, **where, **versions}

    @property
    def device_name(self) -> str:
        """The device in words."""
        return device_name(self.device)

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")


class Comparison:
    """Does the steps of a setup that its state does not hold.

    Args:
        setup: what to compare.
        state: what was measured before, and where to keep what is measured now.
        on_event: called as the work goes on.
    """

    def __init__(self, setup: Setup, state: State, on_event: Callable[[Event], None] | None) -> None:
        self._setup, self._state, self._on_event = setup, state, on_event
        self._inputs = inputs(setup.lengths, setup.trials, setup.tasks)
        self._spent, self._began = state.wall_s, time.perf_counter()

    @property
    def todo(self) -> list[tuple[Input, list[Method]]]:
        """Inputs that some method has not read, with those methods in their order."""
        missing = [
            (item, [method for method in order(item, self._setup.methods) if item.key(method) not in self._state.results])
            for item in self._inputs
        ]
        return [(item, methods) for item, methods in missing if methods]

    def measure(self) -> None:
        """Do what is to do.

        Raises:
            AttnkitError: the model cannot be loaded, lacks what a method needs, or the text is too short.
        """
        setup, source = self._setup, self._setup.source
        if isinstance(source, loading.Source):
            self._tell("phase", f"loading {source.name}")
            source = loading.load(source, setup.device, setup.dtype)
        self._warn_beyond_positions(source.model)
        session, frame = Session(source, setup.methods, query_aware=setup.query_aware), prompts.Frame(source.tokenizer)
        self._tell("phase", f"reading {setup.text.name}, first calls of all methods")
        ids = texts.tokenize(setup.text, source.tokenizer, lengths=setup.lengths, trials=setup.trials)
        session.check(setup.methods, min(setup.lengths))
        self._tell("plan", f"{len(setup.methods)} methods, {len(self._inputs)} inputs")
        for item, methods in self.todo:
            content = self._content(item, ids, frame)
            session.begin()
            for method in methods:
                if isinstance(content, TextInput):
                    result = session.read_text(content, method, item.length)
                else:
                    result = session.ask(content, method, item.length)
                spent = self._spent + time.perf_counter() - self._began
                self._state.add(item.key(method), result, wall_s=spent)
                self._tell("step", item.key(method))

    def envelope(self, command: str) -> dict[str, Any]:
        """The result, once nothing is to do."""
        setup = self._setup
        shared = [method.name for method in setup.methods if method.shares_dense_prefill]
        return report.envelope(
            SCHEMA,
            make_rows(setup.methods, setup.lengths, self._steps(asked=False), self._steps(asked=True), seed=setup.seed),
            command=command,
            seed=setup.seed,
            device=setup.device_name,
            dtype=setup.dtype_name,
            wall_s=self._state.wall_s,
            extra={
                "model": setup.source.name,
                "text": setup.text.name,
                "text_sha256": setup.text.sha256,
                "tail": texts.tail_length(setup.lengths),
                "shared_prefill": shared if len(shared) > 1 else [],
                "tasks": setup.tasks,
                "query_aware": setup.query_aware,
                "depths": prompts.DEPTHS,
                "prompt": [questions.NEEDLE, questions.QUESTION, questions.OPENING],
                "threads": torch.get_num_threads(),
            },
        )

    def _content(self, item: Input, ids: list[int], frame: prompts.Frame) -> TextInput | prompts.Prompt:
        setup = self._setup
        if item.depth is not None:
            seed = [setup.seed, item.length, round(100 * item.depth), item.trial]
            seed += [] if item.task == "needle" else [TASKS.index(item.task)]
            return frame.prompt(ids, length=item.length, depth=item.depth, seed=seed, task=item.task)
        tail = texts.tail_length(setup.lengths)
        end = texts.window_ends(len(ids), max(setup.lengths), setup.trials)[item.trial]
        return TextInput(ids[end - item.length : end - tail], ids[end - tail : end])

    def _steps(self, *, asked: bool) -> dict[tuple[int, str], list[Any]]:
        places: dict[tuple[int, str], list[Any]] = {}
        for item in self._inputs:
            for method in self._setup.methods:
                if (item.depth is not None) == asked:
                    places.setdefault((item.length, method.name), []).append(self._state.results[item.key(method)])
        return places

    def _warn_beyond_positions(self, model: Any) -> None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        beyond = [length for length in self._setup.lengths if limit is not None and length > limit]
        if beyond:
            lengths = ", ".join(map(str, beyond))
            self._tell("warning", f"length {lengths} is beyond the {limit} positions that the model was made for")

    def _tell(self, kind: Kind, text: str) -> None:
        if self._on_event is not None:
            total = len(self._inputs) * len(self._setup.methods)
            self._on_event(Event(kind, text, len(self._state.results), total))
